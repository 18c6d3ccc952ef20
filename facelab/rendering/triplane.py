# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of a tri-plane field: the one door to the plain renderer and the fused one."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops import dispatch, triplane_render
from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.triplane import PLANE_AXES, TriplaneField
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import check_midpoint_settings, limit_rays, render_midpoints
from facelab.rendering.ray_samplers import RayNoise
from facelab.rendering.settings import RenderSettings


def render_triplane(
    planes: Tensor,
    rays: Rays,
    field: TriplaneField,
    settings: RenderSettings,
    draws: Draws | None = None,
    keep_weights: bool = False,
) -> RenderOutput:
    """Render N x R rays of a tri-plane field.

    On a GPU and without gradient the fused kernel of :mod:`cuda_ops.triplane_render` runs, in the precision of
    ``field.precision``; with gradient, and for what the kernel does not have (density noise, normals, weights,
    ``settings.reference``, disparities within a box), the plain renderer does, whose numbers are the same up to
    rounding.

    Args:
        planes: (N or 1, 3, C, H, W).
        rays: N x R rays.
        field: axes, box and decoder.
        settings: see :func:`~facelab.rendering.midpoint.render_midpoints`.
        draws: as there.
        keep_weights: return interval weights and midpoints too.

    Returns:
        RenderOutput with features (N, R, C), rgb, depth, opacity, mean_depth.

    Raises:
        ValueError: as the plain renderer.
    """
    spec = fused_spec(field, settings)
    supported = not keep_weights and _has_kernel(settings, rays) and not _needs_gradient(planes, rays, field)
    if not (supported and _wanted(planes, field, spec)):
        return render_midpoints(lambda points, _: field(points, planes), rays, settings, draws, keep_weights)
    check_midpoint_settings(settings)
    images, count = rays.origins.shape[:2]
    noise = RayNoise.draw(draws, settings, images, count, rays.origins.device, of_samples=True)
    rays = limit_rays(rays, settings)
    stored = planes.half() if field.precision == "fp16" else planes
    seen = triplane_render.render_triplane(
        stored,
        rays.origins,
        rays.directions,
        field.decoder.effective(),
        spec,
        rays.limits,
        noise.jitter,
        noise.importance,
    )
    return RenderOutput(
        rgb=seen.features[..., :3],
        depth=seen.depth,
        opacity=seen.opacity,
        features=seen.features,
        mean_depth=seen.mean_depth,
    )


def fused_spec(field: TriplaneField, settings: RenderSettings) -> triplane_render.TriplaneSpec:
    """What the fused kernel has to know of a field and of settings."""
    first, second, third = PLANE_AXES[field.config.axes]
    return triplane_render.TriplaneSpec(
        axes=(first, second, third),
        scale=2 / field.config.box_side,
        concat=field.config.aggregation == "concat",
        near=settings.near,
        far=settings.far,
        samples=settings.samples_coarse,
        importance=settings.samples_fine,
        disparity=settings.spacing == "disparity",
        white=settings.background == "white",
        precision=field.precision,
    )


def _has_kernel(settings: RenderSettings, rays: Rays) -> bool:
    """Whether the fused renderer knows these settings."""
    if settings.normals or settings.reference or settings.sigma_noise > 0:
        return False
    if settings.spacing == "depth":
        return True
    # evenly spaced disparities end up below zero where few of them reach far beyond near; then depths do not ascend
    own = settings.box_side is not None or rays.limits is not None
    return not own and settings.far < settings.samples_coarse * settings.near


def _needs_gradient(planes: Tensor, rays: Rays, field: TriplaneField) -> bool:
    if not torch.is_grad_enabled():
        return False
    inputs = (planes, rays.origins, rays.directions, *field.parameters())
    return any(x.requires_grad for x in inputs)


def _wanted(planes: Tensor, field: TriplaneField, spec: triplane_render.TriplaneSpec) -> bool:
    """Whether a kernel runs; on the CPU only where the interpreter was asked for by name."""
    if planes.device.type == "cpu" and not (dispatch.interpreted() and dispatch.mode() == "triton"):
        return False
    found = triplane_render.problem(planes, field.decoder.effective(), spec)
    return dispatch.choose("triplane_render", planes.device, found) == "triton"
