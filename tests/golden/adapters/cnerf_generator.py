# SPDX-License-Identifier: Apache-2.0
"""CNeRF's generator: one local generator, codes, fusion, the volume generator, sphere initialisation, the full model.

Weights pass through the converter, which also finds the architecture. Where the cases show a quirk of the original they
need our ``reference`` switches: ``residual_eikonal``, ``double_truncation`` and ``features_only``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.cameras.rays import Rays
from facelab.cameras.sphere import sphere_camera
from facelab.generator import Codes, Scene
from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, sphere_loss
from facelab.methods.cnerf import mixing
from facelab.methods.cnerf.field import CNerfFieldConfig, run_layers
from facelab.methods.cnerf.fusion import RegionValues, Subset, fuse, fuse_features
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.methods.cnerf.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
)
from facelab.nn.skip_decoder import SkipDecoderConfig
from facelab.rendering.sdf import SdfIntegrator, SdfOptions, SdfRenderOutput, sphere_points
from facelab.rendering.settings import RenderSettings

from ..harness import Arrays, Meta, case_weights


def architecture(c: dict[str, Any]) -> CNerfGeneratorConfig:
    field = CNerfFieldConfig(
        c.get("n_render", 9), c["depth"], c["width"], c["style_dim"], box_side=2 * c.get("dist_radius", 0.12)
    )
    decoder = None
    if "size" in c:
        decoder = SkipDecoderConfig(
            size=c["size"],
            in_resolution=c["resolution"],
            style_dim=c["style_dim"],
            lr_mapping=c["lr_mapping"],
            channel_multiplier=c["channel_multiplier"],
            semantic_channels=c["n_wcode"],
        )
    return CNerfGeneratorConfig(
        field, decoder=decoder, residual_eikonal=True, double_truncation=True, features_only=True
    )


def build(meta: Meta) -> CNerfGenerator:
    """Our generator with the weights of the case, which pass through the converter."""
    config = architecture(meta["config"])
    generator = CNerfGenerator(config).eval()
    original = generator_to_original(generator)
    weights = {**original, **case_weights(meta, {key: tuple(value.shape) for key, value in original.items()})}
    found = generator_config_from_original(weights)
    if config.decoder is not None and config.decoder.size <= 32:  # where the multiplier changes nothing
        assert found.decoder is not None
        multiplier = config.decoder.channel_multiplier
        found = replace(found, decoder=replace(found.decoder, channel_multiplier=multiplier))
    switches = {"residual_eikonal": True, "double_truncation": True, "features_only": True}
    box = replace(found.field, box_side=config.field.box_side)
    assert replace(found, field=box, **switches) == config, f"the converter found {found}, the case is {config}"
    generator.load_state_dict(generator_from_original(weights, generator))
    return generator


def settings(c: dict[str, Any], **changes: Any) -> RenderSettings:
    radius = c.get("dist_radius", 0.12)
    return RenderSettings(
        resolution=c["resolution"],
        near=1 - radius,
        far=1 + radius,
        samples_coarse=c["N_samples"],
        samples_fine=0,
        grid="centers",
        jitter=False,
    ).replace(**changes)


def cameras(c: dict[str, Any], locations: Tensor) -> Camera:
    return sphere_camera(locations[:, 0], locations[:, 1], 2 * c["fov"])


def local_generator(meta: Meta, arrays: Arrays) -> Arrays:
    generator = build(meta)
    net, branch, x = generator.field_net, meta["config"]["branch"], arrays["in_x"]
    points, directions = x[..., :3].flatten(1, -2), x[..., 3:].flatten(1, -2)
    styles = arrays["in_styles"][:, None].expand(-1, net.config.regions, -1, -1)
    shape, texture, _ = run_layers(points, net.regions.modulate(styles), net.config.depth)
    values = net.regions.values(shape, texture, directions)
    features = net.regions.features(texture, directions, torch.ones_like(values.mask), [branch])
    parts = [values.rgb[:, branch], values.sdf[:, branch, ..., None], features, values.mask[:, branch, ..., None]]
    base = net.base.distance(points, net.base.modulate(styles[:, :1]))
    return {
        "out_out": torch.cat(parts, -1).reshape(*x.shape[:-1], -1).detach(),
        "out_init_sdf": base.reshape(*x.shape[:-1], 1).detach(),
    }


def style_mixing(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]

    def spread(codes: tuple[Tensor, Tensor]) -> Tensor:
        return mixing.layer_styles(*codes, c["depth"]).flatten(1, 2)

    return {
        "out_single": spread(mixing.repeat(arrays["in_w1"], c["n_render"])),
        "out_mixed": spread(mixing.mix(arrays["in_w1"], arrays["in_w2"], arrays["in_choices"])),
        "out_given": spread(mixing.separate(arrays["in_w_list"])),
    }


@torch.no_grad()
def fusion(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    generator = build(meta)
    net, raw, t, points = generator.field_net, arrays["in_raw"], arrays["in_z_vals"], arrays["in_pts"]
    grid = t.shape[1:3]
    raw, t, points = raw.flatten(2, 3).transpose(0, 1), t.flatten(1, 2), points.flatten(1, 2)
    directions = arrays["in_rays_d"].flatten(1, 2)
    styles = arrays["in_styles"].unflatten(1, (c["n_render"], -1))
    base = net.base_distance(points, styles)[..., 0]
    values = RegionValues(raw[..., :3], raw[..., 3], raw[..., -1])
    outputs = {}
    for name, subset in (("all", None), ("subset", Subset(tuple(c["semantics"]), carve=False))):
        kept = list(range(c["n_render"])) if subset is None else list(subset.channels)
        fused = fuse(values, base, net.beta, subset)
        fused = replace(fused, features=fuse_features(raw[:, kept, ..., 4:-1], values.mask[:, kept]))
        seen = SdfIntegrator()(t, points, fused, directions)
        assert seen.features is not None and seen.semantics is not None and fused.sdf is not None
        assert seen.mask is not None and seen.points is not None
        found = {
            "rgb": 2 * seen.rgb - 1,
            "features": seen.features,
            "sdf": fused.sdf,
            "mask": seen.mask,
            "xyz": seen.points,
            "seg": seen.semantics,
        }
        found = {key: value.unflatten(1, grid) for key, value in found.items()}
        found["seg"] = found["seg"].movedim(-1, 0)[..., None]
        outputs |= {f"out_{name}_{key}": value for key, value in found.items()}
    return outputs


def image(x: Tensor | None, c: dict[str, Any]) -> Tensor:
    assert x is not None
    return x.transpose(1, 2).unflatten(2, (c["resolution"], c["resolution"]))


def volume_outputs(prefix: str, seen: SdfRenderOutput, c: dict[str, Any]) -> Arrays:
    side = (c["resolution"], c["resolution"])
    assert seen.sdf is not None
    outputs = {
        "rgb": image(2 * seen.rgb - 1, c),
        "xyz": image(seen.points, c),
        "mask": image(seen.mask, c),
        "seg": image(seen.semantics, c),
        "sdf": seen.sdf.unflatten(1, side),
    }
    if seen.gradient is not None:
        outputs["eikonal"] = seen.gradient.unflatten(1, side)
    return {f"out_{prefix}_{key}": value.detach() for key, value in outputs.items()}


def generator_volume(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    generator, camera = build(meta), cameras(c, arrays["in_locations"])
    scene = generator.scene(generator.map({"z": arrays["in_z"]}))
    options = SdfOptions(samples=True, gradient="layers")
    seen = generator.render_volume(scene, camera, settings(c), options=options)
    assert seen.gradient is not None and seen.sdf is not None and seen.semantics is not None
    eikonal, surface = eikonal_loss(seen.gradient), minimal_surface_loss(seen.sdf, c["min_surf_beta"])
    loss = (2 * seen.rgb - 1).square().mean() + eikonal + surface + seen.semantics.square().mean()
    loss.backward()
    assert all(p.grad is None for p in generator.field_net.base.parameters())
    gradients = original_gradients(generator)
    outputs = volume_outputs("train", seen, c)
    outputs |= {"out_eikonal_loss": eikonal.detach(), "out_minsurf_loss": surface.detach()}
    outputs |= {f"out_{name}": gradients[key] for name, key in meta["gradients"].items()}

    with torch.no_grad():
        generator.update_averages({"z": arrays["in_mean_z"]})
        shape, texture = mixing.separate(arrays["in_w_list"])
        psi = c["truncation_ratio"]
        average = generator.average_w
        # the original truncates given codes once: here the codes themselves, nothing more in the scene
        codes = Codes({"shape": shape, "texture": texture, "decoder": shape[:, 0]}).map(
            lambda w: torch.lerp(average.to(w), w, psi)
        )
        options, static = SdfOptions(samples=True), settings(c, lock_view=True)
        seen = generator.render_volume(generator.scene(codes), camera, static, options=options)
        outputs |= volume_outputs("infer", seen, c)
        outputs["out_mean_w"] = generator.average_w[None]
    return outputs


def original_gradients(generator: CNerfGenerator) -> dict[str, Tensor]:
    """Gradients under the names of the original; zero where there is none."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in generator.named_parameters()}
    return generator_to_original(generator, found)


def sphere_init(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    generator = build(meta)
    rays: Rays = generator.rays(cameras(c, arrays["in_locations"]), settings(c))
    jitter = arrays["in_t_rand"].flatten(1, 2)
    points = sphere_points(rays, settings(c), generator.config.sampling, jitter)
    scene = generator.scene(generator.map({"z": arrays["in_z"]}))
    sdf = generator.base_distance(scene, points)
    loss, target = sphere_loss(sdf, points, c["dist_radius"] / 2)
    loss.backward()
    gradients = original_gradients(generator)
    shape = arrays["in_t_rand"].shape
    return {
        "out_sdf": sdf.detach().reshape(shape),
        "out_target": target.reshape(shape),
        "out_loss": loss.detach(),
        **{f"out_{name}": gradients[key] for name, key in meta["gradients"].items()},
    }


@torch.no_grad()
def generator_full(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    generator, camera = build(meta), cameras(c, arrays["in_locations"])
    generator.update_averages({"z": arrays["in_mean_z"]})
    codes = generator.map({"z": arrays["in_z"]}, truncation=c["truncation_ratio"])
    scene = generator.scene(codes)
    texture = codes.values["texture"].clone()
    texture[:, c["edited_branch"]] = arrays["in_edit_w"]
    edited = generator.scene(Codes({**codes.values, "texture": texture}))
    outputs = {
        "out_w": codes.values["decoder"],
        "out_mean_w": generator.average_w[None],
        "out_mean_decoder": generator.average_style[None],
    }

    def draw(name: str, seen: Scene) -> None:
        drawn = generator.render(seen, camera, settings(c, lock_view=True))
        assert drawn.semantics is not None and drawn.raw_rgb is not None
        outputs[f"out_{name}_img"], outputs[f"out_{name}_seg"] = drawn.rgb, drawn.semantics / 2 + 0.5
        outputs[f"out_{name}_thumb"] = drawn.raw_rgb

    draw("all", scene)
    draw("edit", edited)
    for number, subset in enumerate(c["subsets"]):
        draw(f"subset{number}", generator.only(scene, [generator.region_names[i] for i in subset]))
    volume = generator.render_volume(scene, camera, settings(c, lock_view=True))
    outputs["out_all_seg_low"] = image(volume.semantics, c)
    return outputs


ADAPTERS = {
    "cnerf/local_generator": local_generator,
    "cnerf/style_mixing": style_mixing,
    "cnerf/fusion": fusion,
    "cnerf/generator_volume": generator_volume,
    "cnerf/sphere_init": sphere_init,
    "cnerf/generator_full": generator_full,
}
