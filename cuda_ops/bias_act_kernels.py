# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of :mod:`cuda_ops.activation`: one pass over memory for the function and both derivatives. Imports Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMES = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
LINEAR, RELU, LRELU, TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SIGMOID, ELU, SELU, SOFTPLUS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
SELU_SCALE, SELU_ALPHA = tl.constexpr(1.0507009873554805), tl.constexpr(1.6732632423543772)
BYTES = 16384  # of one input that a program reads


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _expm1_below(x, ACC: tl.constexpr):
    """exp(x) - 1 for x < 0, without the cancellation near zero; else 0."""
    z = tl.where(x >= 0, 0.0, x)  # NaN stays
    small = z * (1.0 + z * (0.5 + z * (1.0 / 6.0 + z * (1.0 / 24.0 + z * (1.0 / 120.0)))))
    if tl.float64 == ACC:  # |error| < 1e-15 needs more terms: half the argument twice over
        half = z * 0.5
        series = half * (1.0 + half * (0.5 + half * (1.0 / 6.0 + half * (1.0 / 24.0 + half * (1.0 / 120.0 + half * (
            1.0 / 720.0 + half * (1.0 / 5040.0 + half * (1.0 / 40320.0 + half * (1.0 / 362880.0)))))))))  # fmt: skip
        small = series * (2.0 + series)
    return tl.where(z > -0.1, small, tl.exp(z) - 1.0)


@triton.jit
def _log1p(e, ACC: tl.constexpr):
    """ln(1 + e) for 0 <= e <= 1, to the last digits for a small e: ln(u) e / (u - 1) with u = 1 + e, rounded."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _value(x, alpha, ACT: tl.constexpr, ACC: tl.constexpr):
    if ACT == LINEAR:
        return x
    elif ACT == RELU:
        return tl.where(x > 0, x, tl.where(x != x, x, 0.0))
    elif ACT == LRELU:
        return tl.where(x > 0, x, x * alpha)
    elif ACT == TANH:
        e = _expm1_below(-2.0 * tl.abs(x), ACC)
        return tl.where(x < 0, e, -e) / (2.0 + e)
    elif ACT == SIGMOID:
        return _sigmoid(x)
    elif ACT == ELU:
        return tl.where(x >= 0, x, _expm1_below(x, ACC))
    elif ACT == SELU:
        return tl.where(x >= 0, x, _expm1_below(x, ACC) * SELU_ALPHA) * SELU_SCALE
    elif ACT == SOFTPLUS:
        return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)), ACC)
    else:
        return x * _sigmoid(x)


@triton.jit
def _slope(x, alpha, ACT: tl.constexpr, ACC: tl.constexpr):
    """First derivative; relu and lrelu need the sign of ``x`` alone."""
    s = _sigmoid(x)
    if ACT == LINEAR:
        return tl.full(x.shape, 1.0, ACC)
    elif ACT == RELU:
        return tl.where(x > 0, 1.0, 0.0).to(ACC)
    elif ACT == LRELU:
        return tl.where(x > 0, 1.0, alpha)
    elif ACT == TANH:
        return 4.0 * _sigmoid(2.0 * x) * _sigmoid(-2.0 * x)
    elif ACT == SIGMOID:
        return s * _sigmoid(-x)
    elif ACT == ELU:
        return tl.exp(tl.minimum(x, 0.0))
    elif ACT == SELU:
        return tl.where(x >= 0, 1.0, tl.exp(tl.minimum(x, 0.0)) * SELU_ALPHA) * SELU_SCALE
    elif ACT == SOFTPLUS:
        return s
    else:
        return s + x * s * _sigmoid(-x)


@triton.jit
def _curvature(x, ACT: tl.constexpr, ACC: tl.constexpr):
    """Second derivative of a curved activation."""
    s = _sigmoid(x)
    bend = s * _sigmoid(-x)
    if ACT == TANH:
        return -2.0 * _value(x, 0.0, TANH, ACC) * 4.0 * _sigmoid(2.0 * x) * _sigmoid(-2.0 * x)
    elif ACT == SIGMOID:
        return bend * (1.0 - 2.0 * s)
    elif ACT == ELU:
        return tl.where(x >= 0, 0.0, tl.exp(tl.minimum(x, 0.0)))
    elif ACT == SELU:
        return tl.where(x >= 0, 0.0, tl.exp(tl.minimum(x, 0.0))) * SELU_ALPHA * SELU_SCALE
    elif ACT == SOFTPLUS:
        return bend
    else:
        return bend * (2.0 + x * (1.0 - 2.0 * s))


@triton.jit(do_not_specialize=["size", "column_blocks"])  # wide accesses need to know that total divides
def bias_act(
    out, ref, dy, v, bias, alpha: tl.float64, gain: tl.float64, clamp: tl.float64,
    total: tl.int64, columns: tl.int64, size, column_blocks,
    ACT: tl.constexpr, ORDER: tl.constexpr, CLAMP: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Storage in order, seen as rows of ``columns`` elements.

    ORDER 0: out = f(ref + b) gain, clamped; 1: dy times its derivative; 2: v dy times the second one.
    FROM_OUTPUT: ref is the result of order 0. BIAS 0: none; 1: row r has the bias r % size; 2: column c
    has the bias c.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, start = pid // column_blocks * BR, pid % column_blocks * BC
    local_row, local_column = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    base = row * columns + start
    offset = local_row * columns + local_column
    inside = (local_column < columns - start) & (offset < total - base)
    x = tl.load(ref + base + offset, mask=inside, other=0.0).to(ACC)
    if BIAS == 1:
        channel = ((row % size).to(tl.int32) + local_row) % size
        x += tl.load(bias + channel).to(ACC)
    elif BIAS == 2:
        x += tl.load(bias + start + local_column, mask=local_column < columns - start, other=0.0).to(ACC)
    slope = tl.full((), alpha, ACC)
    factor = tl.full((), gain, ACC)
    if FROM_OUTPUT:
        y = x
        x = tl.where(factor >= 0, x, -x)
    elif ORDER == 0 or CLAMP:
        y = (_value(x, slope, ACT, ACC) * factor).to(out.dtype.element_ty).to(ACC)
    if ORDER == 1:
        result = tl.load(dy + base + offset, mask=inside, other=0.0).to(ACC) * factor * _slope(x, slope, ACT, ACC)
    elif ORDER == 2:
        result = tl.load(dy + base + offset, mask=inside, other=0.0).to(ACC) * factor * _curvature(x, ACT, ACC)
        result *= tl.load(v + base + offset, mask=inside, other=0.0).to(ACC)
    else:
        result = y
    if CLAMP:
        bound = tl.full((), clamp, ACC).to(out.dtype.element_ty).to(ACC)  # as saturated results are rounded
        if ORDER == 0:
            result = tl.where(y > bound, bound, tl.where(y < -bound, -bound, y))  # NaN stays
        else:
            result = tl.where(tl.abs(y) < bound, result, 0.0)
    tl.store(out + base + offset, result.to(out.dtype.element_ty), mask=inside)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tile(columns: int, size: int, itemsize: int, has_bias: bool) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two; rows of the storage have ``columns`` elements."""
    elements = BYTES // itemsize
    wide = min(elements, _power(columns))
    if columns % wide:  # the largest power of two in it, unless that is too short for a line of memory
        divisor = columns & -columns
        wide = min(wide, divisor) if divisor * itemsize >= 128 else wide
    return max(1, elements // wide), wide


def launch(
    out: Tensor,
    inputs: Sequence[Tensor],
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    order: int,
    from_output: bool = False,
) -> None:
    """Fill ``out`` from ``inputs`` = [ref, dy, v][: order + 1], all dense with the same strides.

    Arguments as in :mod:`cuda_ops.activation`; with ``from_output`` the bias is not needed.
    """
    total, (ref, dy, v) = out.numel(), (*inputs, None, None)[:3]
    elements = BYTES // out.element_size()
    kind, size, columns = 0, 1, min(elements, _power(total))
    if b is not None and not from_output:
        b, size, inner = b.contiguous(), out.shape[dim], out.stride(dim)
        kind, columns = (2, size) if inner == 1 else (1, inner)
        if size == 1:
            kind, columns = 1, total
    br, bc = tile(columns, size, out.element_size(), kind != 0)
    blocks = -(-columns // bc)
    settings: dict[str, Any] = {
        "ACT": NAMES.index(act), "ORDER": order, "CLAMP": clamp is not None, "FROM_OUTPUT": from_output, "BIAS": kind,
        "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    rows = -(-total // columns)
    with torch.cuda.device_of(out):
        bias_act[(-(-rows // br) * blocks,)](
            out, ref, dy, v, b if kind else None, alpha, gain, 0.0 if clamp is None else clamp,
            total, columns, size, blocks, **settings, BR=br, BC=bc, num_warps=8,
        )  # fmt: skip
