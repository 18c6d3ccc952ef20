# SPDX-License-Identifier: Apache-2.0
"""Where along its rays a field is evaluated. N images, R rays, S samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.output import BoundField, FieldOutput
from facelab.rendering.integrators import PointAlphaIntegrator
from facelab.rendering.settings import RenderSettings
from facelab.tensors import constant

PDF_EPS = 1e-5


@dataclass(frozen=True)
class SampleSet:
    """Ascending depths ``t`` (N, R, S), their points (N, R, S, 3) and, if known, the field there."""

    t: Tensor
    points: Tensor
    output: FieldOutput | None = None


@dataclass(frozen=True)
class RayNoise:
    """The random numbers of one render, drawn once for all rays so that chunks can slice them.

    Attributes:
        jitter: (N, R, S) uniform, None = no jitter.
        coarse: (N, R, S, 1) normal density noise of the coarse pass, None = none.
        importance: (N, R, S_fine) uniform, None = fixed midpoints.
        final: (N, R, S_all, 1) normal density noise of the final pass, None = none.
        fine: (N, R, S_fine, 1) normal density noise of the importance samples, where noise belongs to the
            sample and not to the pass (EG3D), None = none.
    """

    jitter: Tensor | None = None
    coarse: Tensor | None = None
    importance: Tensor | None = None
    final: Tensor | None = None
    fine: Tensor | None = None

    def part(self, start: int, stop: int) -> RayNoise:
        """The numbers of rays ``start`` to ``stop``."""
        return RayNoise(*(None if x is None else x[:, start:stop] for x in self.tensors()))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.jitter, self.coarse, self.importance, self.final, self.fine

    @staticmethod
    def draw(
        draws: Draws | None,
        settings: RenderSettings,
        images: int,
        rays: int,
        device: torch.device,
        of_samples: bool = False,
    ) -> RayNoise:
        """Draw what ``settings`` ask for. ValueError if they ask for random numbers and ``draws`` is None.

        With ``of_samples`` each sample has one density noise (``coarse_noise``, ``fine_noise``; EG3D), else
        each pass has its own (``coarse_noise``, ``final_noise``; pi-GAN).
        """
        noisy = settings.noisy
        if not settings.jitter and not noisy:
            return RayNoise()
        if draws is None:
            raise ValueError("jitter and sigma_noise need draws=; use settings.deterministic() for none")
        coarse, fine = settings.samples_coarse, settings.samples_fine
        shape = (images, rays)

        def normal(name: str, samples: int, wanted: bool) -> Tensor | None:
            if not (noisy and wanted and samples):
                return None
            return draws.normal(name, (*shape, samples, 1), device) * settings.sigma_noise

        return RayNoise(
            jitter=draws.uniform("jitter", (*shape, coarse), device) if settings.jitter else None,
            coarse=normal("coarse_noise", coarse, bool(fine) or of_samples),
            importance=draws.uniform("importance", (*shape, fine), device) if settings.jitter and fine else None,
            final=normal("final_noise", coarse + fine, not of_samples),
            fine=normal("fine_noise", fine, of_samples),
        )


class RaySampler(Protocol):
    """Places the samples of each ray; may evaluate the field to do so."""

    def __call__(self, rays: Rays, field: BoundField, noise: RayNoise) -> list[SampleSet]: ...


@dataclass(frozen=True)
class StratifiedSampler:
    """Depths evenly spaced over [near, far] inclusive, each moved within its own cell (pi-GAN)."""

    settings: RenderSettings

    def __call__(self, rays: Rays, field: BoundField, noise: RayNoise) -> list[SampleSet]:
        s = self.settings
        t = torch.linspace(s.near, s.far, s.samples_coarse, device=rays.origins.device, dtype=rays.origins.dtype)
        t = t.expand(*rays.origins.shape[:2], -1)
        if noise.jitter is not None:
            t = t + (noise.jitter - 0.5) * (t[..., 1:2] - t[..., 0:1])
        return [SampleSet(t, points_along(rays, t))]


@dataclass(frozen=True)
class HierarchicalSampler:
    """Stratified depths, then as many importance samples as asked for (NeRF section 5.2, pi-GAN)."""

    settings: RenderSettings
    integrator: PointAlphaIntegrator

    def __call__(self, rays: Rays, field: BoundField, noise: RayNoise) -> list[SampleSet]:
        (coarse,) = StratifiedSampler(self.settings)(rays, field, noise)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.coarse_gradient):
            output = field(coarse.points, view_directions(rays, self.settings.lock_view))
        with torch.no_grad():
            weights = self.integrator.weights(coarse.t, output.sigma, noise.coarse).squeeze(-1)
            midpoints = (coarse.t[..., 1:] + coarse.t[..., :-1]) / 2
            t = sample_pdf(midpoints, weights[..., 1:-1] + PDF_EPS, self.settings.samples_fine, noise.importance)
        return [SampleSet(t, points_along(rays, t)), SampleSet(coarse.t, coarse.points, output)]


def view_directions(rays: Rays, lock_view: bool) -> Tensor:
    """The directions a field sees: the rays', or (0, 0, -1) everywhere."""
    if not lock_view:
        return rays.directions
    return constant((0.0, 0.0, -1.0), rays.directions.device).expand_as(rays.directions)


def points_along(rays: Rays, t: Tensor) -> Tensor:
    """Ray parameters (N, R, S) -> world points (N, R, S, 3)."""
    return rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]


def sample_pdf(bins: Tensor, weights: Tensor, count: int, u: Tensor | None = None) -> Tensor:
    """Inverse-CDF samples of a piecewise constant density (NeRF, section 5.2).

    Args:
        bins: (..., B) ascending edges.
        weights: (..., B - 1) non-negative; 1e-5 is added to each.
        count: samples per row.
        u: (..., count) numbers in [0, 1]; None takes the midpoints ``(i + 0.5) / count``.

    Returns:
        (..., count) samples, in the order of ``u``. Gradients do not flow.
    """
    weights = weights + PDF_EPS
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cat([torch.zeros_like(pdf[..., :1]), torch.cumsum(pdf, dim=-1)], dim=-1)
    middles: Tensor = (torch.arange(count, device=bins.device, dtype=bins.dtype) + 0.5) / count
    numbers = middles.expand(*bins.shape[:-1], count) if u is None else u
    index = torch.searchsorted(cdf.contiguous(), numbers.contiguous())
    below = (index - 1).clamp_min(0)
    above = index.clamp_max(bins.shape[-1] - 1)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    gap = cdf_above - cdf_below
    gap = torch.where(gap < PDF_EPS, torch.ones_like(gap), gap)
    low, high = bins.gather(-1, below), bins.gather(-1, above)
    return low + (numbers - cdf_below) / gap * (high - low)
