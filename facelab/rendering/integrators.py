# SPDX-License-Identifier: Apache-2.0
"""Compositing of samples along rays. N images, R rays, S samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.fields.output import FieldOutput
from facelab.rendering.settings import Background
from facelab.rendering.transmittance import cumulative_product

LAST_INTERVAL = 1e10  # a positive last density makes the ray opaque (NeRF, pi-GAN)
TRANSMITTANCE_EPS = 1e-10


@dataclass(frozen=True)
class RenderOutput:
    """What a ray sees.

    Attributes:
        rgb: (N, R, 3) in [0, 1] for backgrounds none, last and white.
        depth: (N, R, 1) weighted sum of ray parameters t, not divided by the opacity.
        opacity: (N, R, 1) sum of weights before ``last`` fills it up.
        semantics: (N, R, K) or None.
        weights: (N, R, S, 1) per-sample weights (after ``last``), per-interval ones of midpoint compositing.
        t: (N, R, S) ray parameters the weights belong to.
        normals: (N, R, 3) unit world vectors or None.
        features: (N, R, C) composited features, or None; the first three are ``rgb`` unless the field has an sdf.
        mean_depth: (N, R, 1) ray parameter divided by the opacity, within the ray's samples, or None.
    """

    rgb: Tensor
    depth: Tensor
    opacity: Tensor
    semantics: Tensor | None = None
    weights: Tensor | None = None
    t: Tensor | None = None
    normals: Tensor | None = None
    features: Tensor | None = None
    mean_depth: Tensor | None = None

    def channels(self) -> Tensor:
        """-> (N, R, K + 3): labels first, then colour."""
        return self.rgb if self.semantics is None else torch.cat([self.semantics, self.rgb], dim=-1)


@dataclass(frozen=True)
class PointAlphaIntegrator:
    """Alpha compositing of point samples whose last interval is infinite (pi-GAN, NeRF equation 3)."""

    density: Literal["relu", "softplus"] = "relu"
    background: Background = "none"

    def activate(self, sigma: Tensor) -> Tensor:
        """Density, float32 and at least 0, of raw density."""
        return F.relu(sigma.float()) if self.density == "relu" else F.softplus(sigma.float())

    def weights(self, t: Tensor, sigma: Tensor, noise: Tensor | None = None) -> Tensor:
        """Per-sample weights (N, R, S, 1) before any background option.

        Args:
            t: (N, R, S) ascending ray parameters.
            sigma: (N, R, S, 1) raw density.
            noise: (N, R, S, 1) added to the raw density, or None.
        """
        activated = self.activate(sigma if noise is None else sigma.float() + noise)
        interval = torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], LAST_INTERVAL)], dim=-1)
        alpha = 1 - torch.exp(-interval[..., None] * activated)
        keep = torch.cat([torch.ones_like(alpha[..., :1, :]), 1 - alpha + TRANSMITTANCE_EPS], dim=-2)
        return alpha * cumulative_product(keep, -2)[..., :-1, :]

    def __call__(self, t: Tensor, values: FieldOutput, noise: Tensor | None = None) -> RenderOutput:
        """Composite the samples of each ray, see :meth:`weights` for the shapes."""
        weights = self.weights(t, values.sigma, noise)
        opacity = weights.sum(dim=-2)
        if self.background == "last":
            weights = torch.cat([weights[..., :-1, :], weights[..., -1:, :] + (1 - opacity)[..., None, :]], dim=-2)
        depth = (weights * t[..., None]).sum(dim=-2)
        rgb = self._composite(weights, values.rgb, opacity)
        semantics = None if values.semantics is None else self._composite(weights, values.semantics, opacity)
        return RenderOutput(rgb, depth, opacity, semantics, weights, t)

    def _composite(self, weights: Tensor, values: Tensor, opacity: Tensor) -> Tensor:
        # a batched product reads the values once and never writes weights * values
        summed = torch.matmul(weights.transpose(-1, -2), values.to(weights.dtype)).squeeze(-2)
        if self.background == "white":
            summed = summed + (1 - opacity)
        elif self.background == "black":
            summed = summed - (1 - opacity)
        return summed
