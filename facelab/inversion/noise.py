# SPDX-License-Identifier: Apache-2.0
"""Noise maps as unknowns: they must stay noise, or they take the picture over (StyleGAN2's projector, arXiv 1912.04958)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 8  # pixels: maps of this side and less are not halved further


def noise_correlation(noise: Tensor) -> Tensor:
    """How much a map resembles itself shifted by a pixel, at all scales -> (N,).

    Args:
        noise: (N, 1, H, W), square; at every scale down to 8 pixels, squared means of products with the neighbour to
            the right and below are summed.
    """
    return noise_correlations([noise])


def noise_correlations(maps: Sequence[Tensor]) -> Tensor:
    """:func:`noise_correlation` summed over maps of several sizes -> (N,); maps of one side go together at every scale.

    ValueError for no maps or another shape.
    """
    by_side: dict[int, list[Tensor]] = {}
    for noise in maps:
        if noise.ndim != 4 or noise.shape[1] != 1:
            raise ValueError(f"noise maps must be (N, 1, H, W), got {tuple(noise.shape)}")
        by_side.setdefault(noise.shape[-1], []).append(noise)
    if not by_side:
        raise ValueError("no noise maps, expected at least one")
    total = maps[0].new_zeros(len(maps[0]))
    while by_side:
        side = max(by_side)
        stack = torch.cat(by_side.pop(side), dim=1)
        for axis in (3, 2):
            total = total + (stack * stack.roll(1, axis)).mean(dim=(2, 3)).square().sum(1)
        if side > SMALLEST:
            half = F.avg_pool2d(stack, 2)
            by_side.setdefault(half.shape[-1], []).append(half)
    return total


@torch.no_grad()
def normalise_noise(noise: Tensor, unless: Tensor | None = None) -> None:
    """Each map of (N, 1, H, W) to mean 0, then mean square 1, in place.

    Args:
        unless: a scalar on the maps' device; above 0 they stay as they are.
    """
    centred = noise - noise.mean(dim=(1, 2, 3), keepdim=True)
    found = centred * centred.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
    noise.copy_(found if unless is None else torch.where(unless > 0, noise, found))
