# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of :mod:`cuda_ops.filters`; launched by :mod:`cuda_ops.filter_launch`. Imports Triton.

``fir_planar`` and ``fir_channels_last`` do a whole 2-D filter in one pass. A lane owns a small block of
outputs, GX * PX columns of RY rows. All inputs of the block are loaded before anything is computed
(many loads in flight), each once; taps are unrolled, and the zeros of an upsampling are never touched.
Along one axis, output k of a lane whose block starts at the input position b reads
b + n for n = 0 ... N - 1, with the tap n * U + REM - k * D, where that is a tap.

``fir_any`` takes any size in plain loops, one output a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

OUTSIDE = tl.constexpr(1 << 30)  # beyond every width


@triton.jit
def _taps(f, gain, COUNT: tl.constexpr, FLIP: tl.constexpr, HAS: tl.constexpr, ACC: tl.constexpr):
    """Tuple of ``COUNT`` taps in reading order, times ``gain``."""
    factor = tl.full((), gain, ACC)
    found = ()
    for t in tl.static_range(COUNT):
        if HAS:
            found = found + (tl.load(f + (t if FLIP else COUNT - 1 - t)).to(ACC) * factor,)
        else:
            found = found + (factor,)
    return found


@triton.jit
def _dot(values, taps, START: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, TAP: tl.constexpr,
         U: tl.constexpr, D: tl.constexpr, REM: tl.constexpr, FN: tl.constexpr, acc):  # fmt: skip
    """acc + taps[TAP:TAP + FN] . values[START::STRIDE], for output K of a lane."""
    for i in tl.static_range(FN):
        if (i + K * D - REM) % U == 0:
            acc += taps[TAP + i] * values[START + (i + K * D - REM) // U * STRIDE]
    return acc


@triton.jit
def _filter(values, tx, ty, j: tl.constexpr, k: tl.constexpr, NX: tl.constexpr, KX: tl.constexpr,
            UX: tl.constexpr, UY: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, RX: tl.constexpr, RY: tl.constexpr,
            FW: tl.constexpr, FH: tl.constexpr, SEPARABLE: tl.constexpr):  # fmt: skip
    """Output (row j, column k) of a lane from its inputs, or, if SEPARABLE, from its horizontally filtered rows."""
    acc = tl.zeros_like(values[0])
    if SEPARABLE:
        acc = _dot(values, ty, k, KX, j, 0, UY, DY, RY, FH, acc)
    else:
        for t in tl.static_range(FH):
            if (t + j * DY - RY) % UY == 0:
                acc = _dot(values, tx, (t + j * DY - RY) // UY * NX, 1, k, t * FW, UX, DX, RX, FW, acc)
    return acc


@triton.jit
def _horizontal(values, tx, NX: tl.constexpr, NY: tl.constexpr, KX: tl.constexpr,
                UX: tl.constexpr, DX: tl.constexpr, RX: tl.constexpr, FW: tl.constexpr):  # fmt: skip
    """Rows of inputs -> rows of KX horizontally filtered values."""
    rows = ()
    for r in tl.static_range(NY):
        for k in tl.static_range(KX):
            rows = rows + (_dot(values, tx, r * NX, 1, k, 0, UX, DX, RX, FW, tl.zeros_like(values[0])),)
    return rows


@triton.jit
def _element(word, E: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """Number E of the W 16-bit ones in an integer; itself where W is 1."""
    if W == 1:
        return word
    else:
        return (word >> (16 * E)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _limit(row, width, height):
    """The width for a row inside, else 0: one unsigned comparison with it tests row, column and lane."""
    return tl.where(row.to(tl.uint32, bitcast=True) < height, width, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _store_joined(at, values, mask, K: tl.constexpr):
    """Store (B, K) values, K neighbours a lane, K dividing every offset: one wide access a lane."""
    at = tl.multiple_of(at[:, None] + tl.arange(0, K)[None, :], [1, K * values.dtype.primitive_bitwidth // 8])
    tl.store(at, values, mask=mask[:, None])


PLANAR_SIZES = (
    "channels planes height width out_height out_width groups shift_x shift_y strips group_blocks bg "
    "sxn sxc sxh syn syc syh"
)
LAST_SIZES = (
    "channel_groups height width out_height out_width groups shift_x shift_y strips group_blocks channel_blocks bc "
    "sxn sxh sxw syn syh syw"
)
ANY_SIZES = "total channels height width out_height out_width ux uy dx dy x0 y0 fw fh sxn sxc sxh sxw syn syc syh syw"


@triton.jit(do_not_specialize=PLANAR_SIZES.split())  # one compilation for many sizes
def fir_planar(
    x, f, y, gain: tl.float64,
    channels, planes, height, width, out_height, out_width, groups,
    shift_x, shift_y, strips, group_blocks, bg,
    sxn: tl.int64, sxc: tl.int64, sxh: tl.int64, sxw, syn: tl.int64, syc: tl.int64, syh: tl.int64,
    UX: tl.constexpr, UY: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, RX: tl.constexpr, RY: tl.constexpr,
    FW: tl.constexpr, FH: tl.constexpr, FLIP: tl.constexpr, HAS: tl.constexpr, SEPARABLE: tl.constexpr,
    KX: tl.constexpr, QX: tl.constexpr, NX: tl.constexpr, KY: tl.constexpr, QY: tl.constexpr, NY: tl.constexpr,
    JOIN: tl.constexpr, ACC: tl.constexpr, B: tl.constexpr, W: tl.constexpr, OFF: tl.constexpr,
):  # fmt: skip
    """x (N, C, H, W) of any strides -> y whose last stride is 1.

    A lane writes KX columns of KY rows; groups = ceil(out_width / KX). ``shift`` is the whole part of
    padding / up, R its remainder. B lanes are B / bg planes of bg groups. JOIN: KX divides out_width.
    W > 1: x are integers of W half-precision neighbours, which its strides and ``width`` count; a lane's first
    input is number OFF of its first integer, W divides QX.
    """
    pid = tl.program_id(0)
    zero = tl.zeros((B,), tl.int32)  # makes a row a tensor: the interpreter cannot spread a scalar mask
    block = pid % group_blocks
    strip = (pid // group_blocks) % strips
    # without its contiguity the compiler keeps one element a lane: shifted reads then fill whole lines
    lane = tl.max_contiguous(tl.arange(0, B), [1])
    group = block * bg + lane % bg
    plane = (pid // group_blocks // strips) * (B // bg) + lane // bg
    inside = (group < groups) & (plane < planes)
    n, c = plane // channels, plane % channels
    tx = _taps(f, gain, FW if SEPARABLE else FW * FH, FLIP, HAS, ACC)
    ty = _taps(f, 1.0, FH if SEPARABLE else 1, FLIP, HAS, ACC)
    column = (group * QX - shift_x - OFF) // W  # without remainder
    source = x + n.to(tl.int64) * sxn + c.to(tl.int64) * sxc + column.to(tl.int64) * sxw
    column = tl.where(inside, column, OUTSIDE)
    at = source + (strip * QY - shift_y) * sxh
    values = ()
    for r in tl.static_range(NY):
        row = zero + (strip * QY - shift_y + r)
        limit = _limit(row, width, height)
        for i in tl.static_range((NX + OFF + W - 1) // W):
            mask = (column + i).to(tl.uint32, bitcast=True) < limit
            word = tl.load(at + i * sxw, mask=mask, other=0)
            for e in tl.static_range(W):
                if i * W + e >= OFF and i * W + e < NX + OFF:
                    values = values + (_element(word, e, W, y.dtype.element_ty).to(ACC),)
        at += sxh
    if SEPARABLE:
        values = _horizontal(values, tx, NX, NY, KX, UX, DX, RX, FW)
    first = group * KX
    at = y + n.to(tl.int64) * syn + c.to(tl.int64) * syc + strip * KY * syh + first
    for j in tl.static_range(KY):
        row = zero + (strip * KY + j)
        mask = inside & (row < out_height)
        outs = ()
        for k in tl.static_range(KX):
            value = _filter(values, tx, ty, j, k, NX, KX, UX, UY, DX, DY, RX, RY, FW, FH, SEPARABLE)
            outs = outs + (value.to(y.dtype.element_ty),)
        if JOIN and KX == 2:
            _store_joined(at, tl.join(outs[0], outs[1]), mask, 2)
        elif JOIN and KX == 4:
            both = tl.join(tl.join(outs[0], outs[2]), tl.join(outs[1], outs[3]))
            _store_joined(at, tl.reshape(both, (B, 4)), mask, 4)
        else:
            for k in tl.static_range(KX):
                tl.store(at + k, outs[k], mask=mask & (first + k < out_width))
        at += syh


@triton.jit(do_not_specialize=LAST_SIZES.split())
def fir_channels_last(
    x, f, y, gain: tl.float64,
    channel_groups, height, width, out_height, out_width, groups,
    shift_x, shift_y, strips, group_blocks, channel_blocks, bc,
    sxn: tl.int64, sxh: tl.int64, sxw, syn: tl.int64, syh: tl.int64, syw,
    UX: tl.constexpr, UY: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, RX: tl.constexpr, RY: tl.constexpr,
    FW: tl.constexpr, FH: tl.constexpr, FLIP: tl.constexpr, HAS: tl.constexpr, SEPARABLE: tl.constexpr,
    KX: tl.constexpr, QX: tl.constexpr, NX: tl.constexpr, KY: tl.constexpr, QY: tl.constexpr, NY: tl.constexpr,
    V: tl.constexpr, ACC: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """x and y (N, C, H, W) with a stride of 1 along C; all other strides are counted in V elements.

    A lane writes V channels of KX columns of KY rows. B lanes are B / bc column groups of bc channel groups.
    """
    pid = tl.program_id(0)
    channel_block = pid % channel_blocks
    pid = pid // channel_blocks
    zero = tl.zeros((B,), tl.int32)  # makes a row a tensor: the interpreter cannot spread a scalar mask
    block = pid % group_blocks
    strip = (pid // group_blocks) % strips
    n = (pid // group_blocks // strips).to(tl.int64)
    lane = tl.arange(0, B)
    channel = channel_block * bc + lane % bc
    group = block * (B // bc) + lane // bc
    inside = (channel < channel_groups) & (group < groups)
    vector = tl.arange(0, V)[None, :]
    tx = _taps(f, gain, FW if SEPARABLE else FW * FH, FLIP, HAS, ACC)
    ty = _taps(f, 1.0, FH if SEPARABLE else 1, FLIP, HAS, ACC)
    column = group * QX - shift_x
    source = x + (n * sxn + column.to(tl.int64) * sxw + channel)[:, None] * V + vector
    column = tl.where(inside, column, OUTSIDE)
    at = source + (strip * QY - shift_y) * sxh * V
    values = ()
    for r in tl.static_range(NY):
        row = zero + (strip * QY - shift_y + r)
        limit = _limit(row, width, height)
        for i in tl.static_range(NX):
            mask = (column + i).to(tl.uint32, bitcast=True) < limit
            values = values + (tl.load(at + i * sxw * V, mask=mask[:, None], other=0.0).to(ACC),)
        at += sxh * V
    if SEPARABLE:
        values = _horizontal(values, tx, NX, NY, KX, UX, DX, RX, FW)
    first = group * KX
    at = y + (n * syn + strip * KY * syh + first.to(tl.int64) * syw + channel)[:, None] * V + vector
    for j in tl.static_range(KY):
        row = zero + (strip * KY + j)
        for k in tl.static_range(KX):
            mask = inside & (row < out_height) & (first + k < out_width)
            value = _filter(values, tx, ty, j, k, NX, KX, UX, UY, DX, DY, RX, RY, FW, FH, SEPARABLE)
            tl.store(at + k * syw * V, value.to(y.dtype.element_ty), mask=mask[:, None])
        at += syh * V


@triton.jit(do_not_specialize=ANY_SIZES.split())
def fir_any(
    x, f, y, gain: tl.float64, total: tl.int64,
    channels, height, width, out_height, out_width, ux, uy, dx, dy, x0, y0, fw, fh,
    sxn: tl.int64, sxc: tl.int64, sxh: tl.int64, sxw: tl.int64,
    syn: tl.int64, syc: tl.int64, syh: tl.int64, syw: tl.int64,
    FLIP: tl.constexpr, HAS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Any filter f (fh, fw) and any strides, one output a lane. WIDE: ``total`` outputs need 64 bits."""
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = index < total
    if not WIDE:
        index = index.to(tl.int32)
    if CHANNELS_LAST:
        c, index = index % channels, index // channels
    ox, index = index % out_width, index // out_width
    oy, index = index % out_height, index // out_height
    if not CHANNELS_LAST:
        c, index = index % channels, index // channels
    n = index.to(tl.int64)
    c, ox, oy = c.to(tl.int64), ox.to(tl.int32), oy.to(tl.int32)
    source = x + n * sxn + c * sxc
    acc = tl.zeros((B,), dtype=ACC)
    for j in range(fh):
        py = oy * dy + j - y0
        iy = py // uy
        row = inside & (py >= 0) & (iy * uy == py) & (iy < height)
        for i in range(fw):
            px = ox * dx + i - x0
            ix = px // ux
            mask = row & (px >= 0) & (ix * ux == px) & (ix < width)
            value = tl.load(source + iy.to(tl.int64) * sxh + ix.to(tl.int64) * sxw, mask=mask, other=0.0).to(ACC)
            if HAS:
                tap = (j * fw + i) if FLIP else (fh * fw - 1 - j * fw - i)
                acc += value * tl.load(f + tap).to(ACC)
            else:
                acc += value
    acc = acc * tl.full((), gain, ACC)
    target = y + n * syn + c * syc + oy.to(tl.int64) * syh + ox.to(tl.int64) * syw
    tl.store(target, acc.to(y.dtype.element_ty), mask=inside)
