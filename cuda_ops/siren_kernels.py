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
def mark(y, r):
    """float16 sine -> the same with its lowest bit telling that the cosine is negative."""
    bits = y.to(tl.uint16, bitcast=True) & 0xFFFE
    return (bits | (tl.abs(r) > 0.25).to(tl.uint16)).to(tl.float16, bitcast=True)


@triton.jit
def cosine(y):
    """Saved activation -> float32 cosine of its phase."""
    negative = (y.to(tl.uint16, bitcast=True) & 1) != 0
    v = y.to(tl.float32)
    c = tl.sqrt(tl.maximum(1.0 - v * v, 0.0))
    return tl.where(negative, -c, c)


@triton.jit
def _first(
    px, py, pz, features, rows, weight, feature_weight, phase, n,
    H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Phase of the first layer for the columns ``n``, all in float32."""
    acc = px[:, None] * tl.load(weight + n)[None, :] + tl.load(phase + n)[None, :]
    acc += py[:, None] * tl.load(weight + H + n)[None, :]
    acc += pz[:, None] * tl.load(weight + 2 * H + n)[None, :]
    if C > 0:
        c = tl.arange(0, C)
        e = tl.load(features + rows[:, None] * C + c[None, :])
        acc = tl.dot(e, tl.load(feature_weight + c[:, None] * H + n[None, :]), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _head(y0, y1, weight, bias, H: tl.constexpr, B: tl.constexpr, W: tl.constexpr):
    """(BM, h) in blocks of B columns times weight^T (h, W), and bias."""
    c = tl.arange(0, W)
    k = tl.arange(0, B)
    at = weight + c[None, :] * H + k[:, None]
    acc = tl.dot(y0, tl.load(at))
    if H > B:
        acc = tl.dot(y1, tl.load(at + B), acc)
    return acc + tl.load(bias + c)[None, :]


@triton.jit
def _layers(
    y0, y1, hidden, block, phase, extra, extra_weight, ys, rows, n_rows, start, stop,
    H: tl.constexpr, B: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Layers start .. stop - 1 in blocks of B columns; for E > 0 the first of them also sees ``extra``."""
    HALVES: tl.constexpr = H // B
    n = tl.arange(0, B)
    kept = y0  # the first block of columns of a layer waits here for the second
    for step in tl.range(start * HALVES, stop * HALVES, num_stages=STAGES):
        layer = step // HALVES
        half = step % HALVES
        column = half * B + n
        w = (block + layer - 1) * H + half * B
        p = tl.load(phase + layer * H + column)
        acc = tl.dot(y0, hidden.load([w, 0]).T, tl.broadcast_to(p[None, :], (BM, B)))
        if HALVES == 2:
            acc = tl.dot(y1, hidden.load([w, B]).T, acc)
        if E > 0:
            if layer == start:
                e = tl.arange(0, E)
                side = tl.load(extra + rows[:, None] * E + e[None, :])
                acc = tl.dot(side, tl.load(extra_weight + column[None, :] * E + e[:, None]), acc)
        r = reduce_turns(acc)
        z = sine(r).to(tl.float16)
        if SAVE:
            tl.store(ys + (layer.to(tl.int64) * n_rows + rows)[:, None] * H + column[None, :], mark(z, r))
        if HALVES == 2:
            y0 = tl.where(half == 1, kept, y0)
            y1 = tl.where(half == 1, z, y1)
            kept = z
        else:
            y0 = z
    return y0, y1


@triton.jit
def field_forward(
    points, features, extra, first, feature_weight, hidden, extra_weight, phases,
    head, rgb_head, bias, ys, out,
    p_total, p0, count, scene0, tiles_per_scene, n_rows, scale,
    H: tl.constexpr, B: tl.constexpr, G: tl.constexpr, L: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    W: tl.constexpr, OC: tl.constexpr, RGB: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The whole field for BM points: activations stay in registers, weight blocks stream from the L2 cache.

    G geometry layers, L layers in all; columns are computed in H / B blocks (one or two). With SAVE the
    marked activations of every layer go to ys (L, n_rows, H) and no output is written; else ``out``
    (N, p_total, OC) float32. points (N, p_total, 3) float32; features (rows, C) float32 for a grid in the
    geometry branch; extra (rows, E) float16 for the first colour layer. The parameters carry the
    frequencies of their scene: first (N, 3, H), feature_weight (N, C, H), phases (N, L, H) float32; hidden
    (N, L - 1, H out, H in) as a descriptor of (rows, H) in blocks (B, B), extra_weight (N, H, E) float16.
    head and rgb_head (W, H) float16.
    """
    tile = tl.program_id(0)
    scene = (scene0 + tile // tiles_per_scene).to(tl.int64)
    i = (tile % tiles_per_scene) * BM + tl.arange(0, BM)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.arange(0, B)
    at = points + (scene * p_total + p0 + tl.minimum(i, count - 1)) * 3
    px, py, pz = tl.load(at) * scale, tl.load(at + 1) * scale, tl.load(at + 2) * scale
    first += scene * 3 * H
    phases += scene * L * H
    block = (scene0 + tile // tiles_per_scene) * (L - 1)
    if C > 0:
        feature_weight += scene * C * H
    if E > 0:
        extra_weight += scene * H * E

    r = reduce_turns(_first(px, py, pz, features, rows, first, feature_weight, phases, n, H, C))
    y0 = sine(r).to(tl.float16)
    y1 = y0
    if SAVE:
        tl.store(ys + rows[:, None] * H + n[None, :], mark(y0, r))
    if H > B:
        r = reduce_turns(_first(px, py, pz, features, rows, first, feature_weight, phases, B + n, H, C))
        y1 = sine(r).to(tl.float16)
        if SAVE:
            tl.store(ys + rows[:, None] * H + B + n[None, :], mark(y1, r))
    y0, y1 = _layers(
        y0, y1, hidden, block, phases, extra, extra_weight, ys, rows, n_rows, 1, G, H, B, 0, SAVE, BM, STAGES
    )
    if not SAVE:
        c = tl.arange(0, W)
        to = out + (scene * p_total + p0 + i)[:, None] * OC + c[None, :]
        is_rgb = (c >= RGB) & (c < RGB + 3) & (RGB >= 0)
        mask = (i < count)[:, None] & ((c < OC) & ~is_rgb)[None, :]
        tl.store(to, _head(y0, y1, head, bias, H, B, W), mask=mask)
    y0, y1 = _layers(
        y0, y1, hidden, block, phases, extra, extra_weight, ys, rows, n_rows, G, L, H, B, E, SAVE, BM, STAGES
    )
    if RGB >= 0 and not SAVE:
        c = tl.arange(0, W)
        to = out + (scene * p_total + p0 + i)[:, None] * OC + c[None, :]
        mask = (i < count)[:, None] & ((c >= RGB) & (c < RGB + 3))[None, :]
        tl.store(to, 1.0 / (1.0 + tl.exp(-_head(y0, y1, rgb_head, bias, H, B, W))), mask=mask)


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
def field_backward(
    head_d, hidden, head, rgb_head, ys, d,
    scene0, tiles_per_scene, n_rows,
    H: tl.constexpr, B: tl.constexpr, G: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d (L, n_rows, H) float16 = f * cos(phase) * dL/dy of every layer, from the last to the first.

    head_d (n_rows, W): gradients at the heads; ys (L, n_rows, H): marked activations. Columns of the weights
    carry the frequency of the layer below: hidden (N, L - 1, H, H) as a descriptor like that of the forward,
    head and rgb_head (N, W, H).
    """
    HALVES: tl.constexpr = H // B
    tile = tl.program_id(0)
    scene = (scene0 + tile // tiles_per_scene).to(tl.int64)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.arange(0, B)
    c = tl.arange(0, W)
    head += scene * W * H
    block = (scene0 + tile // tiles_per_scene) * (L - 1)
    top = head
    if L > G:
        top = rgb_head + scene * W * H
    h = tl.load(head_d + rows[:, None] * W + c[None, :])
    here = ((L - 1) * n_rows.to(tl.int64) + rows)[:, None] * H + n[None, :]
    g = tl.dot(h, tl.load(top + c[:, None] * H + n[None, :]))
    d0 = (g * cosine(tl.load(ys + here))).to(tl.float16)
    tl.store(d + here, d0)
    d1 = d0
    if HALVES == 2:
        g = tl.dot(h, tl.load(top + c[:, None] * H + B + n[None, :]))
        d1 = (g * cosine(tl.load(ys + here + B))).to(tl.float16)
        tl.store(d + here + B, d1)
    kept = d0
    for step in tl.range(0, (L - 1) * HALVES, num_stages=STAGES):
        layer = L - 2 - step // HALVES
        half = step % HALVES
        column = half * B + n
        here = (layer.to(tl.int64) * n_rows + rows)[:, None] * H + column[None, :]
        w = (block + layer) * H
        acc = tl.dot(d0, hidden.load([w, half * B]))
        if HALVES == 2:
            acc = tl.dot(d1, hidden.load([w + B, half * B]), acc)
        if L > G:
            if layer == G - 1:
                side = tl.load(head_d + rows[:, None] * W + c[None, :])
                acc = tl.dot(side, tl.load(head + c[:, None] * H + column[None, :]), acc)
        v = tl.zeros((BM, B), dtype=tl.float16)
        if n_rows > 0:  # always: a load under a condition stays out of the pipeline, whose buffers are full
            v = tl.load(ys + here)
        z = (acc * cosine(v)).to(tl.float16)
        tl.store(d + here, z)
        if HALVES == 2:
            d0 = tl.where(half == 1, kept, d0)
            d1 = tl.where(half == 1, z, d1)
            kept = z
        else:
            d0 = z


@triton.jit
def weight_gradient(
    d, again, x, gradient, sums,
    rows_per_scene, scene0, splits, chunk, g_stride, s_stride, d_layer, x_layer, g_layer, s_layer,
    M: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gradient[scene] (M, K) += d^T x and, with SUMS, sums[scene] (M) += column sums of d, over the rows of a scene.

    d (rows, M), x (rows, K) float16; gradient and sums float32, ``g_stride`` and ``s_stride`` apart a scene;
    program axis 2 counts layers, ``*_layer`` apart. The column sums are a product with ones (sixteen equal columns)
    of ``again``, which is d: one block of the pipeline for two uses raced (Triton 3.6, seen on Hopper).
    """
    layer = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, K)
    local = tl.program_id(1) // splits
    start = (tl.program_id(1) % splits) * chunk
    stop = tl.minimum(start + chunk, rows_per_scene)
    acc = tl.zeros((BM, K), dtype=tl.float32)
    total = tl.zeros((BM, 16), dtype=tl.float32)
    ones = tl.full((BR, 16), 1.0, dtype=tl.float16)
    for r in tl.range(start, stop, BR, num_stages=STAGES):
        rows = local.to(tl.int64) * rows_per_scene + r + tl.arange(0, BR)
        at = layer * d_layer + rows[:, None] * M + m[None, :]
        acc = tl.dot(tl.trans(tl.load(d + at)), tl.load(x + layer * x_layer + rows[:, None] * K + k[None, :]), acc)
        if SUMS:
            total = tl.dot(tl.trans(tl.load(again + at)), ones, total)
    scene = (scene0 + local).to(tl.int64)
    to = gradient + scene * g_stride + layer * g_layer
    tl.atomic_add(to + m[:, None] * K + k[None, :], acc, sem="relaxed")
    if SUMS:
        tl.atomic_add(sums + scene * s_stride + layer * s_layer + m, tl.max(total, axis=1), sem="relaxed")
