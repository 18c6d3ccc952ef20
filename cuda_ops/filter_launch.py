# SPDX-License-Identifier: Apache-2.0
"""Chooses and launches the kernels of :mod:`cuda_ops.filter_kernels` for one call of upfirdn2d."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_ops import reference_filters as reference

LANES = 128  # of one program
VECTOR_BYTES = 8  # of the channels that a lane takes, channels-last
WORD_BYTES = 8  # of a row of half-precision numbers that a lane reads at once
MAX_LOADS = 192  # of one lane; larger filters take the plain loops
MAX_TAPS = 16  # of an axis; longer ones would take minutes to compile, each length anew


@dataclass(frozen=True)
class Axis:
    """One axis of a call, as a lane sees it: it writes ``k`` outputs from ``n`` inputs, ``q`` inputs further on each.

    ``up``, ``down``, ``taps`` and ``padding`` (= shift * up + rem) are the call's.
    """

    up: int
    down: int
    taps: int
    shift: int
    rem: int
    k: int
    q: int
    n: int

    @classmethod
    def of(cls, up: int, down: int, taps: int, padding: int, outputs: int) -> Axis:
        """At least ``outputs`` outputs a lane, rounded up to whole periods of up / down."""
        common = math.gcd(up, down)
        periods = max(1, -(-outputs * common // up))
        k = periods * up // common
        shift, rem = divmod(padding, up)
        return cls(up, down, taps, shift, rem, k, periods * down // common, ((k - 1) * down + taps - 1 - rem) // up + 1)


def columns_and_rows(up: Sequence[int], down: Sequence[int], itemsize: int, last: bool) -> tuple[int, int]:
    """Outputs of a lane along x and y (before rounding to periods)."""
    if down[0] > 1 or down[1] > 1:
        return 4 if itemsize == 2 and not last else 1, 4
    columns = 4 if itemsize == 2 and not last else 2 * up[0]
    return columns, 4 if last or itemsize == 8 else 8


def plan(
    taps: tuple[int, int], up: Sequence[int], down: Sequence[int], padding: Sequence[int], itemsize: int, last: bool
) -> tuple[Axis, Axis] | None:
    """How lanes share a call out; None when a lane would unroll too much, even one of the smallest."""
    columns, rows = columns_and_rows(up, down, itemsize, last)
    if max(taps) > MAX_TAPS or taps[0] * taps[1] > 1024:
        return None
    while True:
        x = Axis.of(up[0], down[0], taps[0], padding[0], columns)
        y = Axis.of(up[1], down[1], taps[1], padding[2], rows)
        if x.n * y.n <= MAX_LOADS and min(x.n, y.n) > 0:
            return x, y
        if columns == rows == 1:
            return None
        columns, rows = (1, rows) if columns > 1 else (1, rows // 2)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """:func:`cuda_ops.upfirdn2d` by a kernel; ``x`` is not empty and all arguments are checked."""
    taps = reference.filter_size(f)
    height, width = reference.output_size(x.shape[2], x.shape[3], taps, (*up,), (*down,), padding)
    last = reference.is_channels_last(x)
    y = torch.empty(
        *x.shape[:2], height, width, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x)
    )
    f = None if f is None else f.contiguous()
    axes = plan(taps, up, down, padding, x.element_size(), last)
    with torch.cuda.device_of(x):
        if axes is not None and not _wide(x, y):
            (_channels_last if last else _planar)(x, f, y, *axes, flip_filter, gain)
        elif f is not None and f.ndim == 1:
            middle = upfirdn2d(x, f[None], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter, gain)
            return upfirdn2d(middle, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter, 1.0)
        else:
            _any(x, f, y, taps, up, down, padding, flip_filter, gain)
    return y


def _wide(x: Tensor, y: Tensor) -> bool:
    """True when a row, a number of planes or of programs would not fit 32 bits (sizes may; offsets are 64 bits wide)."""
    return max(x.shape[0] * x.shape[1], *x.shape[2:], *y.shape[2:]) >= 2**30 or max(map(abs, x.stride())) >= 2**62


def _accumulator(x: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _constants(x: Axis, y: Axis, f: Tensor | None, flip: bool) -> dict[str, Any]:
    """What both fused kernels are compiled for."""
    return {
        "UX": x.up, "UY": y.up, "DX": x.down, "DY": y.down, "RX": x.rem, "RY": y.rem, "FW": x.taps, "FH": y.taps,
        "FLIP": flip, "HAS": f is not None, "SEPARABLE": f is not None and f.ndim == 1,
        "KX": x.k, "QX": x.q, "NX": x.n, "KY": y.k, "QY": y.q, "NY": y.n,
    }  # fmt: skip


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _planar(x: Tensor, f: Tensor | None, y: Tensor, ax: Axis, ay: Axis, flip: bool, gain: float) -> None:
    from cuda_ops.filter_kernels import fir_planar

    planes, groups, strips = x.shape[0] * x.shape[1], -(-y.shape[3] // ax.k), -(-y.shape[2] // ay.k)
    bg = min(LANES, _power(groups))
    blocks = -(-groups // bg)
    w = word(x, ax)
    if w > 1:
        x = x.view(torch.int32 if w == 2 else torch.int64)
    kernel: Any = fir_planar
    kernel[(blocks * strips * -(-planes // (LANES // bg)),)](
        x, f, y, gain, x.shape[1], planes, *x.shape[2:], *y.shape[2:], groups, ax.shift, ay.shift, strips, blocks,
        bg, *x.stride(), *y.stride()[:3], **_constants(ax, ay, f, flip),
        JOIN=ax.k in (2, 4) and y.shape[3] % ax.k == 0, ACC=_accumulator(y), B=LANES, W=w, OFF=-ax.shift % w,
        num_warps=LANES // 32,
    )  # fmt: skip


def word(x: Tensor, axis: Axis) -> int:
    """How many neighbours in a row a lane of the planar kernel reads at once; 1 where sizes or addresses do not divide.

    Upsampling reads little and is not bound by its reads.
    """
    w = WORD_BYTES // 2 if x.element_size() == 2 and axis.up == 1 and x.stride(3) == 1 else 1
    sizes = (axis.q, x.shape[3], *x.stride()[:3], x.data_ptr() // 2)
    while w > 1 and any(size % w for size in sizes):
        w //= 2
    return w


def _channels_last(x: Tensor, f: Tensor | None, y: Tensor, ax: Axis, ay: Axis, flip: bool, gain: float) -> None:
    from cuda_ops.filter_kernels import fir_channels_last

    strides = [x.stride(i) for i in (0, 2, 3)]
    v = vector(x.shape[1], x.element_size(), strides)
    channel_groups, groups, strips = x.shape[1] // v, -(-y.shape[3] // ax.k), -(-y.shape[2] // ay.k)
    bc = min(LANES, _power(channel_groups))
    blocks, channel_blocks = -(-groups // (LANES // bc)), -(-channel_groups // bc)
    kernel: Any = fir_channels_last
    kernel[(blocks * channel_blocks * strips * x.shape[0],)](
        x, f, y, gain, channel_groups, *x.shape[2:], *y.shape[2:], groups, ax.shift, ay.shift, strips, blocks,
        channel_blocks, bc, *(s // v for s in strides), *(y.stride(i) // v for i in (0, 2, 3)),
        **_constants(ax, ay, f, flip), V=v, ACC=_accumulator(x), B=LANES, num_warps=LANES // 32,
    )  # fmt: skip


def vector(channels: int, itemsize: int, strides: Sequence[int]) -> int:
    """How many channels a lane of the channels-last kernel takes: VECTOR_BYTES, less where sizes do not divide."""
    v = max(1, VECTOR_BYTES // itemsize)
    while v > 1 and any(size % v for size in (channels, *strides)):
        v //= 2
    return v


def _any(
    x: Tensor,
    f: Tensor | None,
    y: Tensor,
    taps: tuple[int, int],
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip: bool,
    gain: float,
) -> None:
    from cuda_ops.filter_kernels import fir_any

    block, total = 256, y.numel()
    kernel: Any = fir_any
    kernel[(-(-total // block),)](
        x, f, y, gain, total, x.shape[1], *x.shape[2:], *y.shape[2:], *up, *down, padding[0], padding[2], *taps,
        *x.stride(), *y.stride(), FLIP=flip, HAS=f is not None, CHANNELS_LAST=reference.is_channels_last(x),
        WIDE=total >= 2**31 - block, ACC=_accumulator(x), B=block, num_warps=4,
    )  # fmt: skip
