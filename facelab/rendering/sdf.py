# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's volume rendering: evenly spaced depths and compositing of the density of a signed distance.

N images, R rays, S samples per ray, C feature channels, K labels (arXiv 2112.11427, section 3.2). Rays have the
depth along the camera's axis as parameter (:func:`~facelab.cameras.rays.make_depth_rays`); lengths are measured
along the ray. The last sample stands for everything behind it: its weight is the probability of background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.output import BoundField, FieldOutput
from facelab.fields.sdf import DistanceField, gradient_by_autograd
from facelab.rendering.integrators import LAST_INTERVAL, TRANSMITTANCE_EPS, RenderOutput
from facelab.rendering.ray_samplers import RayNoise, points_along
from facelab.rendering.settings import RenderSettings
from facelab.rendering.transmittance import cumulative_product
from facelab.rendering.volume_renderer import composited_normals, render_chunks

Sampling = Literal["offset", "stratified"]


@dataclass(frozen=True)
class SdfRenderOutput(RenderOutput):
    """What a ray sees of a signed distance field.

    ``depth`` and ``opacity`` are sums over all samples but the last, so that ``depth / opacity`` is where the head is.

    Attributes:
        mask: (N, R, 1) weight of the last sample, the probability of background.
        points: (N, R, 3) weighted sum of the samples' positions, the last one included; scene units.
        sdf: (N, R, S, 1) signed distance of every sample, or None.
        gradient: (N, R, S, 3) its gradient with respect to world points, or None.
    """

    mask: Tensor | None = None
    points: Tensor | None = None
    sdf: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class SdfOptions:
    """What :func:`render_sdf` does besides its settings.

    Attributes:
        sampling: ``offset``: S depths from near on, all of a ray moved by one random share of a step; ``stratified``:
            S depths from near to far, each moved on its own between its neighbours' midpoints.
        samples: return the signed distance of every sample, which a loss on it needs.
        gradient: also return its gradient: ``layers`` pulled back through the layers as ordinary tensors,
            ``autograd`` the derivative of the graph (the same numbers, a slower backward), ``none``.
    """

    sampling: Sampling = "offset"
    samples: bool = False
    gradient: Literal["none", "layers", "autograd"] = "none"


# ---------------------------------------------------------------- depths


def even_depths(near: Tensor, far: Tensor, samples: int, sampling: Sampling) -> Tensor:
    """(N, R, 1) ends of the rays -> (N, R, S) ascending depths; with ``offset`` the last lies a step before the end."""
    step = torch.arange(samples, device=near.device, dtype=near.dtype)
    step = step / (samples if sampling == "offset" else samples - 1)
    return near * (1 - step) + far * step


def shift_depths(t: Tensor, far: Tensor, u: Tensor) -> Tensor:
    """Move the depths (N, R, S) of a ray by the share ``u`` (N, R, 1) of the way to the next one, the last to the end."""
    upper = torch.cat([t[..., 1:], far.expand_as(t[..., :1])], dim=-1)
    return t + (upper - t) * u


def stratify_depths(t: Tensor, u: Tensor) -> Tensor:
    """Move each depth between the midpoints to its neighbours by ``u`` (N, R, S) in [0, 1); the ends bound the outer."""
    middle = (t[..., 1:] + t[..., :-1]) / 2
    lower = torch.cat([t[..., :1], middle], dim=-1)
    upper = torch.cat([middle, t[..., -1:]], dim=-1)
    return lower + (upper - lower) * u


def ray_ends(rays: Rays, settings: RenderSettings) -> tuple[Tensor, Tensor]:
    """First and last depth of each ray, (N, R, 1) each: those of the rays, else of the settings."""
    if rays.limits is not None:
        return rays.limits[..., :1], rays.limits[..., 1:]
    like = rays.origins[..., :1]
    return torch.full_like(like, settings.near), torch.full_like(like, settings.far)


def ray_depths(rays: Rays, settings: RenderSettings, sampling: Sampling, jitter: Tensor | None = None) -> Tensor:
    """Depths (N, R, S) of the samples.

    Args:
        jitter: uniform numbers in [0, 1): (N, R, 1) for ``offset``, (N, R, S) for ``stratified``; None = unmoved.
    """
    near, far = ray_ends(rays, settings)
    t = even_depths(near, far, settings.samples_coarse, sampling)
    if jitter is None:
        return t
    return shift_depths(t, far, jitter) if sampling == "offset" else stratify_depths(t, jitter)


def sphere_points(rays: Rays, settings: RenderSettings, sampling: Sampling, jitter: Tensor) -> Tensor:
    """Points (N, R, S, 3) of the sphere initialisation: always stratified, whatever the depths are.

    ``jitter`` is (N, R, S), uniform in [0, 1). With ``offset`` depths the last one bounds its own cell.
    """
    return points_along(rays, stratify_depths(ray_depths(rays, settings, sampling), jitter))


# ---------------------------------------------------------------- compositing


@dataclass(frozen=True)
class SdfIntegrator:
    """Alpha compositing of point samples, the last of which reaches infinitely far (StyleSDF, equation 5).

    Fields with a signed distance give their density; the raw density of others goes through a softplus.
    ``background`` ``last`` gives the missing weight to the last sample.
    """

    background: Literal["none", "last"] = "none"

    def weights(self, t: Tensor, density: Tensor, directions: Tensor) -> Tensor:
        """Weights (N, R, S) of samples at ascending t (N, R, S) with density (N, R, S, 1), rays (N, R, 3)."""
        interval = torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], LAST_INTERVAL)], dim=-1)
        lengths = interval * directions.norm(dim=-1, keepdim=True)
        alpha = 1 - torch.exp(-density.squeeze(-1).to(t.dtype) * lengths)
        keep = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + TRANSMITTANCE_EPS], dim=-1)
        weights = alpha * cumulative_product(keep, -1)[..., :-1]
        if self.background == "last":
            weights = torch.cat([weights[..., :-1], 1 - weights[..., :-1].sum(-1, keepdim=True)], dim=-1)
        return weights

    def __call__(
        self, t: Tensor, points: Tensor, values: FieldOutput, directions: Tensor, noise: Tensor | None = None
    ) -> SdfRenderOutput:
        """Composite the samples of each ray.

        Args:
            t: (N, R, S) ascending ray parameters.
            points: (N, R, S, 3) where they are.
            values: the field there.
            directions: (N, R, 3) of the rays, of any length.
            noise: (N, R, S, 1) added to raw densities; fields with a signed distance have none.
        """
        if values.sdf is None and noise is not None:
            values = replace(values, sigma=values.sigma.float() + noise)
        weights = self.weights(t, _density(values), directions)
        front = weights[..., :-1]
        return SdfRenderOutput(
            rgb=_sum(weights, values.rgb),
            depth=(front * t[..., :-1]).sum(-1, keepdim=True),
            opacity=front.sum(-1, keepdim=True),
            semantics=None if values.semantics is None else _sum(weights, values.semantics),
            weights=weights[..., None],
            t=t,
            features=None if values.features is None else _sum(weights, values.features),
            mask=weights[..., -1:],
            points=_sum(weights, points),
        )


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    # a batched product reads the values once and never writes weights * values
    return torch.matmul(weights[..., None, :], values.to(weights.dtype)).squeeze(-2)


# ---------------------------------------------------------------- rendering


def render_sdf(
    field: DistanceField | BoundField,
    rays: Rays,
    settings: RenderSettings,
    draws: Draws | None = None,
    options: SdfOptions | None = None,
    keep_weights: bool = False,
) -> SdfRenderOutput:
    """Render N x R rays of a signed distance field, or of a raw density that is rendered the same way.

    Chunks as in :func:`~facelab.rendering.volume_renderer.render_rays`: without gradient, nothing of the size of the
    samples outlives a chunk unless it is asked for; with gradient and ``settings.recompute`` neither do activations.

    Args:
        field: callable (points, directions) -> FieldOutput; ``options.gradient`` ``layers`` needs a DistanceField.
        rays: N x R rays with non-unit directions; their ``limits`` replace near and far, their ``views`` are what
            the field sees.
        settings: near, far, ``samples_coarse``, jitter, ``background`` ``none`` or ``last``, normals;
            ``sigma_noise`` counts for raw densities only.
        draws: random numbers ``jitter`` and, for raw densities, ``final_noise``.
        options: sampling, and which values of the samples are returned.
        keep_weights: return the weights and depths of the samples too.

    Returns:
        SdfRenderOutput with (N, R, ...) tensors.

    Raises:
        ValueError: another background, importance samples, no draws where settings ask for them, or a gradient
            of a field that has no signed distance.
    """
    options = options or SdfOptions()
    check_sdf_settings(settings)
    integrator = SdfIntegrator("last" if settings.background == "last" else "none")
    noise = _draw_noise(draws, settings, options, rays)
    if options.gradient != "none":  # all layers of a chunk are alive at once
        settings = settings.replace(max_points=max(1, settings.max_points // 4))

    def chunk(part: Rays, part_noise: RayNoise) -> SdfRenderOutput:
        t = ray_depths(part, settings, options.sampling, part_noise.jitter)
        points = points_along(part, t)
        values, gradient = _evaluate(field, points, _views(part), options)
        output = integrator(t, points, values, part.directions, part_noise.final)
        if settings.normals:
            output = replace(output, normals=sdf_normals(field, part, output, settings.max_points))
        if not keep_weights:
            output = replace(output, weights=None, t=None)
        return replace(output, sdf=values.sdf if options.samples else None, gradient=gradient)

    return render_chunks(chunk, rays, noise, settings)


@torch.no_grad()
def frustum_distances(
    distances: Callable[[Tensor], Tensor], rays: Rays, settings: RenderSettings, sampling: Sampling = "offset"
) -> Tensor:
    """What a field says at the unmoved depths of rays, for :mod:`facelab.mesh.aligned_volume`, in chunks of rays.

    Args:
        distances: points (N, R, S, 3) -> signed distance (N, R, S, 1).
        rays: N x R rays.
        settings: near, far, ``samples_coarse`` and ``max_points``.
        sampling: with ``offset`` the last depth lies one step before far.

    Returns:
        (N, R, S).
    """
    images, count = rays.origins.shape[:2]
    chunk = max(1, settings.max_points // (images * settings.samples_coarse))
    parts = []
    for start in range(0, count, chunk):
        part = rays.part(start, start + chunk)
        parts.append(distances(points_along(part, ray_depths(part, settings, sampling))).squeeze(-1))
    return torch.cat(parts, dim=1)


def check_sdf_settings(settings: RenderSettings) -> None:
    """ValueError for settings that this renderer does not have."""
    if settings.background not in ("none", "last"):
        raise ValueError(f"signed distances are rendered with background none or last, got {settings.background!r}")
    if settings.samples_fine:
        raise ValueError(f"signed distances have no importance samples, got samples_fine={settings.samples_fine}")


def sdf_normals(
    field: DistanceField | BoundField, rays: Rays, output: SdfRenderOutput, max_points: int = 1 << 20
) -> Tensor:
    """Unit normals (N, R, 3), outwards, where the head is seen; zero where the ray meets background.

    A signed distance rises outwards everywhere near the surface, so that its gradient at the mean depth will do; of raw
    densities the gradients are composited, ``max_points`` as in
    :func:`~facelab.rendering.volume_renderer.composited_normals`.
    """
    with_gradient = getattr(field, "with_gradient", None)
    if with_gradient is not None:
        with torch.no_grad():
            depth = output.depth / output.opacity.clamp_min(1e-6)
            values, gradient = with_gradient(points_along(rays, depth), _views(rays))
        if values.sdf is not None:
            return F.normalize(gradient.squeeze(2), dim=-1) * (output.opacity > 0.5)
    assert output.weights is not None and output.t is not None
    front = replace(output, weights=output.weights[..., :-1, :], t=output.t[..., :-1])  # the last one is background
    return composited_normals(field, rays, front, _density, max_points)


def _density(values: FieldOutput) -> Tensor:
    return values.sigma if values.sdf is not None else F.softplus(values.sigma.float())


def _evaluate(
    field: DistanceField | BoundField, points: Tensor, views: Tensor, options: SdfOptions
) -> tuple[FieldOutput, Tensor | None]:
    if options.gradient == "none":
        return field(points, views), None
    if options.gradient == "autograd":
        return gradient_by_autograd(field, points, views)
    with_gradient = getattr(field, "with_gradient", None)
    if with_gradient is None:
        raise ValueError("this field has no with_gradient: use SdfOptions(gradient='autograd')")
    return with_gradient(points, views)


def _views(rays: Rays) -> Tensor:
    return F.normalize(rays.directions, dim=-1) if rays.views is None else rays.views


def _draw_noise(draws: Draws | None, settings: RenderSettings, options: SdfOptions, rays: Rays) -> RayNoise:
    if not settings.jitter and not settings.noisy:
        return RayNoise()
    if draws is None:
        raise ValueError("jitter and sigma_noise need draws=; use settings.deterministic() for none")
    images, count = rays.origins.shape[:2]
    device, samples = rays.origins.device, settings.samples_coarse
    jitter = final = None
    if settings.jitter:
        jitter = draws.uniform("jitter", (images, count, 1 if options.sampling == "offset" else samples), device)
    if settings.noisy:
        final = settings.sigma_noise * draws.normal("final_noise", (images, count, samples, 1), device)
    return RayNoise(jitter=jitter, final=final)
