# SPDX-License-Identifier: Apache-2.0
"""Trilinear lookup in a latent grid, float32, with first-order gradients of grid and points.

The kernel reads the C channels of a cell in one coalesced access, so the grid is best kept in
``torch.channels_last_3d``; another layout is copied at each call. The gradient of the grid is summed
by atomics: its last bits vary between runs. The twin is :func:`cuda_ops.reference.grid_lookup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_ops import dispatch, reference

CHANNELS = (16, 32, 64)  # channel counts the kernels are written for
TILE = 64  # rows of one program


@dataclass(frozen=True)
class Slab:
    """A run of points of some scenes, as the kernels see it."""

    scene0: int
    scenes: int
    p0: int  # first point of each scene
    count: int  # points of each scene
    rows_per_scene: int  # count and padding

    @property
    def rows(self) -> int:
        return self.scenes * self.rows_per_scene


def channels_last(grid: Tensor) -> Tensor:
    """(1, C, D, H, W) -> contiguous float32 (D, H, W, C); a view when the grid is channels-last."""
    return grid.detach()[0].permute(1, 2, 3, 0).float().contiguous()


def scatter(
    cells: Tensor,
    points: Tensor,
    gradient: Tensor,
    unscale: Tensor,
    slab: Slab,
    scale: float,
    grid_gradient: Tensor | None,
    point_gradient: Tensor | None,
) -> None:
    """Add ``gradient`` (rows, C) * unscale to grid_gradient (D, H, W, C) and point_gradient (N, P, 3)."""
    from cuda_ops.grid_kernels import read_backward

    if grid_gradient is None and point_gradient is None:
        return
    d, h, w, c = cells.shape
    read_backward[(slab.rows // TILE,)](
        cells, points, gradient, unscale, grid_gradient, point_gradient,
        points.shape[1], slab.p0, slab.count, slab.scene0, slab.rows_per_scene // TILE, scale,
        C=c, D=d, H=h, W=w, GRID=grid_gradient is not None, POINTS=point_gradient is not None,
        BM=TILE, num_warps=4,  # type: ignore[call-arg]
    )  # fmt: skip


def refuse_second_order(op: str, remedy: str) -> None:
    """Called in a backward: RuntimeError when a graph of the gradients is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first-order gradients only, but create_graph=True asks for more; {remedy}")


class _GridLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, points: Tensor) -> Tensor:
        from cuda_ops.grid_kernels import read

        cells = channels_last(grid)
        d, h, w, c = cells.shape
        flat = points.detach().float().reshape(1, -1, 3).contiguous()
        slab = Slab(0, 1, 0, flat.shape[1], -(-flat.shape[1] // TILE) * TILE)
        out = torch.empty(slab.rows, c, device=flat.device)
        read[(slab.rows // TILE,)](
            cells, flat, None, None, out,
            flat.shape[1], 0, slab.count, 0, slab.rows // TILE, 1, 1.0,
            C=c, D=d, H=h, W=w, E=c, USE_DIRECTIONS=False, WRITE16=False, WRITE32=True, BM=TILE, num_warps=4,  # type: ignore[call-arg]
        )  # fmt: skip
        ctx.save_for_backward(grid, points)
        ctx.slab = slab
        return out[: slab.count].reshape(*points.shape[:-1], c)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_order("grid_lookup", "set FACELAB_OPS=reference")
        grid, points = ctx.saved_tensors
        cells = channels_last(grid)
        flat = points.detach().float().reshape(1, -1, 3).contiguous()
        padded = torch.zeros(ctx.slab.rows, cells.shape[-1], device=grad.device)
        padded[: ctx.slab.count] = grad.reshape(-1, cells.shape[-1])
        d_cells = torch.zeros_like(cells) if ctx.needs_input_grad[0] else None
        d_flat = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        scatter(cells, flat, padded, torch.ones((), device=grad.device), ctx.slab, 1.0, d_cells, d_flat)
        d_grid = None if d_cells is None else d_cells.permute(3, 0, 1, 2)[None].to(grid.dtype)
        return d_grid, None if d_flat is None else d_flat.reshape(points.shape).to(points.dtype)


def problem(grid: Tensor) -> str | None:
    """Why the kernels cannot read ``grid``, or None."""
    if grid.ndim != 5 or grid.shape[0] != 1:
        return f"the grid has shape {tuple(grid.shape)}, expected (1, C, D, H, W)"
    if grid.shape[1] not in CHANNELS:
        return f"the grid has {grid.shape[1]} channels, the kernels take {CHANNELS}"
    return None


def grid_lookup(grid: Tensor, points: Tensor) -> Tensor:
    """Trilinear lookup, zero outside [-1, 1], corners aligned; float32 whatever the autocast.

    Args:
        grid: (1, C, D, H, W), best in ``torch.channels_last_3d``; x runs along W, y along H, z along D.
        points: (..., 3).

    Returns:
        (..., C) float32.

    Raises:
        RuntimeError: second derivatives were asked for, or FACELAB_OPS demands a kernel that cannot run.
    """
    if points.numel() == 0 or dispatch.choose("grid_lookup", points.device, problem(grid)) == "reference":
        with torch.autocast(points.device.type, enabled=False):
            return reference.grid_lookup(grid.float(), points.float())
    with torch.cuda.device_of(points):
        return _GridLookup.apply(grid, points)
