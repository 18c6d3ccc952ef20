# SPDX-License-Identifier: Apache-2.0
"""Volume rendering: sample, evaluate, merge, composite, in chunks of rays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.output import BoundField, FieldOutput
from facelab.rendering.integrators import PointAlphaIntegrator, RenderOutput
from facelab.rendering.ray_samplers import (
    HierarchicalSampler,
    RayNoise,
    RaySampler,
    SampleSet,
    StratifiedSampler,
    points_along,
    view_directions,
)
from facelab.rendering.settings import RenderSettings

Output = TypeVar("Output", bound=RenderOutput)
GRADIENT_MEMORY = 32  # times that of an evaluation without gradient


def render_rays(
    field: BoundField,
    rays: Rays,
    settings: RenderSettings,
    draws: Draws | None = None,
    keep_weights: bool = False,
) -> RenderOutput:
    """Render N x R rays of a field.

    Without gradient the rays go through in chunks of ``settings.max_points`` evaluations, so that memory
    depends on neither image size nor samples per ray; chunks slice one full draw, so that chunking does
    not change the result. With gradient and ``settings.recompute`` each chunk is recomputed in the backward.

    Args:
        field: callable (points, directions) -> FieldOutput.
        rays: N x R rays.
        settings: near, far, sample counts, background ...
        draws: random numbers ``jitter``, ``coarse_noise``, ``importance``, ``final_noise``.
        keep_weights: return per-sample weights and depths too.

    Returns:
        RenderOutput with (N, R, ...) tensors.
    """
    integrator = PointAlphaIntegrator(settings.density, settings.background)
    sampler: RaySampler = StratifiedSampler(settings)
    if settings.samples_fine:
        sampler = HierarchicalSampler(settings, PointAlphaIntegrator(settings.density))
    images, count = rays.origins.shape[:2]
    noise = RayNoise.draw(draws, settings, images, count, rays.origins.device)

    def chunk(part: Rays, part_noise: RayNoise) -> RenderOutput:
        return _render_chunk(field, part, part_noise, settings, sampler, integrator, keep_weights)

    return render_chunks(chunk, rays, noise, settings)


def render_chunks(
    function: Callable[[Rays, RayNoise], Output], rays: Rays, noise: RayNoise, settings: RenderSettings
) -> Output:
    """Apply a function of rays and their random numbers in the chunks described in :func:`render_rays`."""
    images, count = rays.origins.shape[:2]
    per_ray = images * max(settings.samples_coarse, settings.samples_fine)
    chunk = max(1, settings.max_points // max(per_ray, 1))
    recording = torch.is_grad_enabled()
    if chunk >= count or (recording and not settings.recompute):
        return function(rays, noise)
    parts = []
    for start in range(0, count, chunk):
        part = rays.part(start, start + chunk), noise.part(start, start + chunk)
        if recording:
            parts.append(checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*part))
    return _cat_outputs(parts)


def _render_chunk(
    field: BoundField,
    rays: Rays,
    noise: RayNoise,
    settings: RenderSettings,
    sampler: RaySampler,
    integrator: PointAlphaIntegrator,
    keep_weights: bool,
) -> RenderOutput:
    directions = view_directions(rays, settings.lock_view)
    t, values = merge_samples(sampler(rays, field, noise), field, directions)
    output = integrator(t, values, noise.final)
    if settings.normals:
        normals = composited_normals(
            field, rays, output, lambda values: integrator.activate(values.sigma), settings.max_points
        )
        output = replace(output, normals=normals)
    return output if keep_weights else replace(output, weights=None, t=None)


def merge_samples(sets: list[SampleSet], field: BoundField, directions: Tensor) -> tuple[Tensor, FieldOutput]:
    """Evaluate what is not yet evaluated and sort all samples of each ray by depth."""
    outputs = [s.output if s.output is not None else field(s.points, directions) for s in sets]
    if len(sets) == 1:
        return sets[0].t, outputs[0]
    t, order = torch.sort(torch.cat([s.t for s in sets], dim=-1), dim=-1)
    return t, FieldOutput.cat(outputs).select(order)


def composited_normals(
    field: BoundField,
    rays: Rays,
    output: RenderOutput,
    density: Callable[[FieldOutput], Tensor],
    max_points: int,
) -> Tensor:
    """Unit normals (N, R, 3): the weighted sum of -grad density over the samples; zero where the ray is empty.

    The gradient at the mean depth alone would say little: it lies behind the surface, where densities rise and fall.

    Args:
        field: callable (points, directions) -> FieldOutput.
        rays: (N, R).
        output: of these rays, with weights (N, R, S, 1) and their ray parameters t (N, R, S).
        density: what compositing makes of a field's values, (..., 1) at least 0.
        max_points: evaluations that fit without gradient; with it every layer is kept, so that fewer go at a time.
    """
    assert output.weights is not None and output.t is not None
    total = torch.zeros_like(rays.origins)
    count = max(1, max_points // GRADIENT_MEMORY // (rays.origins.shape[0] * rays.origins.shape[1]))
    for t, weights in zip(output.t.split(count, -1), output.weights.split(count, 2), strict=True):
        with torch.enable_grad():
            points = points_along(rays, t).detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(density(field(points, rays.directions)).sum(), points)
        total = total - (weights.detach() * gradient).sum(2)
    return torch.nn.functional.normalize(total, dim=-1) * (output.opacity.detach() > 0.5)


def _cat_outputs(parts: list[Output]) -> Output:
    def cat(name: str) -> Tensor | None:
        tensors = [getattr(p, name) for p in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=1)

    kind = type(parts[0])
    values: dict[str, Any] = {field.name: cat(field.name) for field in fields(kind)}
    return kind(**values)
