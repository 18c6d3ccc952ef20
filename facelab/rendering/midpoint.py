# SPDX-License-Identifier: Apache-2.0
"""EG3D's volume rendering: importance samples and compositing of the intervals between samples.

N images, R rays, S samples per ray, C channels of features (arXiv 2112.07945, supplement; the
compositing rule is that of mip-NeRF's follow-ups: colour and density of an interval are the means of
its ends).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.output import BoundField, FieldOutput
from facelab.rendering.integrators import TRANSMITTANCE_EPS, RenderOutput
from facelab.rendering.ray_samplers import RayNoise, SampleSet, points_along, sample_pdf
from facelab.rendering.settings import RenderSettings
from facelab.rendering.transmittance import cumulative_product
from facelab.rendering.volume_renderer import composited_normals, render_chunks

DENSITY_SHIFT = 1.0  # subtracted from raw density before the softplus
IMPORTANCE_FLOOR = 0.01  # added to the blurred weights that place the fine samples
MISS = (-1.0, -2.0)  # entry and exit of a ray that misses the box


@dataclass(frozen=True)
class MidpointIntegrator:
    """Compositing of the S - 1 intervals between S samples.

    An interval's density is softplus(mean of the raw densities of its ends - 1), its colour the mean of
    theirs. ``white`` adds the missing opacity to every channel.
    """

    white: bool = False
    batch_range: bool = False  # clamp depths to the range of the whole batch (the original), not of each ray

    def weights(self, t: Tensor, sigma: Tensor) -> Tensor:
        """Weights (N, R, S - 1) of the intervals from ascending t (N, R, S) and raw densities (N, R, S, 1)."""
        sigma = sigma.squeeze(-1).float()
        density = F.softplus((sigma[..., :-1] + sigma[..., 1:]) / 2 - DENSITY_SHIFT)
        alpha = 1 - torch.exp(-density * (t[..., 1:] - t[..., :-1]))
        keep = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + TRANSMITTANCE_EPS], dim=-1)
        return alpha * cumulative_product(keep, -1)[..., :-1]

    def __call__(self, samples: Sequence[tuple[Tensor, FieldOutput]]) -> RenderOutput:
        """Composite one or more sets of (t (N, R, S_i), values there), merged by depth.

        Only densities are sorted: the weights go back to the sets, whose features are read where they are.
        """
        order: Tensor | None = None
        t, sigma = samples[0][0], samples[0][1].sigma
        if len(samples) > 1:
            found = torch.sort(torch.cat([t for t, _ in samples], dim=-1), dim=-1)
            t, order = found.values, found.indices
            sigma = torch.cat([values.sigma for _, values in samples], dim=2).gather(2, found.indices[..., None])
        weights = self.weights(t, sigma)
        # sum_i w_i (c_i + c_i+1) / 2 as a sum over the samples
        of_samples = (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2
        if order is not None:
            of_samples = torch.empty_like(of_samples).scatter(-1, order, of_samples)
        opacity = weights.sum(-1, keepdim=True)
        parts = zip(of_samples.split([s[0].shape[-1] for s in samples], -1), samples, strict=True)
        features = torch.stack([_sum(part, values) for part, (_, values) in parts]).sum(0)
        if self.white:
            features = features + (1 - opacity)
        middle = (t[..., :-1] + t[..., 1:]) / 2
        depth = (weights * middle).sum(-1, keepdim=True)
        return RenderOutput(
            rgb=features[..., :3],
            depth=depth,
            opacity=opacity,
            weights=weights[..., None],
            t=middle,
            features=features,
            mean_depth=self._mean_depth(depth, opacity, t),
        )

    def _mean_depth(self, depth: Tensor, opacity: Tensor, t: Tensor) -> Tensor:
        near, far = t[..., :1], t[..., -1:]
        if self.batch_range:
            near, far = near.amin(), far.amax()
        empty = opacity <= 0
        mean = depth / torch.where(empty, torch.ones_like(opacity), opacity)
        return torch.clamp(torch.where(empty, far, mean), near, far)


def _sum(weights: Tensor, values: FieldOutput) -> Tensor:
    """Weights (N, R, S) of samples -> the weighted sum (N, R, C) of their features, or of their rgb."""
    channels = values.rgb if values.features is None else values.features
    return torch.matmul(weights[..., None, :], channels.to(weights.dtype)).squeeze(-2)


@dataclass(frozen=True)
class ImportanceSampler:
    """Even depths moved forward by up to one cell, then importance samples of the blurred coarse weights.

    The coarse samples come back evaluated; the fine ones do not. Without random numbers the depths
    lie in the middle of their cells.
    """

    settings: RenderSettings
    integrator: MidpointIntegrator

    def __call__(self, rays: Rays, field: BoundField, noise: RayNoise) -> list[SampleSet]:
        t = self.coarse_depths(rays, noise.jitter)
        points = points_along(rays, t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.coarse_gradient):
            values = add_noise(field(points, rays.directions), noise.coarse)
        coarse = SampleSet(t, points, values)
        if not self.settings.samples_fine:
            return [coarse]
        with torch.no_grad():
            weights = self.integrator.weights(t, values.sigma)
            fine = self.fine_depths(t, weights, noise.importance)
        return [coarse, SampleSet(fine, points_along(rays, fine))]

    def coarse_depths(self, rays: Rays, jitter: Tensor | None) -> Tensor:
        """Ray parameters (N, R, S); ``jitter`` (N, R, S) in [0, 1) moves each by that much of a cell, None by half.

        The last sample may lie beyond the far end, as in the original.
        """
        s, like = self.settings, rays.origins
        step = torch.linspace(0, 1, s.samples_coarse, device=like.device, dtype=like.dtype)
        step = (step + (0.5 if jitter is None else jitter) / (s.samples_coarse - 1)).expand(*like.shape[:2], -1)
        if rays.limits is None:
            near, far = s.near, s.far
        else:
            near, far = rays.limits[..., :1], rays.limits[..., 1:]
        if s.spacing == "disparity":
            return 1 / (1 / near * (1 - step) + 1 / far * step)
        return near + step * (far - near)

    def fine_depths(self, t: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        """Importance samples (N, R, S_fine), unsorted, from interval weights (N, R, S - 1)."""
        wide = F.max_pool1d(weights, 2, stride=1, padding=1)
        blurred = F.avg_pool1d(wide, 2, stride=1) + IMPORTANCE_FLOOR
        middle = (t[..., :-1] + t[..., 1:]) / 2
        # the inner weights belong to the intervals between all midpoints but the last (the original's pairing)
        return sample_pdf(middle[..., :-1], blurred[..., 1:-1], self.settings.samples_fine, u)


def add_noise(values: FieldOutput, noise: Tensor | None) -> FieldOutput:
    """Add normal noise (N, R, S, 1) to raw density."""
    return values if noise is None else replace(values, sigma=values.sigma + noise)


def render_midpoints(
    field: BoundField,
    rays: Rays,
    settings: RenderSettings,
    draws: Draws | None = None,
    keep_weights: bool = False,
) -> RenderOutput:
    """EG3D's renderer: coarse samples, importance samples, midpoint compositing.

    Chunks as in :func:`~facelab.rendering.volume_renderer.render_rays`; with ``settings.reference`` all rays go
    at once, because the original's depth clamp looks at the whole batch.

    Args:
        field: callable (points, directions) -> FieldOutput; its features are composited if it has any.
        rays: N x R rays; their ``limits``, where set, replace near and far.
        settings: near, far, ``spacing``, ``box_side``, sample counts, background ``none`` or ``white``.
        draws: random numbers ``jitter``, ``importance`` and, for ``sigma_noise``, ``coarse_noise``, ``fine_noise``.
        keep_weights: return interval weights and midpoints too.

    Returns:
        RenderOutput with (N, R, ...) tensors; features and rgb in about [0, 1].

    Raises:
        ValueError: another background, fewer than 4 coarse samples for importance sampling, or no draws
            where settings ask for them.
    """
    check_midpoint_settings(settings)
    images, count = rays.origins.shape[:2]
    noise = RayNoise.draw(draws, settings, images, count, rays.origins.device, of_samples=True)
    rays = limit_rays(rays, settings)
    integrator = MidpointIntegrator(settings.background == "white", settings.reference)
    sampler = ImportanceSampler(settings, integrator)

    def chunk(part: Rays, part_noise: RayNoise) -> RenderOutput:
        samples = []
        for index, found in enumerate(sampler(part, field, part_noise)):
            values = found.output
            if values is None:
                values = add_noise(field(found.points, part.directions), part_noise.fine if index else None)
            samples.append((found.t, values))
        output = integrator(samples)
        if settings.normals:
            output = replace(output, normals=composited_normals(field, part, output, _density, settings.max_points))
        return output if keep_weights else replace(output, weights=None, t=None)

    return chunk(rays, noise) if settings.reference else render_chunks(chunk, rays, noise, settings)


def _density(values: FieldOutput) -> Tensor:
    return F.softplus(values.sigma.float() - DENSITY_SHIFT)


def check_midpoint_settings(settings: RenderSettings) -> None:
    """ValueError for settings that midpoint compositing does not have."""
    if settings.background not in ("none", "white"):
        raise ValueError(f"midpoint compositing has the backgrounds none and white, got {settings.background!r}")
    if settings.samples_fine and settings.samples_coarse < 4:
        raise ValueError(f"importance samples need samples_coarse >= 4, got {settings.samples_coarse}")


def limit_rays(rays: Rays, settings: RenderSettings) -> Rays:
    """Fill in ``limits`` where ``settings.box_side`` asks for it and the rays have none.

    Rays that miss the box get the nearest entry and the farthest exit of those that hit it (the original,
    with ``settings.reference``: the farthest ENTRY); without any hit, near and far.
    """
    if settings.box_side is None or rays.limits is not None:
        return rays
    entry, leave = ray_box(rays, settings.box_side)
    hit = leave > entry
    infinity = torch.full_like(entry, torch.inf)
    first = torch.where(hit, entry, infinity).amin()
    last = torch.where(hit, entry if settings.reference else leave, -infinity).amax()
    any_hit = hit.any()
    first = torch.where(any_hit, first, torch.full_like(first, MISS[0] if settings.reference else settings.near))
    last = torch.where(any_hit, last, torch.full_like(last, MISS[1] if settings.reference else settings.far))
    limits = torch.cat([torch.where(hit, entry, first), torch.where(hit, leave, last)], dim=-1)
    return replace(rays, limits=limits)


def ray_box(rays: Rays, side: float) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the cube of this side around the origin -> two (N, R, 1), -1 and -2 for a miss.

    The whole line counts: a parameter may be negative.
    """
    a, b = ((sign * side / 2 - rays.origins) / rays.directions for sign in (-1, 1))
    # 0 / 0: the ray runs within a face, which bounds nothing
    entry = torch.minimum(a, b).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(-1, keepdim=True)
    leave = torch.maximum(a, b).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(-1, keepdim=True)
    missed = entry > leave
    return entry.masked_fill(missed, MISS[0]), leave.masked_fill(missed, MISS[1])
