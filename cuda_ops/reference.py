# SPDX-License-Identifier: Apache-2.0
"""Plain torch twins of the kernels: the specification, the fallback and the test oracle.

Every function works in the dtype of its inputs (float64 for gradcheck) and has all derivatives.
Shape legend: N scenes, R rays, S samples per ray, P = R * S points, h hidden width, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = tuple[Tensor, Tensor]  # weight (out, in), bias (out,)


def film_sine_linear(x: Tensor, weight: Tensor, bias: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """sin(f * (x W^T + b) + p): x (N, P, in), weight (out, in), frequency and phase (N, out) -> (N, P, out)."""
    return torch.sin(frequency[:, None] * F.linear(x, weight, bias) + phase[:, None])


def grid_lookup(grid: Tensor, points: Tensor) -> Tensor:
    """Trilinear lookup, zero outside [-1, 1], corners aligned.

    Args:
        grid: (1, C, D, H, W); a point's x runs along W, y along H, z along D.
        points: (..., 3).

    Returns:
        (..., C).
    """
    where = points.reshape(1, 1, 1, -1, 3)
    values = F.grid_sample(grid, where, mode="bilinear", padding_mode="zeros", align_corners=True)
    return values.reshape(grid.shape[1], -1).t().reshape(*points.shape[:-1], grid.shape[1])


def fold_linear_chain(chain: Sequence[Linear]) -> Linear:
    """Plain linear maps in a row -> the one map that they are (exact algebra, differentiable)."""
    weight, bias = chain[0]
    for next_weight, next_bias in chain[1:]:
        bias = next_weight @ bias + next_bias
        weight = next_weight @ weight
    return weight, bias


def film_siren_field(
    points: Tensor,
    directions: Tensor | None,
    film: tuple[Tensor, Tensor, Tensor, Tensor],
    grid: Tensor | None,
    geometry: Sequence[Linear],
    sigma: Linear,
    color: Sequence[Linear],
    rgb: Linear | None,
    labels: Linear | None,
    scale: float = 1.0,
    grid_in_geometry: bool = False,
) -> Tensor:
    """The FiLM-SIREN field (pi-GAN, arXiv 2012.00926; FENeRF, arXiv 2111.15490).

    Args:
        points: (N, R, S, 3); multiplied by ``scale`` before use.
        directions: (N, R, 3), or None when the colour branch does not see them.
        film: geometry frequencies and phases (N, L, h), colour frequencies and phases (N, C, h).
        grid: (1, G, D, H, W) latent grid, read at the scaled points, or None.
        geometry: L layers, the first takes [grid, point] or the point.
        sigma: density head (1, h).
        color: C layers, the first takes [direction, grid, feature], what is there of it.
        rgb: colour head (3, h), followed by a sigmoid; None together with an empty ``color``.
        labels: label head (K, h), or None.
        grid_in_geometry: the grid enters the first geometry layer instead of the first colour layer.

    Returns:
        (N, R * S, K + 3 + 1): labels, colour in [0, 1], raw density; (N, R * S, 1) density alone without ``rgb``.
    """
    n, rays, samples = points.shape[:3]
    warped = (points * scale).flatten(1, 2)
    values = None if grid is None else grid_lookup(grid, warped)
    feature = warped if values is None or not grid_in_geometry else torch.cat([values, warped], dim=-1)
    for i, (weight, bias) in enumerate(geometry):
        feature = film_sine_linear(feature, weight, bias, film[0][:, i], film[1][:, i])
    density = F.linear(feature, *sigma)
    if rgb is None:
        return density
    parts = [feature]
    if values is not None and not grid_in_geometry:
        parts.insert(0, values)
    if directions is not None:
        parts.insert(0, directions[:, :, None].expand(n, rays, samples, 3).flatten(1, 2))
    hidden = torch.cat(parts, dim=-1)
    for i, (weight, bias) in enumerate(color):
        hidden = film_sine_linear(hidden, weight, bias, film[2][:, i], film[3][:, i])
    outputs = [torch.sigmoid(F.linear(hidden, *rgb)), density]
    if labels is not None:
        outputs.insert(0, F.linear(feature, *labels))
    return torch.cat(outputs, dim=-1)
