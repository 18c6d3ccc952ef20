# SPDX-License-Identifier: Apache-2.0
"""Resampling with FIR filters: upfirdn2d and its helpers."""

from __future__ import annotations

from torch import Tensor

from cuda_ops import reference_filters as reference
from cuda_ops.reference_filters import Padding, Pair

upfirdn2d = reference.upfirdn2d


def filter2d(x: Tensor, f: Tensor | None, padding: Padding = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """Filter x (N, C, H, W) and keep its size; ``padding`` is added. Arguments as in :func:`upfirdn2d`."""
    p = reference.filter2d_padding(f, padding)
    return upfirdn2d(x, f, padding=p, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor, f: Tensor | None, up: Pair = 2, padding: Padding = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """(N, C, H, W) -> (N, C, H * up, W * up), brightness kept; ``padding`` is added. Arguments as in :func:`upfirdn2d`."""
    factors = reference.pair(up, "up")
    p = reference.upsample2d_padding(f, factors, padding)
    return upfirdn2d(x, f, up=factors, padding=p, flip_filter=flip_filter, gain=gain * factors[0] * factors[1])


def downsample2d(
    x: Tensor, f: Tensor | None, down: Pair = 2, padding: Padding = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """(N, C, H, W) -> (N, C, H / down, W / down); ``padding`` is added. Arguments as in :func:`upfirdn2d`."""
    factors = reference.pair(down, "down")
    p = reference.downsample2d_padding(f, factors, padding)
    return upfirdn2d(x, f, down=factors, padding=p, flip_filter=flip_filter, gain=gain)
