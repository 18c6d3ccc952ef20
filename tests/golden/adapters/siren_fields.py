# SPDX-License-Identifier: Apache-2.0
"""Fields, renders, compositing and interpolation of pi-GAN and FENeRF."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from facelab.bases.pigan.convert import derive_config, from_original, to_original
from facelab.bases.pigan.model import LatentConfig, SirenGenerator, SirenGeneratorConfig
from facelab.bases.pigan.variants import FENERF_VARIANTS, PIGAN_VARIANTS
from facelab.cameras import Camera
from facelab.cameras.camera import opencv_to_opengl
from facelab.cameras.rays import make_rays
from facelab.draws import TapeDraws
from facelab.fields.output import FieldOutput
from facelab.generator import Codes, GeneratorOutput, fill_output
from facelab.inference.interpolation import mix_factors
from facelab.rendering.background import fill_background, highlight_empty
from facelab.rendering.integrators import PointAlphaIntegrator
from facelab.rendering.ray_samplers import RayNoise, StratifiedSampler, sample_pdf
from facelab.rendering.settings import RenderSettings
from tests.golden.harness import Arrays, Meta, case_weights


def build(meta: Meta) -> SirenGenerator:
    """Our generator of the case's architecture, filled through the converter (keys with or without prefix)."""
    c = meta["config"]
    semantic = c["cls"] in FENERF_VARIANTS
    field = (FENERF_VARIANTS if semantic else PIGAN_VARIANTS)[c["cls"]]
    if c.get("grid"):
        field = replace(field, grid_size=tuple(c["grid"]))
    latents = {"z": LatentConfig(c.get("z_dim", 0))}
    if semantic:
        latents = {"geo": LatentConfig(c["z_geo"], "geometry"), "app": LatentConfig(c["z_app"], "color")}
    config = SirenGeneratorConfig(
        field=replace(field, hidden=c["hidden"]), latents=latents, mapping_linears=5 if semantic else 4
    )
    generator = SirenGenerator(config)
    original = to_original(generator.state_dict(), config)
    if '"siren."' not in meta["detfill"]["keys"] or "(no" in meta["detfill"]["keys"]:
        original = {key.removeprefix("siren."): value for key, value in original.items()}
    weights = case_weights(meta, {key: tuple(value.shape) for key, value in original.items()})
    derived = derive_config(weights, c["cls"])
    assert derived == config, f"the converter derived {derived}, the case is {config}"
    missing, unexpected = generator.load_state_dict(from_original(weights), strict=False)
    assert not unexpected and all(key.startswith("average_") for key in missing)
    return generator


def latents(arrays: Arrays, suffix: str = "") -> dict[str, Tensor]:
    names = {"z": "in_z", "geo": "in_z_geo", "app": "in_z_app"}
    return {name: arrays[key + suffix] for name, key in names.items() if key + suffix in arrays}


@torch.no_grad()
def siren(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    generator = build(meta)
    codes = generator.map(latents(arrays))
    field = generator.field(generator.scene(codes))
    values = field(arrays["in_points"][:, :, None], arrays["in_ray_directions"])
    outputs = {"out_rgb": values.rgb.squeeze(2), "out_sigma": values.sigma.squeeze(2)}
    if values.semantics is not None:
        outputs["out_labels"] = values.semantics.squeeze(2)
    for name, code in codes.values.items():
        suffix = "" if name == "z" else f"_{name}"
        outputs[f"out_frequencies{suffix}"], outputs[f"out_phase_shifts{suffix}"] = code[:, 0], code[:, 1]
    outputs["out_warped_points"] = generator.field_net.warp(arrays["in_points"])
    return outputs


def tape(arrays: Arrays) -> TapeDraws:
    """The recorded numbers under our draw names; ``in_randNN_*`` stand in the order of consumption."""
    kinds = {"jitter_uniform": "jitter", "coarse_noise": "coarse_noise", "importance_u": "importance"}
    kinds["final_noise"] = "final_noise"
    found = {}
    for key, value in arrays.items():
        for kind, name in kinds.items():
            if key.startswith("in_rand") and kind in key:
                found[name] = value
    return TapeDraws(tape=found)


def settings(meta: Meta) -> RenderSettings:
    c, r = meta["config"], meta["render"]
    background = next((name for name in ("last", "white", "black") if c.get(f"{name}_back")), "none")
    return RenderSettings(
        resolution=c["img_size"],
        near=r["ray_start"],
        far=r["ray_end"],
        samples_coarse=c["num_steps"],
        samples_fine=c["num_steps"] if c["hier"] else 0,
        sigma_noise=c["noise"],
        density=r["clamp_mode"],
        background=background,  # type: ignore[arg-type]
        lock_view=c["lock"],
    )


def camera(meta: Meta) -> Camera:
    c = meta["config"]
    return Camera.on_sphere([c["v_mean"]] * c["batch"], [c["h_mean"]] * c["batch"], meta["render"]["fov"])


def pixels(output: GeneratorOutput) -> Tensor:
    return output.rgb if output.semantics is None else torch.cat([output.semantics, output.rgb], dim=1)


def render_train(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    generator, view = build(meta), camera(meta)
    scene = generator.scene(generator.map(latents(arrays)))
    output = generator.render(scene, view, settings(meta), tape(arrays))
    # recomputing chunks of two rays must give the same picture
    chunked = settings(meta).replace(recompute=True, max_points=4 * meta["config"]["num_steps"])
    again = generator.render(scene, view, chunked, tape(arrays))
    torch.testing.assert_close(again.rgb, output.rgb, rtol=1e-4, atol=1e-4)
    assert view.angles is not None
    return {"out_pixels": pixels(output).detach(), "out_pose_pitch_yaw": view.angles}


@torch.no_grad()
def render_eval(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    c = meta["config"]
    generator = build(meta)
    generator.update_averages(latents(arrays, "_for_average"))
    scene = generator.scene(generator.map(latents(arrays), truncation=c["psi"]))
    options = settings(meta).replace(max_points=c["max_batch"])
    output = generator.render(scene, camera(meta), options, tape(arrays))
    raw_opacity = output.opacity
    if c.get("fill_mode"):
        output = fill_output(output, c["fill_color"], reference=True)
    outputs = {"out_pixels": pixels(output), "out_depth": output.depth[:, 0]}
    outputs["out_weights_sum_mapped"] = (2 * raw_opacity - 1).expand_as(outputs["out_pixels"])
    for name, average in generator.average_codes().values.items():
        suffix = "" if name == "z" else f"_{name}"
        outputs[f"out_avg_frequencies{suffix}"], outputs[f"out_avg_phase_shifts{suffix}"] = average[:, 0], average[:, 1]
    return outputs


def integration(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    outputs = {}
    for name, v in meta["variants"].items():
        values = arrays[v.get("input", "in_rgb_sigma")]
        labels = values.shape[-1] - 4
        field = FieldOutput(values[..., -1:], values[..., labels:-1], values[..., :labels] if labels else None)
        noise = arrays.get(f"in_noise_normal_for_{name}")
        background = next((b for b in ("last", "white", "black") if v.get(f"{b}_back")), "none")
        integrate = PointAlphaIntegrator(v["clamp_mode"], background)  # type: ignore[arg-type]
        result = integrate(arrays["in_z_vals"].squeeze(-1), field, None if noise is None else noise * v["noise_std"])
        assert result.weights is not None
        fill, channels, third = v["fill_mode"], result.channels(), result.weights
        if fill in ("debug", "weight_debug"):
            channels = highlight_empty(channels, result.opacity)
        elif fill == "weight" and not labels:
            channels = result.opacity.expand_as(channels)  # pi-GAN's mode shows the opacity itself
        elif fill in ("seg_padding_background", "eval_seg_padding_background"):
            rgb, semantics = fill_background(
                result.rgb, result.semantics, result.opacity, v["fill_color"], reference=True, dim=-1
            )
            assert semantics is not None
            channels = torch.cat([semantics, rgb], dim=-1)
        if labels and fill in ("weight", "weight_debug", "eval_seg_padding_background"):
            third = result.opacity.expand_as(channels)
        last = "third" if labels else "weights"
        picture = "pixels" if labels else "rgb"
        outputs |= {f"out_{name}_{picture}": channels, f"out_{name}_depth": result.depth, f"out_{name}_{last}": third}
    return outputs


def pdf(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    count = meta["config"]["n_imp"]
    bins, weights = arrays["in_bins"], arrays["in_weights"]
    even = torch.linspace(0, 1, count).expand(len(bins), count)
    return {
        "out_samples": sample_pdf(bins, weights, count, arrays["in_u"]),
        "out_samples_det": sample_pdf(bins, weights, count, even),
    }


def camera_rays(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    c = meta["config"]
    view = Camera.on_sphere(arrays["in_pitch"], arrays["in_yaw"], c["fov"])
    rays = make_rays(view, c["img_size"], "corners")
    options = RenderSettings(c["img_size"], c["ray_start"], c["ray_end"], c["num_steps"])
    jitter = arrays["in_jitter_uniform"].squeeze(-1) if c["jitter"] else None
    (samples,) = StratifiedSampler(options)(rays, lambda *_: None, RayNoise(jitter=jitter))  # type: ignore[arg-type,return-value]
    to_camera = opencv_to_opengl(view.cam2world)[:, :3, :3]
    assert view.angles is not None
    return {
        "out_points_world": samples.points,
        "out_z_vals": samples.t[..., None],
        "out_ray_directions_world": rays.directions,
        "out_ray_origins_world": rays.origins,
        "out_ray_directions_camera": rays.directions @ to_camera,
        "out_cam2world": opencv_to_opengl(view.cam2world),
        "out_pitch": view.angles[:, :1],
        "out_yaw": view.angles[:, 1:],
    }


def interpolation(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    psi = meta["config"]["psi"]

    def code(index: int) -> Codes:
        values = {}
        for name in ("geo", "app"):
            raw = [arrays[f"in_raw_{kind}{index}_{name}"] for kind in ("frequencies", "phase_shifts")]
            average = [arrays[f"in_avg_{kind}_{name}"] for kind in ("frequencies", "phase_shifts")]
            values[name] = torch.lerp(torch.stack(average, 1), torch.stack(raw, 1), psi)
        return Codes(values)

    first, second = code(1), code(2)
    outputs = {}
    for kind in ("geo", "app", "both", "non"):
        rows = []
        for t in arrays["in_t"].tolist():
            mixed = first.mix(second, mix_factors(kind, t, ("geo", "app"))).values
            rows.append(torch.cat([mixed["geo"][:, 0], mixed["app"][:, 0], mixed["geo"][:, 1], mixed["app"][:, 1]], 1))
        outputs[f"out_{kind}"] = torch.cat(rows)
    return outputs


SIREN_CASES = ("texture_grid", "no_grid", "deep_color", "geometry_grid", "texture_grid_no_dir")
ADAPTERS = {
    **{f"fenerf/siren_{name}": siren for name in SIREN_CASES},
    **{f"pigan/siren_{name}": siren for name in ("spatial_baseline", "tall", "embedding")},
    "pigan/camera_rays": camera_rays,
    "pigan/integration": integration,
    "pigan/render_coarse_white": render_train,
    "pigan/render_hierarchical": render_train,
    "pigan/sample_pdf": pdf,
    "pigan/staged_truncated": render_eval,
    "fenerf/integration_semantic": integration,
    "fenerf/interpolation": interpolation,
    "fenerf/render_eval": render_eval,
    "fenerf/render_train": render_train,
}
