# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of a tri-plane field: the one door to the plain renderer and the fused one."""

from __future__ import annotations

import functools

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

    On a GPU the fused kernels of :mod:`cuda_ops.triplane_render` run, in the precision of ``field.precision``, with
    gradients of first order for planes, decoder and rays. For what they do not have (density noise, normals, weights,
    ``settings.reference``, disparities within a box; with gradient also coarse samples without one, limits that
    depend on rays, deterministic algorithms) the plain renderer runs, whose numbers are the same up to rounding, and
    which has gradients of every order.

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
    supported = not keep_weights and _has_kernel(settings, rays) and _has_gradient(planes, rays, field, settings)

    def plain() -> RenderOutput:
        return render_midpoints(lambda points, _: field(points, planes), rays, settings, draws, keep_weights)

    if not (supported and _wanted(planes, field, spec)):
        return plain()
    fused = functools.partial(_render_fused, planes, rays, field, settings, draws, spec)
    return dispatch.run("triplane_render", planes.device, None, fused, plain)


def _render_fused(
    planes: Tensor,
    rays: Rays,
    field: TriplaneField,
    settings: RenderSettings,
    draws: Draws | None,
    spec: triplane_render.TriplaneSpec,
) -> RenderOutput:
    """:func:`render_triplane` by the fused kernels."""
    check_midpoint_settings(settings)
    images, count = rays.origins.shape[:2]
    noise = RayNoise.draw(draws, settings, images, count, rays.origins.device, of_samples=True)
    rays = limit_rays(rays, settings)
    seen = triplane_render.render_triplane(
        planes,
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
    """What the fused kernel has to know of a field and of settings.

    A field of precision ``auto`` is rendered in TF32 where matrix products may be, else in fp32.
    """
    first, second, third = PLANE_AXES[field.config.axes]
    precision = field.precision
    if precision == "auto":
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
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
        precision=precision,
    )


def _has_kernel(settings: RenderSettings, rays: Rays) -> bool:
    """Whether the fused renderer knows these settings."""
    if settings.normals or settings.reference or settings.noisy:
        return False
    if settings.spacing == "depth":
        return True
    # evenly spaced disparities end up below zero where few of them reach far beyond near; then depths do not ascend
    own = settings.box_side is not None or rays.limits is not None
    return not own and settings.far < settings.samples_coarse * settings.near


def _has_gradient(planes: Tensor, rays: Rays, field: TriplaneField, settings: RenderSettings) -> bool:
    """Whether the fused renderer has the gradients that are wanted, or none are."""
    if not torch.is_grad_enabled():
        return True
    of_rays = rays.origins.requires_grad or rays.directions.requires_grad
    of_limits = rays.limits is not None and rays.limits.requires_grad
    if not (of_rays or of_limits or planes.requires_grad or any(x.requires_grad for x in field.parameters())):
        return True
    moving = of_limits or (of_rays and settings.box_side is not None and rays.limits is None)
    return settings.coarse_gradient and not moving and not torch.are_deterministic_algorithms_enabled()


def _wanted(planes: Tensor, field: TriplaneField, spec: triplane_render.TriplaneSpec) -> bool:
    """Whether a kernel runs; on the CPU only where the interpreter was asked for by name."""
    if planes.device.type == "cpu" and not (dispatch.interpreted() and dispatch.mode() == "triton"):
        return False
    found = triplane_render.problem(planes, field.decoder.effective(), spec)
    return dispatch.choose("triplane_render", planes.device, found) == "triton"
