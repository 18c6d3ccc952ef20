# SPDX-License-Identifier: Apache-2.0
"""How EG3D resizes pictures before a discriminator sees them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import downsample2d, setup_filter, upsample2d

FilterMode = Literal["antialiased", "classic", "none"]
TAPS = (1.0, 3.0, 3.0, 1.0)


def bilinear(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size), pixel centres aligned as areas; half precision is computed in float32."""
    if images.shape[-2:] == (size, size):
        return images
    exact = images if images.dtype == torch.float64 else images.float()
    resized = F.interpolate(exact, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return resized.to(images.dtype)


def filtered_resizing(
    images: Tensor, size: int, mode: FilterMode | float = "antialiased", taps: Tensor | None = None
) -> Tensor:
    """Resize to ``size`` x ``size`` pixels.

    Args:
        images: (N, C, H, W).
        size: pixels.
        mode: ``antialiased``: bilinear with a triangle as wide as a target pixel; ``none``: plain bilinear;
            ``classic``: upsample by two with a filter, bilinear to 2 size + 2, filter and keep every second pixel;
            a number a in [0, 1]: (1 - a) plain + a antialiased.
        taps: the filter of ``classic``, as :func:`cuda_ops.setup_filter` makes it; default [1, 3, 3, 1].

    Raises:
        ValueError: another mode.
    """
    if isinstance(mode, (int, float)):
        if not 0 <= mode <= 1:
            raise ValueError(f"the share of the antialiased picture must lie in [0, 1], got {mode}")
        return (1 - mode) * bilinear(images, size, False) + mode * bilinear(images, size)
    if mode == "antialiased":
        return bilinear(images, size)
    if mode == "none":
        return bilinear(images, size, False)
    if mode != "classic":
        raise ValueError(f"mode must be antialiased, classic, none or a number in [0, 1], got {mode!r}")
    taps = setup_filter(list(TAPS)).to(images.device) if taps is None else taps
    doubled = bilinear(upsample2d(images, taps, up=2), 2 * size + 2, False)
    return downsample2d(doubled, taps, down=2, padding=-1, flip_filter=True)


def blur_taps(sigma: Tensor, reach: Tensor, half: int) -> Tensor:
    """(2 half + 1,) the kernel 2^-(k / sigma)^2 of 2 reach + 1 taps, between zeros; its sum is 1.

    Args:
        sigma: pixels, a scalar. It may change from step to step: no branch depends on it, nor on ``reach``.
        reach: floor(3 sigma), on the same device. (It is not derived here: in single precision a sigma that lies just
            below a third of a whole number gets two taps more.)
        half: taps on each side of the middle one, at least ``reach``.
    """
    places = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float32)
    taps = torch.exp2(-(places / sigma).square())
    taps = torch.where(places.abs() <= reach, taps, torch.zeros_like(taps))
    return taps / taps.sum()
