# SPDX-License-Identifier: Apache-2.0
"""Noise maps as unknowns: they must stay noise, or they take the picture over (StyleGAN2's projector, arXiv 1912.04958)."""

from __future__ import annotations

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
    if noise.ndim != 4 or noise.shape[1] != 1:
        raise ValueError(f"noise maps must be (N, 1, H, W), got {tuple(noise.shape)}")
    total = noise.new_zeros(len(noise))
    while True:
        for axis in (3, 2):
            total = total + (noise * noise.roll(1, axis)).mean(dim=(1, 2, 3)).square()
        if noise.shape[-1] <= SMALLEST:
            return total
        noise = F.avg_pool2d(noise, 2)


@torch.no_grad()
def normalise_noise(noise: Tensor) -> None:
    """Each map of (N, 1, H, W) to mean 0, then mean square 1, in place."""
    noise.sub_(noise.mean(dim=(1, 2, 3), keepdim=True))
    noise.mul_(noise.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt())
