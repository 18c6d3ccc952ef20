# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of :mod:`cuda_ops.film_siren`. Importing this module imports Triton.

A *slab* is a run of points of some scenes: ``rows = scenes * rows_per_scene``, where the last rows of
each scene are padding (``count`` rows are real). Activations are float16 (rows, h), contiguous.

Phases are kept in turns (radians / 2 pi) in float32: ``u = F * (x W^T) + P`` with F = f / (2 pi) and
P = (f b + p) / (2 pi), so that the range reduction before the fast sine is one rounding.

For the backward pass an activation y = sin(phase) carries the sign of cos(phase) in the lowest bit of
its mantissa: |cos| = sqrt(1 - y^2), so no second tensor is kept.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import libdevice
except ImportError:  # older layout
    from triton.language.extra import libdevice

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
TWO_PI = tl.constexpr(6.283185307179586)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a float32 to an integer


@triton.jit
def reduce_turns(u):
    """Turns -> [-0.5, 0.5]."""
    return u - ((u + ROUND) - ROUND)


@triton.jit
def sine(r):
    """sin of r in [-0.5, 0.5] turns."""
    if INTERPRET:
        return tl.sin(r * TWO_PI)
    else:
        return libdevice.fast_sinf(r * TWO_PI)


@triton.jit
def activate(u, SAVE: tl.constexpr):
    """Phase in turns -> float16 sine; with SAVE the lowest bit tells that the cosine is negative."""
    r = reduce_turns(u)
    y = sine(r).to(tl.float16)
    if SAVE:
        bits = y.to(tl.uint16, bitcast=True) & 0xFFFE
        y = (bits | (tl.abs(r) > 0.25).to(tl.uint16)).to(tl.float16, bitcast=True)
    return y


@triton.jit
def cosine(y):
    """Saved activation -> float32 cosine of its phase."""
    negative = (y.to(tl.uint16, bitcast=True) & 1) != 0
    v = y.to(tl.float32)
    c = tl.sqrt(tl.maximum(1.0 - v * v, 0.0))
    return tl.where(negative, -c, c)


@triton.jit
def first_layer(
    points, features, weight, feature_weight, film_f, film_p, y,
    p_total, p0, count, scene0, tiles_per_scene, film_stride, scale,
    H: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y = sin of the first layer, all in float32: 3 coordinates and, for C > 0, C grid features.

    points (N, p_total, 3) float32, features (rows, C) float32, weight (3, H), feature_weight (C, H).
    """
    tile = tl.program_id(0)
    scene = scene0 + tile // tiles_per_scene
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    n = tl.arange(0, H)
    at = points + (scene.to(tl.int64) * p_total + p0 + tl.minimum(i, count - 1)) * 3
    acc = (tl.load(at) * scale)[:, None] * tl.load(weight + n)[None, :]
    acc += (tl.load(at + 1) * scale)[:, None] * tl.load(weight + H + n)[None, :]
    acc += (tl.load(at + 2) * scale)[:, None] * tl.load(weight + 2 * H + n)[None, :]
    rows = tile * BM + tl.arange(0, BM)
    if C > 0:
        c = tl.arange(0, C)
        e = tl.load(features + rows[:, None] * C + c[None, :])
        acc = tl.dot(e, tl.load(feature_weight + c[:, None] * H + n[None, :]), acc, input_precision="tf32x3")
    f = tl.load(film_f + scene * film_stride + n)
    p = tl.load(film_p + scene * film_stride + n)
    out = y + rows.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(out, activate(acc * f[None, :] + p[None, :], SAVE))


@triton.jit
def film_layer(
    x, weight, extra, extra_weight, film_f, film_p, y,
    n_tiles, tiles_per_scene, scene0, film_stride,
    H: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = sin(F * (x W^T [+ extra We^T]) + P): the weight stays on chip, tiles of rows stream past it.

    x, y (rows, H) float16; weight (H out, H in) float16; extra (rows, E) float16; extra_weight (H, E).
    """
    k = tl.arange(0, H)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    w = tl.load(weight + n[None, :] * H + k[:, None])
    if E > 0:
        e_at = tl.arange(0, E)
        we = tl.load(extra_weight + n[None, :] * E + e_at[:, None])
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        acc = tl.dot(tl.load(x + rows[:, None] * H + k[None, :]), w)
        if E > 0:
            acc = tl.dot(tl.load(extra + rows[:, None] * E + e_at[None, :]), we, acc)
        at = (scene0 + tile // tiles_per_scene) * film_stride + n
        f = tl.load(film_f + at)
        p = tl.load(film_p + at)
        tl.store(y + rows[:, None] * H + n[None, :], activate(acc * f[None, :] + p[None, :], SAVE))


@triton.jit
def heads(
    feature, hidden, weight, rgb_weight, bias, out,
    p_total, p0, count, scene0, tiles_per_scene,
    H: tl.constexpr, W: tl.constexpr, OC: tl.constexpr, RGB: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out (N, p_total, OC) float32 = feature head + colour head; sigmoid on the columns RGB .. RGB + 2.

    weight, rgb_weight (W, H) float16 with zero rows where the other head writes; RGB < 0: density only.
    """
    tile = tl.program_id(0)
    scene = scene0 + tile // tiles_per_scene
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    k = tl.arange(0, H)
    c = tl.arange(0, W)
    acc = tl.dot(tl.load(feature + rows[:, None] * H + k[None, :]), tl.load(weight + c[None, :] * H + k[:, None]))
    if RGB >= 0:
        h = tl.load(hidden + rows[:, None] * H + k[None, :])
        acc = tl.dot(h, tl.load(rgb_weight + c[None, :] * H + k[:, None]), acc)
    acc += tl.load(bias + c)[None, :]
    if RGB >= 0:
        is_rgb = (c >= RGB) & (c < RGB + 3)
        acc = tl.where(is_rgb[None, :], 1.0 / (1.0 + tl.exp(-acc)), acc)
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    at = out + (scene.to(tl.int64) * p_total + p0 + i)[:, None] * OC + c[None, :]
    tl.store(at, acc, mask=(i < count)[:, None] & (c < OC)[None, :])


@triton.jit
def head_gradient(
    grad, out, loss_scale, d,
    p_total, p0, count, scene0, tiles_per_scene,
    W: tl.constexpr, OC: tl.constexpr, RGB: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """d (rows, W) float16 = scaled gradient before the sigmoid; zero in the padding."""
    tile = tl.program_id(0)
    scene = scene0 + tile // tiles_per_scene
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    c = tl.arange(0, W)
    at = (scene.to(tl.int64) * p_total + p0 + i)[:, None] * OC + c[None, :]
    mask = (i < count)[:, None] & (c < OC)[None, :]
    g = tl.load(grad + at, mask=mask, other=0.0) * tl.load(loss_scale)
    if RGB >= 0:
        v = tl.load(out + at, mask=mask, other=0.0)
        is_rgb = (c >= RGB) & (c < RGB + 3)
        g = tl.where(is_rgb[None, :], g * v * (1.0 - v), g)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    tl.store(d + rows[:, None] * W + c[None, :], g.to(tl.float16))


@triton.jit
def layer_gradient(
    above, weight, head_d, head_weight, y, film_f, d,
    n_tiles, tiles_per_scene, scene0, film_stride,
    H: tl.constexpr, ABOVE: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d = f * cos(phase) * (above W [+ head_d Wh]): gradient at x W^T of the layer whose output is y.

    above, y, d (rows, H) float16; weight (H out, H in) of the layer above; head_weight (W, H); ABOVE or W > 0.
    """
    k = tl.arange(0, H)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if ABOVE:
        w = tl.load(weight + k[:, None] * H + n[None, :])
    if W > 0:
        c = tl.arange(0, W)
        wh = tl.load(head_weight + c[:, None] * H + n[None, :])
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        here = rows[:, None] * H + n[None, :]
        v = tl.load(y + here)
        if ABOVE:
            g = tl.dot(tl.load(above + rows[:, None] * H + k[None, :]), w)
            if W > 0:
                g = tl.dot(tl.load(head_d + rows[:, None] * W + c[None, :]), wh, g)
        else:
            g = tl.dot(tl.load(head_d + rows[:, None] * W + c[None, :]), wh)
        f = tl.load(film_f + (scene0 + tile // tiles_per_scene) * film_stride + n)
        tl.store(d + here, (g * cosine(v) * f[None, :]).to(tl.float16))


@triton.jit
def weight_gradient(
    d, x, gradient, sums,
    rows_per_scene, scene0, splits, chunk, g_stride, s_stride,
    M: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gradient[scene] (M, K) += d^T x and, with SUMS, sums[scene] (M) += column sums of d, over the rows of a scene.

    d (rows, M), x (rows, K) float16; gradient and sums float32, ``g_stride`` and ``s_stride`` apart a scene.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, K)
    local = tl.program_id(1) // splits
    start = (tl.program_id(1) % splits) * chunk
    stop = tl.minimum(start + chunk, rows_per_scene)
    acc = tl.zeros((BM, K), dtype=tl.float32)
    total = tl.zeros((BR, BM), dtype=tl.float32)
    for r in tl.range(start, stop, BR, num_stages=STAGES):
        rows = local.to(tl.int64) * rows_per_scene + r + tl.arange(0, BR)
        a = tl.load(d + rows[:, None] * M + m[None, :])
        b = tl.load(x + rows[:, None] * K + k[None, :])
        acc = tl.dot(tl.trans(a), b, acc)
        if SUMS:
            total += a.to(tl.float32)
    scene = (scene0 + local).to(tl.int64)
    tl.atomic_add(gradient + scene * g_stride + m[:, None] * K + k[None, :], acc, sem="relaxed")
    if SUMS:
        tl.atomic_add(sums + scene * s_stride + m, tl.sum(total, axis=0), sem="relaxed")
