# SPDX-License-Identifier: Apache-2.0
"""sRGB pictures to CIE Lab and back (D65), with derivatives that are finite everywhere.

Nothing is clamped: renders leave 0..1, and a clamp would leave them without gradient. Below 0.04045, negative values
included, sRGB is linear. The branch of a power that is not taken works on a harmless base, so that its derivative is a
number that ``where`` can drop.
"""

from __future__ import annotations

import torch
from torch import Tensor

XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
CUBE, SLOPE, SHIFT = 0.008856, 7.787, 4 / 29  # below CUBE, Lab's cube root is a line


def linear(pictures: Tensor) -> Tensor:
    """sRGB, white = 1 -> linear light; any shape."""
    bright = pictures > 0.04045
    base = torch.where(bright, (pictures + 0.055) / 1.055, torch.ones_like(pictures))
    return torch.where(bright, base**2.4, pictures / 12.92)


def lightness(pictures: Tensor) -> Tensor:
    """Lab lightness over 100.

    Args:
        pictures: (N, 3, H, W) sRGB, 0..1 and beyond.

    Returns:
        (N, 1, H, W); 1 for white. ValueError for another shape.
    """
    y = _weighted(linear(_checked(pictures)), XYZ[1], 1.0)
    return (116 * _root(y) - 16) / 100


def lab(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) sRGB, 0..1 and beyond -> (N, 3, H, W) CIE Lab: L 0..100, a, b."""
    light = linear(_checked(pictures))
    x, y, z = (_root(_weighted(light, row, white)) for row, white in zip(XYZ, WHITE, strict=True))
    return torch.cat([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def srgb_from_lab(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) CIE Lab -> sRGB; colours outside sRGB leave 0..1."""
    level, a, b = pictures.split(1, dim=1)
    fy = (level + 16) / 116
    roots = (fy + a / 500, fy, fy - b / 200)
    edge = CUBE ** (1 / 3)
    xyz = torch.cat([torch.where(f > edge, f**3, (f - SHIFT) / SLOPE) * w for f, w in zip(roots, WHITE)], dim=1)
    inverse = torch.linalg.inv(torch.tensor(XYZ, dtype=torch.float64)).to(xyz)
    light = torch.einsum("ij,njhw->nihw", inverse, xyz)
    bright = light > 0.0031308
    base = torch.where(bright, light, torch.ones_like(light))
    return torch.where(bright, 1.055 * base ** (1 / 2.4) - 0.055, 12.92 * light)


def with_lightness(pictures: Tensor, level: Tensor) -> Tensor:
    """(N, 3, H, W) sRGB pictures with their lightness replaced by ``level`` (N, 1, H, W) in 0..1; not clamped."""
    colours = lab(pictures)
    return srgb_from_lab(torch.cat([100 * level, colours[:, 1:]], dim=1))


def _root(t: Tensor) -> Tensor:
    high = t > CUBE
    base = torch.where(high, t, torch.ones_like(t))
    return torch.where(high, base ** (1 / 3), SLOPE * t + SHIFT)


def _weighted(pictures: Tensor, weights: tuple[float, ...], white: float) -> Tensor:
    r, g, b = pictures.split(1, dim=1)
    return (weights[0] * r + weights[1] * g + weights[2] * b) / white


def _checked(pictures: Tensor) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(f"pictures must be float (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    return pictures
