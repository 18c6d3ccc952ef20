# SPDX-License-Identifier: Apache-2.0
"""Resampling with FIR filters: upfirdn2d and its helpers.

One torch.library op with kernels and a twin. It is linear and its gradient is the same op with ``up`` and
``down`` exchanged and the filter turned round, so gradients of every order are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops import dispatch
from cuda_ops import reference_filters as reference
from cuda_ops.reference_filters import Padding, Pair

_library = torch.library.Library("facelab", "FRAGMENT")
_library.define(
    "upfirdn2d(Tensor x, Tensor? f, int[] up, int[] down, SymInt[] padding, bool flip_filter, float gain) -> Tensor"
)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Insert zeros, pad or crop, filter, keep every ``down``-th sample.

    y[oy, ox] = gain * sum_{j,i} g[j, i] xu[oy * down + j - y0, ox * down + i - x0], where xu[k] is x[k / up]
    where ``up`` divides k, else 0, and g is ``f`` if ``flip_filter`` (correlation) else ``f`` reversed
    (convolution). Works in the dtype of ``x``, under autocast too; sums in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), any strides, float16, bfloat16, float32 or float64.
        f: (fh, fw); (n,), applied along both axes; or None, the identity. float32, on the device of ``x``;
            it gets no gradient.
        up, down: factors, int or [x, y].
        padding: int, [x, y] or [x0, x1, y0, y1] in upsampled pixels; negative numbers crop.
        flip_filter: see above.
        gain: factor of the result.

    Returns:
        (N, C, oH, oW) with oW = (W * up + x0 + x1 - fw) // down + 1, in the dtype of ``x``, channels-last
        where ``x`` is.

    Raises:
        ValueError: a bad argument, or a padded picture smaller than the filter.
        RuntimeError: FACELAB_OPS demands a kernel that cannot run.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point (N, C, H, W)")
    taps = reference.filter_size(f)
    if f is not None and (f.requires_grad or f.device != x.device):
        raise ValueError(
            f"the filter is on {f.device} with requires_grad={f.requires_grad}, expected a constant on {x.device}: "
            "use cuda_ops.setup_filter(taps, device=...)"
        )
    factors, p = (reference.pair(up, "up"), reference.pair(down, "down")), reference.pads(padding)
    reference.output_size(x.shape[2], x.shape[3], taps, *factors, p)
    return _call(x, f, *factors, p, flip_filter, float(gain))


def _call(x: Tensor, f: Tensor | None, *settings: Any) -> Tensor:
    """The op, by the shortest way."""
    if not dispatch.eager(x):
        return torch.ops.facelab.upfirdn2d(x, f, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Upfirdn2d.apply(x, f, *settings)
    return _upfirdn2d(x, f, *settings)


@torch.library.impl(_library, "upfirdn2d", "CompositeExplicitAutograd")
def _upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    arguments = (x, f, up, down, padding, flip_filter, gain)

    def kernel() -> Tensor:
        from cuda_ops import filter_launch

        return filter_launch.upfirdn2d(*arguments)

    def twin() -> Tensor:
        # cuDNN might round to TF32; the native depthwise convolution does not
        exact = torch.backends.cudnn.flags(enabled=False) if x.is_cuda else contextlib.nullcontext()
        with torch.autocast(x.device.type, enabled=False), exact:
            return reference.upfirdn2d(*arguments)

    return twin() if x.numel() == 0 else dispatch.run("upfirdn2d", x.device, dispatch.dtype_problem(x), kernel, twin)


@torch.library.register_fake("facelab::upfirdn2d", lib=_library)
def _fake(
    x: Tensor,
    f: Tensor | None,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    size = reference.output_size(x.shape[2], x.shape[3], reference.filter_size(f), (*up,), (*down,), padding)
    return empty_like(x, size)


def empty_like(x: Tensor, size: tuple[int, int]) -> Tensor:
    """An empty tensor with the batch, channels, dtype and memory format of ``x`` (N, C, H, W), and another size."""
    return torch.empty(
        x.shape[0], x.shape[1], *size, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, f, ctx.up, ctx.down, padding, ctx.flip_filter, ctx.gain = inputs
    ctx.padding = reference.transposed_arguments(
        x.shape[2:], output.shape[2:], reference.filter_size(f), ctx.up, ctx.down, padding
    )
    ctx.save_for_backward(f)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (f,) = ctx.saved_tensors
    dx = _call(dy, f, ctx.down, ctx.up, ctx.padding, not ctx.flip_filter, ctx.gain)
    return dx, *[None] * 6


class _Upfirdn2d(torch.autograd.Function):
    """The op where nothing but autograd looks on."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _upfirdn2d(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)  # type: ignore[assignment]


torch.library.register_autograd("facelab::upfirdn2d", _backward, setup_context=_setup, lib=_library)


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
