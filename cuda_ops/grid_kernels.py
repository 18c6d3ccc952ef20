# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of :mod:`cuda_ops.grid_lookup`: trilinear reads of a channels-last grid. Imports Triton.

Slab rows and padding are those of :mod:`cuda_ops.siren_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _axis(x, SIZE: tl.constexpr):
    """Coordinate in [-1, 1] -> lower cell and fraction; far away points are pulled to just outside."""
    at = tl.minimum(tl.maximum((x + 1.0) * (0.5 * (SIZE - 1)), -2.0), SIZE + 1.0)
    low = tl.floor(at)
    return low.to(tl.int32), at - low


@triton.jit
def _corner(a, b, c, D: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Cell number of (z, y, x) = (a, b, c) and whether it is inside the grid."""
    inside = (a >= 0) & (a < D) & (b >= 0) & (b < H) & (c >= 0) & (c < W)
    return (a * H + b) * W + c, inside


@triton.jit
def read(
    grid, points, directions, out16, out32,
    p_total, p0, count, scene0, tiles_per_scene, samples, scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
    USE_DIRECTIONS: tl.constexpr, WRITE16: tl.constexpr, WRITE32: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out16 (rows, E) float16 = [grid values C | direction 3 | scaled point 3 | 0]; out32 (rows, C) float32.

    grid (D, H, W, C) float32; points (N, p_total, 3); directions (N, p_total / samples, 3). Padding rows are 0.
    """
    tile = tl.program_id(0)
    scene = (scene0 + tile // tiles_per_scene).to(tl.int64)
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    real = i < count
    point = scene * p_total + p0 + i
    c = tl.arange(0, E)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    value = tl.zeros((BM, E), dtype=tl.float32)
    if C > 0:
        x, fx = _axis(tl.load(points + point * 3, mask=real, other=0.0) * scale, W)
        y, fy = _axis(tl.load(points + point * 3 + 1, mask=real, other=0.0) * scale, H)
        z, fz = _axis(tl.load(points + point * 3 + 2, mask=real, other=0.0) * scale, D)
        for dz in tl.static_range(2):
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    cell, inside = _corner(z + dz, y + dy, x + dx, D, H, W)
                    w = (fx if dx else 1.0 - fx) * (fy if dy else 1.0 - fy) * (fz if dz else 1.0 - fz)
                    mask = (inside & real)[:, None] & (c < C)[None, :]
                    at = grid + cell.to(tl.int64)[:, None] * C + c[None, :]
                    value += w[:, None] * tl.load(at, mask=mask, other=0.0)
    if WRITE32:
        tl.store(out32 + rows[:, None] * C + c[None, :], value, mask=(c < C)[None, :])
    if WRITE16:
        p = c - C - 3
        at = points + point[:, None] * 3 + p[None, :]
        value += tl.load(at, mask=real[:, None] & ((p >= 0) & (p < 3))[None, :], other=0.0) * scale
        if USE_DIRECTIONS:
            v = c - C
            ray = scene * (p_total // samples) + (p0 + i) // samples
            at = directions + ray[:, None] * 3 + v[None, :]
            value += tl.load(at, mask=real[:, None] & ((v >= 0) & (v < 3))[None, :], other=0.0)
        tl.store(out16 + rows[:, None] * E + c[None, :], value.to(tl.float16))


@triton.jit
def read_backward(
    grid, points, gradient, unscale, grid_gradient, point_gradient,
    p_total, p0, count, scene0, tiles_per_scene, scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    GRID: tl.constexpr, POINTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Scatter ``gradient`` (rows, C) * unscale into the grid (GRID) and add to point_gradient (POINTS).

    ``unscale`` is a device scalar; point_gradient (N, p_total, 3) float32 is that of the unscaled points.
    """
    tile = tl.program_id(0)
    scene = (scene0 + tile // tiles_per_scene).to(tl.int64)
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    real = i < count
    at = points + (scene * p_total + p0 + i) * 3
    x, fx = _axis(tl.load(at, mask=real, other=0.0) * scale, W)
    y, fy = _axis(tl.load(at + 1, mask=real, other=0.0) * scale, H)
    z, fz = _axis(tl.load(at + 2, mask=real, other=0.0) * scale, D)
    c = tl.arange(0, C)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    g = tl.load(gradient + rows[:, None] * C + c[None, :]).to(tl.float32) * tl.load(unscale)
    gx = tl.zeros((BM,), dtype=tl.float32)
    gy = tl.zeros((BM,), dtype=tl.float32)
    gz = tl.zeros((BM,), dtype=tl.float32)
    for dz in tl.static_range(2):
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                cell, inside = _corner(z + dz, y + dy, x + dx, D, H, W)
                wx = fx if dx else 1.0 - fx
                wy = fy if dy else 1.0 - fy
                wz = fz if dz else 1.0 - fz
                mask = (inside & real)[:, None] & (c < C)[None, :]
                where = cell.to(tl.int64)[:, None] * C + c[None, :]
                if GRID:
                    tl.atomic_add(grid_gradient + where, (wx * wy * wz)[:, None] * g, mask=mask, sem="relaxed")
                if POINTS:
                    dot = tl.sum(g * tl.load(grid + where, mask=mask, other=0.0), axis=1)
                    gx += (2 * dx - 1) * wy * wz * dot
                    gy += wx * (2 * dy - 1) * wz * dot
                    gz += wx * wy * (2 * dz - 1) * dot
    if POINTS:
        to = point_gradient + (scene * p_total + p0 + i) * 3
        tl.store(to, tl.load(to, mask=real) + gx * (scale * 0.5 * (W - 1)), mask=real)
        tl.store(to + 1, tl.load(to + 1, mask=real) + gy * (scale * 0.5 * (H - 1)), mask=real)
        tl.store(to + 2, tl.load(to + 2, mask=real) + gz * (scale * 0.5 * (D - 1)), mask=real)
