# SPDX-License-Identifier: Apache-2.0
"""EG3D: cameras, tri-plane lookup, decoder, compositing and the importance renderer.

The renderer's cases need our ``reference`` switch: depths clamped to the range of the batch, and the
original's limits for rays that miss the box.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras.camera import Camera
from facelab.cameras.orbit import OrbitPrior, diagonal_focal, focal_intrinsics
from facelab.cameras.rays import Rays, make_rays
from facelab.draws import TapeDraws
from facelab.fields.output import FieldOutput
from facelab.fields.triplane import OSGDecoder, TriplaneConfig, TriplaneField, plane_coordinates, sample_planes
from facelab.rendering.midpoint import ImportanceSampler, MidpointIntegrator, limit_rays, ray_box, render_midpoints
from facelab.rendering.ray_samplers import sample_pdf
from facelab.rendering.settings import RenderSettings
from tests.golden.harness import Arrays, Meta, detfill, given

AXES = "xy_xz_zx"  # of the released weights


@given("planes", "xyz", "grid3d")
def plane_sampling(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    planes, points = arrays["planes"], arrays["xyz"]
    features = sample_planes(planes, points * (2 / meta["box_warp"]), AXES)
    grid = arrays["grid3d"].expand(len(points), -1, -1, -1, -1)
    dense = F.grid_sample(grid, points[:, :, None, None], padding_mode="zeros", align_corners=False)
    return {
        "projected": plane_coordinates(points, AXES).flatten(0, 1),
        "features": torch.stack([f.transpose(1, 2) for f in features], dim=1),
        "grid3d_features": dense.flatten(2).transpose(1, 2),
    }


def fill_decoder(decoder: OSGDecoder, meta: Meta) -> None:
    """Detfill by the original keys ``net.0`` and ``net.2``."""
    names = {
        "net.0.weight": decoder.hidden_weight,
        "net.0.bias": decoder.hidden_bias,
        "net.2.weight": decoder.output_weight,
        "net.2.bias": decoder.output_bias,
    }
    weights = detfill({key: tuple(p.shape) for key, p in names.items()}, meta["detfill_seed"], meta["rules"])
    with torch.no_grad():
        for key, parameter in names.items():
            parameter.copy_(weights[key])


@given("*_features")
def osg_decoder(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    c, outputs = meta["config"], {}
    for name, variant in meta["variants"].items():
        decoder = OSGDecoder(c["n_features"], features=c["decoder_output_dim"], lr_mul=variant["decoder_lr_mul"])
        fill_decoder(decoder, meta)
        sigma, rgb = decoder(arrays[f"{name}_features"].mean(1).transpose(1, 2))
        outputs |= {f"{name}_sigma": sigma, f"{name}_rgb": rgb}
    return outputs


@given("colors", "densities", "depths")
def ray_marcher(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    outputs = {}
    values = FieldOutput(arrays["densities"], arrays["colors"][..., :3], features=arrays["colors"])
    for name, run in meta["runs"].items():
        result = MidpointIntegrator(run["white_back"], batch_range=True)([(arrays["depths"].squeeze(-1), values)])
        assert result.features is not None and result.mean_depth is not None and result.weights is not None
        outputs |= {
            f"{name}_rgb": 2 * result.features - 1,
            f"{name}_depth": result.mean_depth,
            f"{name}_weights": result.weights,
        }
    return outputs


def render_settings(kwargs: dict[str, Any], **more: Any) -> RenderSettings:
    """Rendering kwargs of the original -> ours, with its own quirks."""
    auto = kwargs["ray_start"] == "auto"
    return RenderSettings(
        near=1.0 if auto else kwargs["ray_start"],
        far=2.0 if auto else kwargs["ray_end"],
        samples_coarse=kwargs["depth_resolution"],
        samples_fine=kwargs["depth_resolution_importance"],
        grid="centers",
        sigma_noise=kwargs.get("density_noise", 0.0),
        background="white" if kwargs.get("white_back") else "none",
        spacing="disparity" if kwargs["disparity_space_sampling"] else "depth",
        box_side=kwargs["box_warp"] if auto else None,
        reference=True,
        **more,
    )


@given(
    "planes",
    "origins",
    "dirs",
    "*_u_coarse",
    "*_u_fine",
    "*_noise_coarse",
    "*_noise_fine",
    "*_drgb",
    "pdf_bins",
    "pdf_weights",
    "pdf_u",
)
def importance_renderer(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    d = meta["decoder"]
    rays = Rays(arrays["origins"], arrays["dirs"])
    outputs: dict[str, Tensor] = {}
    for name, kwargs in meta["config"].items():
        config = TriplaneConfig(
            axes=AXES,
            box_side=kwargs["box_warp"],
            channels=d["n_features"],
            features=d["decoder_output_dim"],
            decoder_lr_mul=d["decoder_lr_mul"],
        )
        field = TriplaneField(config)
        fill_decoder(field.decoder, meta)
        planes = arrays["planes"].clone().requires_grad_(f"{name}_drgb" in arrays)
        settings = render_settings(kwargs)
        names = {
            "jitter": "u_coarse",
            "importance": "u_fine",
            "coarse_noise": "noise_coarse",
            "fine_noise": "noise_fine",
        }
        tape = TapeDraws(tape={k: arrays[f"{name}_{v}"] for k, v in names.items() if f"{name}_{v}" in arrays})
        bound = lambda points, _: field(points, planes)  # noqa: B023 - used within this turn
        result = render_midpoints(bound, rays, settings, tape)
        assert result.features is not None and result.mean_depth is not None
        rgb = 2 * result.features - 1
        if planes.requires_grad:
            (gradient,) = torch.autograd.grad((rgb * arrays[f"{name}_drgb"]).sum(), planes)
            outputs[f"{name}_dplanes"] = gradient
        outputs |= {f"{name}_rgb": rgb, f"{name}_depth": result.mean_depth, f"{name}_weights_sum": result.opacity}
        outputs |= _steps(name, bound, rays, settings, tape)
    outputs["pdf_samples"] = sample_pdf(
        arrays["pdf_bins"], arrays["pdf_weights"], arrays["pdf_u"].shape[1], arrays["pdf_u"]
    )
    even = torch.linspace(0, 1, arrays["pdf_u"].shape[1]).expand_as(arrays["pdf_u"])
    outputs["pdf_det_samples"] = sample_pdf(arrays["pdf_bins"], arrays["pdf_weights"], even.shape[1], even)
    return {key: value.detach() for key, value in outputs.items()}


def _steps(name: str, bound: Any, rays: Rays, settings: RenderSettings, tape: TapeDraws) -> dict[str, Tensor]:
    """Coarse depths, their weights and the fine depths on their own (sorted or not as the case stores them)."""
    rays = limit_rays(rays, settings)
    integrator = MidpointIntegrator()
    sampler = ImportanceSampler(settings, integrator)
    shape = (*rays.origins.shape[:2], settings.samples_coarse)
    t = sampler.coarse_depths(rays, tape.uniform("jitter", shape))
    outputs = {f"{name}_depths_coarse": t[..., None]}
    if settings.samples_fine:
        points = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
        sigma = bound(points, rays.directions).sigma
        if settings.sigma_noise:
            sigma = sigma + tape.normal("coarse_noise", sigma.shape) * settings.sigma_noise
        weights = integrator.weights(t, sigma)
        fine = sampler.fine_depths(t, weights, tape.uniform("importance", (*shape[:2], settings.samples_fine)))
        outputs |= {f"{name}_weights_coarse": weights[..., None], f"{name}_depths_fine": fine[..., None]}
    return outputs


@given("*_lookat", "*_h", "*_v", "fov_deg", "rs_cam2world", "rs_intrinsics", "box_o", "box_d")
def cameras(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def prior(mode: Any, c: dict[str, Any], target: Any = (0.0, 0.0, 0.0)) -> OrbitPrior:
        means = (c["horizontal_mean"], c["horizontal_stddev"], c["vertical_mean"], c["vertical_stddev"])
        return OrbitPrior(mode, *means, radius=c["radius"], target=target)

    for combo in meta["combos"]:
        p = combo["prefix"]
        normal = arrays[f"{p}normal_h"][:, 0], arrays[f"{p}normal_v"][:, 0]
        uniform = arrays[f"{p}uniform_h"][:, 0], arrays[f"{p}uniform_v"][:, 0]
        target = tuple(arrays[f"{p}lookat"].tolist())
        outputs[f"{p}gaussian"] = prior("gaussian", combo).from_raw(*normal).cam2world
        outputs[f"{p}look_at"] = prior("gaussian", combo, target).from_raw(*normal).cam2world
        outputs[f"{p}uniform"] = prior("uniform", combo).from_raw(*uniform).cam2world
    for name, run in meta["clamp_runs"].items():
        outputs[name] = prior(run["sampler"], run).from_raw(torch.zeros(1), torch.zeros(1)).cam2world
    focals = [diagonal_focal(degrees) for degrees in arrays["fov_deg"].tolist()]
    outputs["fov_intrinsics"] = torch.cat([focal_intrinsics(focal) for focal in focals])
    rays = make_rays(Camera(arrays["rs_cam2world"], arrays["rs_intrinsics"]), meta["rs_resolution"], "centers")
    outputs |= {"rs_origins": rays.origins, "rs_dirs": rays.directions}
    outputs["box_tmin"], outputs["box_tmax"] = ray_box(Rays(arrays["box_o"], arrays["box_d"]), meta["box_side"])
    return outputs


ADAPTERS = {
    "eg3d/cameras": cameras,
    "eg3d/plane_sampling": plane_sampling,
    "eg3d/osg_decoder": osg_decoder,
    "eg3d/ray_marcher": ray_marcher,
    "eg3d/importance_renderer": importance_renderer,
}
