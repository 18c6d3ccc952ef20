# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling of pictures with gradients of any order, whatever torch has derivatives of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BILINEAR, ZEROS = 0, 0  # of aten.grid_sampler_2d


def grid_sample_2d(x: Tensor, grid: Tensor) -> Tensor:
    """Bilinear reads of x (N, C, H, W) at grid (N, h, w, 2) in [-1, 1] -> (N, C, h, w).

    Zeros outside, corners not aligned (-1 is the outer edge of the first pixel). Gradients of any order: of ``x``
    alone at the speed of torch's own kernels; where ``grid`` needs a gradient, by gathers, which are slower. Torch
    itself has the second order in its newer versions only. Under autocast it runs in the dtype of ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        grid = grid.to(x.dtype)
        if grid.requires_grad and torch.is_grad_enabled():
            return _by_gathers(x, grid)
        sampled: Tensor = _Sample.apply(x, grid)  # type: ignore[assignment]
        return sampled


class _Sample(torch.autograd.Function):
    """Linear in x; its gradient is :class:`_Spread`, whose gradient is this one again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grid,) = ctx.saved_tensors
        return _Spread.apply(gradients[0], grid, ctx.shape), None  # type: ignore[return-value]


class _Spread(torch.autograd.Function):
    """The transpose of :class:`_Sample`: (N, C, h, w) -> (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        unread = dy.new_empty(shape)  # torch looks at its shape alone for this gradient
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(dy.contiguous(), unread, grid, BILINEAR, ZEROS, False, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grid,) = ctx.saved_tensors
        return _Sample.apply(gradients[0], grid), None, None  # type: ignore[return-value]


def _by_gathers(x: Tensor, grid: Tensor) -> Tensor:
    """The same in elementary operations, differentiable to any order in both arguments."""
    height, width = x.shape[2:]
    flat = x.flatten(2)
    px = (grid[..., 0] + 1) * (width / 2) - 0.5
    py = (grid[..., 1] + 1) * (height / 2) - 0.5
    x0, y0 = px.detach().floor(), py.detach().floor()
    total = x.new_zeros(*x.shape[:2], *grid.shape[1:3])
    for right in (0, 1):
        for down in (0, 1):
            column, row = x0 + right, y0 + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            value = flat.gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).unflatten(2, index.shape[1:])
            weight = (px - x0 if right else 1 - (px - x0)) * (py - y0 if down else 1 - (py - y0))
            total = total + value * (weight * inside)[:, None]
    return total
