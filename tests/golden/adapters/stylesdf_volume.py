# SPDX-License-Identifier: Apache-2.0
"""StyleSDF: cameras, rays, depths, the field, compositing, the volume generator, its start as a sphere, its losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf.losses import sphere_start
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.originals import volume_from_original, volume_to_original
from facelab.cameras import Camera
from facelab.cameras.camera import opencv_to_opengl
from facelab.cameras.rays import make_depth_rays
from facelab.cameras.sphere import SpherePrior, sphere_camera, view_angles
from facelab.draws import TapeDraws
from facelab.fields.output import FieldOutput
from facelab.fields.sdf import SdfField, SdfFieldConfig, laplace_density
from facelab.generator import Scene, ray_image
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss
from facelab.losses.path_length import path_length
from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, viewpoint_loss
from facelab.nn.film import affine
from facelab.rendering.ray_samplers import points_along
from facelab.rendering.sdf import SdfIntegrator, SdfOptions, SdfRenderOutput, ray_depths
from facelab.rendering.settings import RenderSettings

from ..harness import Arrays, Meta, case_weights

# ---------------------------------------------------------------- parts


def build(meta: Meta) -> SdfGenerator:
    """Our generator of the case's sizes with the case's weights, which pass through the renaming."""
    c = meta["config"]
    field = SdfFieldConfig(
        width=c["width"],
        layers=c["depth"],
        style_dim=c["style_dim"],
        box_side=None if c["dist_radius"] is None else 2 * c["dist_radius"],
    )
    stratified = not c.get("offset_sampling", True)
    sampling = SdfGeneratorConfig(latent_dim=c["style_dim"], sampling="stratified" if stratified else "offset")
    generator = SdfGenerator(dataclasses.replace(sampling, field=field)).eval()
    shapes = {key: tuple(value.shape) for key, value in volume_to_original(generator).items()}
    generator.load_state_dict(volume_from_original(case_weights(meta, shapes), generator))
    return generator


def settings_of(c: dict[str, Any], **changes: Any) -> RenderSettings:
    return RenderSettings(
        resolution=c["resolution"],
        near=1 - c["dist_radius"],
        far=1 + c["dist_radius"],
        samples_coarse=c["N_samples"],
        samples_fine=0,
        grid="centers",
        jitter=False,
        **changes,
    )


def located(locations: Tensor, half_fov: Tensor | float) -> Camera:
    return sphere_camera(locations[:, 0], locations[:, 1], 2 * half_fov)


def original_camera(name: str, camera: Camera, resolution: int, radius: float) -> Arrays:
    """What the original calls a camera: OpenGL axes, focal length in pixels, ends of the rays, azimuth and elevation."""
    ends = torch.ones(len(camera), 1, 1)
    return {
        f"out_{name}_extrinsics": opencv_to_opengl(camera.cam2world)[:, :3],
        f"out_{name}_focal": resolution * camera.intrinsics[:, :1, :1],
        f"out_{name}_near": (1 - radius) * ends,
        f"out_{name}_far": (1 + radius) * ends,
        f"out_{name}_viewpoint": view_angles(camera),
    }


def grid(x: Tensor, side: int) -> Tensor:
    """(N, side * side, ...) -> (N, side, side, ...)."""
    return x.unflatten(1, (side, side))


# ---------------------------------------------------------------- cameras and depths


def camera_rays(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    size, chosen, stored = c["resolution"], c["sweep_uniform_gauss"], c["stored_rays"]
    given = located(arrays["in_locations"], arrays["in_fov"])
    values = chosen["azim_range"], chosen["elev_range"], 2 * chosen["fov_ang"]
    gaussian, uniform = SpherePrior("gaussian", *values), SpherePrior("uniform", *values)
    cameras = {
        "sweep": gaussian.sweep(arrays["in_sweep_u"], c["sweep_azimuths"]),
        "uniform": uniform.from_raw(arrays["in_uni_u_azim"].flatten(), arrays["in_uni_u_elev"].flatten()),
        "gauss": gaussian.from_raw(arrays["in_gauss_azim"].flatten(), arrays["in_gauss_elev"].flatten()),
    }
    results = original_camera("loc", given, size, c["dist_radius"])
    for name, camera in cameras.items():
        results |= original_camera(name, camera, size, chosen["dist_radius"])
    for name, static in (("world", False), ("static", True)):
        rays = make_depth_rays(given[: stored["cameras"]], size, "centers", static)
        assert rays.views is not None
        for part, x in (("rays_o", rays.origins), ("rays_d", rays.directions), ("viewdirs", rays.views)):
            results[f"out_{name}_{part}"] = grid(x, size)[:, :: stored["row_step"], :: stored["col_step"]]
    return results


def ray_sampling(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    size, settings = c["resolution"], settings_of(c)
    rays = make_depth_rays(located(arrays["in_locations"], c["fov"]), size)
    of_ray = arrays["in_t_rand_ray"].flatten(1)[..., None]
    of_sample = arrays["in_t_rand_sample"].flatten(1, 2)
    box = 2 * c["dist_radius"]
    results: Arrays = {}
    for name, sampling, jitter, side in (
        ("offset_nojitter", "offset", None, box),
        ("offset_jitter", "offset", of_ray, box),
        ("strat_jitter", "stratified", of_sample, box),
        ("strat_nojitter_noznorm", "stratified", None, None),
    ):
        t = ray_depths(rays, settings, sampling, jitter)  # type: ignore[arg-type]
        points = points_along(rays, t)
        network = SdfField(SdfFieldConfig(width=1, layers=1, style_dim=1, box_side=side))
        results[f"out_{name}_z_vals"] = grid(t, size)
        results[f"out_{name}_world_pts"] = grid(points, size)
        results[f"out_{name}_net_pts"] = grid(network.warp(points), size)
    return results


@torch.no_grad()
def inference_cameras(meta: Meta, arrays: Arrays) -> Arrays:
    """The row of views of CNeRF's pictures; angles in radians, half fields of view in degrees."""
    c = meta["config"]
    azimuth, elevation = arrays["in_azim_elev"].tolist()
    camera = SpherePrior("gaussian", azimuth, elevation, 2 * c["fov"]).row(
        c["views"], c["azim_factor"], c["elev_factor"]
    )
    focal = camera.intrinsics[:, :1, :1]
    half_fov = torch.rad2deg(torch.atan(0.5 / focal[:, 0]))
    return {
        "out_trajectory": torch.cat([view_angles(camera), half_fov], dim=1),
        "out_extrinsics": opencv_to_opengl(camera.cam2world)[:, :3],
        "out_focal": c["resolution"] * focal,
    }


# ---------------------------------------------------------------- field and compositing


@torch.no_grad()
def siren_network(meta: Meta, arrays: Arrays) -> Arrays:
    network = build({**meta, "config": {**meta["config"], "dist_radius": None}}).field_net  # points as they are
    film = network.film(arrays["in_w"])
    points, views = arrays["in_x"].flatten(1, 3).split(3, dim=-1)  # points of one sample: each has its own direction
    rgb, sdf, features, _ = network.raw(points[:, :, None], views, film)
    assert features is not None
    first = torch.sin(affine(network.warp(points), film.points[0].weight, film.points[0].bias))
    shape = arrays["in_x"].shape[1:4]
    outputs = torch.cat([rgb, sdf, features], dim=-1)[:, :, 0]
    return {"out_out": outputs.unflatten(1, shape), "out_first_layer": first.unflatten(1, shape)}


def compositing(meta: Meta, arrays: Arrays) -> Arrays:
    shape = arrays["in_z_vals"].shape
    raw, t, directions, points = (arrays[f"in_{name}"].flatten(1, 2) for name in ("raw", "z_vals", "rays_d", "pts"))
    color, first, features = torch.sigmoid(raw[..., :3]), raw[..., 3:4], raw[..., 4:]
    density = laplace_density(first, arrays["in_beta"])
    of_distance = FieldOutput(density, color, features=features, sdf=first)
    of_density = FieldOutput(first, color, features=features)
    results = {"out_sigma": density.unflatten(1, shape[1:3])}
    for name, values, background in (
        ("plain", of_distance, "none"),
        ("force_bg", of_distance, "last"),
        ("density", of_density, "none"),
    ):
        output = SdfIntegrator(background)(t, points, values, directions)  # type: ignore[arg-type]
        assert output.features is not None and output.mask is not None and output.points is not None
        found = {
            "rgb": 2 * output.rgb - 1,
            "features": output.features,
            "mask": output.mask,
            "xyz": output.points,
        }
        results |= {f"out_{name}_{key}": value.unflatten(1, shape[1:3]) for key, value in found.items()}
    return results


# ---------------------------------------------------------------- the generator


def pictures(name: str, output: SdfRenderOutput, side: int) -> Arrays:
    assert output.points is not None and output.sdf is not None and output.mask is not None
    return {
        f"out_{name}_rgb": ray_image(2 * output.rgb - 1, side),
        f"out_{name}_xyz": ray_image(output.points, side),
        f"out_{name}_sdf": grid(output.sdf, side),
        f"out_{name}_mask": ray_image(output.mask, side),
    }


def parameter_gradients(meta: Meta, generator: SdfGenerator, loss: Tensor) -> Arrays:
    """The gradients that the case asks for, by the original's parameter names."""
    loss.backward()
    slopes = {name: parameter.grad for name, parameter in generator.named_parameters()}
    holder = SdfGenerator(generator.config)
    state = {name: slope for name, slope in slopes.items() if slope is not None}
    holder.load_state_dict({**{k: torch.zeros_like(v) for k, v in holder.state_dict().items()}, **state})
    named = volume_to_original(holder)
    return {f"out_{output}": named[key] for output, key in meta["gradients"].items()}


def generator_volume(meta: Meta, arrays: Arrays) -> Arrays:
    """Both ways to the gradient must give the case's numbers: ours is compared here, autograd's with ours in tests."""
    c = meta["config"]
    generator, settings = build(meta), settings_of(c)
    side, camera = c["resolution"], located(arrays["in_locations"], c["fov"])
    codes = generator.map({"z": arrays["in_z"]})
    options = SdfOptions(generator.config.sampling, samples=True, gradient="layers")
    seen = generator.render_volume(generator.scene(codes), camera, settings, options=options)
    assert seen.gradient is not None and seen.sdf is not None
    results = {**pictures("train", seen, side), "out_train_eikonal": grid(seen.gradient, side)}
    eikonal, surface = eikonal_loss(seen.gradient), minimal_surface_loss(seen.sdf, c["min_surf_beta"])
    results |= {"out_w": codes.values["w"], "out_eikonal_loss": eikonal, "out_minsurf_loss": surface}
    loss = results["out_train_rgb"].square().mean() + eikonal + surface
    results |= parameter_gradients(meta, generator, loss)
    with torch.no_grad():
        generator.update_averages({"z": arrays["in_mean_z"]})
        scene: Scene = generator.scene(generator.map({"z": arrays["in_z"]}, truncation=c["truncation_ratio"]))
        settings = settings.replace(background="last", lock_view=True)
        seen = generator.render_volume(
            scene, camera, settings, options=SdfOptions(generator.config.sampling, samples=True)
        )
    return {**results, **pictures("infer", seen, side), "out_mean_w": generator.average_codes().values["w"]}


def sphere(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    generator, settings = build(meta), settings_of(c)
    rays = generator.rays(located(arrays["in_locations"], c["fov"]), settings)
    field = generator.field(generator.scene(generator.map({"z": arrays["in_z"]})))
    tape = TapeDraws(tape={"jitter": arrays["in_t_rand"]})
    start = sphere_start(field.distances, rays, settings, tape, generator.config.sampling)
    results = {
        "out_sdf": grid(start.sdf.squeeze(-1), c["resolution"]),
        "out_target": grid(start.target.squeeze(-1), c["resolution"]),
        "out_loss": start.loss,
    }
    return {**results, **parameter_gradients(meta, generator, start.loss)}


def losses(meta: Meta, arrays: Arrays) -> Arrays:
    c = meta["config"]
    assert c["smooth_l1_beta"] == 1, "the smooth L1 loss is quadratic below 1"
    real, fake = arrays["in_real"], arrays["in_fake"]
    latents = arrays["in_latents"].requires_grad_()
    noise = arrays["in_noise"]
    image = torch.tanh(latents.flatten(1) @ arrays["in_proj"]).reshape(noise.shape)
    path = path_length(image, latents, noise, arrays["in_mean_path"], c["path_decay"])
    return {
        "out_d_logistic": d_real_loss(real) + d_fake_loss(fake),
        "out_g_nonsat": g_loss(fake),
        "out_viewpoint": viewpoint_loss(arrays["in_view_pred"], arrays["in_view_gt"]),
        "out_eikonal": eikonal_loss(arrays["in_eik"]),
        "out_minsurf": minimal_surface_loss(arrays["in_sdf"], c["min_surf_beta"]),
        "out_path_penalty": path.penalty,
        "out_path_mean": path.mean,
        "out_path_lengths": path.lengths,
    }


ADAPTERS = {
    "cnerf/inference_cameras": inference_cameras,
    "stylesdf/camera_rays": camera_rays,
    "stylesdf/compositing": compositing,
    "stylesdf/generator_volume": generator_volume,
    "stylesdf/losses": losses,
    "stylesdf/ray_sampling": ray_sampling,
    "stylesdf/siren_network": siren_network,
    "stylesdf/sphere_init": sphere,
}
