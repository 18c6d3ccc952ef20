# SPDX-License-Identifier: Apache-2.0
"""Plain torch twins of the filter ops: the specification, the fallback and the test oracle.

Differentiable to any order by autograd, on any device. Sums are taken in float32 for float16 and
bfloat16 inputs (float64 for float64) and rounded once at the end. Shapes are N, C, H, W.
Sources: StyleGAN2 (arXiv 1912.04958) and StyleGAN3 (arXiv 2106.12423), from their formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = int | Sequence[int]  # an int for both axes, or [x, y]
Padding = int | Sequence[int]  # an int, [x, y] or [x0, x1, y0, y1]


# ---------------------------------------------------------------- arguments


def pair(value: Pair, name: str) -> tuple[int, int]:
    """An int or [x, y] -> (x, y), each at least 1. ValueError otherwise."""
    numbers = _integers(value)
    if len(numbers) not in (1, 2) or (len(numbers) == 1 and not isinstance(value, int)) or min(numbers) < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive int or two of them, [x, y]")
    return numbers[0], numbers[-1]


def pads(value: Padding) -> tuple[int, int, int, int]:
    """An int, [x, y] or [x0, x1, y0, y1] -> (x0, x1, y0, y1). ValueError otherwise."""
    if isinstance(value, int):
        return value, value, value, value
    numbers = _integers(value)
    if len(numbers) == 2:
        x, y = numbers
        return x, x, y, y
    if len(numbers) != 4:
        raise ValueError(f"padding is {value!r}, expected an int, [x, y] or [x0, x1, y0, y1]")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _integers(value: Pair) -> tuple[int, ...]:
    """An int, or whole numbers in a sequence -> a tuple; empty for anything else."""
    if isinstance(value, int):
        return (value,)
    try:
        numbers = tuple(int(v) for v in value)
        return numbers if all(n == v for n, v in zip(numbers, value)) else ()
    except (TypeError, ValueError):
        return ()


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter; None is one tap. ValueError for what is no 1-D or 2-D tensor."""
    if f is None:
        return 1, 1
    if not isinstance(f, Tensor):
        raise ValueError(f"the filter is a {type(f).__name__}, expected a tensor: use cuda_ops.setup_filter(taps)")
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"the filter has shape {tuple(f.shape)}, expected (taps,) or (height, width)")
    return int(f.shape[-1]), int(f.shape[0])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over ``dtype`` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """True when an op on ``x`` (N, C, H, W) returns a channels-last result."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that an op on ``x`` keeps: channels-last, or contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


# ---------------------------------------------------------------- filters


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """Prepare filter taps for :func:`upfirdn2d`.

    Args:
        f: taps (n,) or (h, w), a number (one tap), or None (the identity).
        device: where the result lies; default: where ``f`` does.
        normalize: divide by the sum, so that a constant picture stays as it is.
        flip_filter: reverse the taps along every axis.
        gain: factor of the whole 2-D filter; a 1-D result carries its square root, since it is applied twice.
        separable: keep 1-D taps 1-D; None: where there are 8 or more of them. False: outer product.

    Returns:
        (n,) or (h, w) float32.

    Raises:
        ValueError: not 0-, 1- or 2-D, empty, or 2-D and ``separable``.
    """
    taps = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32, device=device)
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"filter taps have shape {tuple(taps.shape)}, expected (), (taps,) or (height, width)")
    taps = taps.reshape(1) if taps.ndim == 0 else taps
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= 8
    if separable and taps.ndim == 2:
        raise ValueError(f"separable=True needs 1-D taps, got {tuple(taps.shape)}")
    if not separable and taps.ndim == 1:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    return taps * gain ** (taps.ndim / 2)


def output_size(
    height: int, width: int, taps: tuple[int, int], up: tuple[int, int], down: tuple[int, int], padding: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of an :func:`upfirdn2d` result; ``taps`` is (width, height) of the filter.

    ValueError when the padded picture is smaller than the filter.
    """
    x0, x1, y0, y1 = padding
    padded_w, padded_h = width * up[0] + x0 + x1, height * up[1] + y0 + y1
    if padded_w < taps[0] or padded_h < taps[1]:
        raise ValueError(
            f"a picture of {height}x{width} is {padded_h}x{padded_w} after upsampling and padding, "
            f"smaller than the {taps[1]}x{taps[0]} filter; give more padding"
        )
    return (padded_h - taps[1]) // down[1] + 1, (padded_w - taps[0]) // down[0] + 1


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """The twin of :func:`cuda_ops.upfirdn2d`, where formula, arguments and errors are said."""
    (ux, uy), (dx, dy), padding = pair(up, "up"), pair(down, "down"), pads(padding)
    size = filter_size(f)
    height, width = output_size(x.shape[2], x.shape[3], size, (ux, uy), (dx, dy), padding)
    if x.shape[0] * x.shape[1] == 0:
        return x.new_zeros(x.shape[0], x.shape[1], height, width) + x.sum()
    dtype = accumulator(x.dtype)
    taps = torch.ones(1, 1, device=x.device) if f is None else f
    taps = taps.to(dtype)
    taps = taps if flip_filter else taps.flip(list(range(taps.ndim)))
    y = x.to(dtype).contiguous()
    if ux > 1 or uy > 1:
        n, c, h, w = y.shape
        y = F.pad(y.reshape(n, c, h, 1, w, 1), (0, ux - 1, 0, 0, 0, uy - 1)).reshape(n, c, h * uy, w * ux)
    y = F.pad(y, list(padding))
    if taps.ndim == 2:
        y = _depthwise(y, taps * gain, dx, dy)
    else:
        y = _depthwise(_depthwise(y, taps[None] * gain, dx, 1), taps[:, None], 1, dy)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def _depthwise(x: Tensor, taps: Tensor, stride_x: int, stride_y: int) -> Tensor:
    """Correlate every plane of x (N, C, H, W) with taps (fh, fw)."""
    channels = x.shape[1]
    return F.conv2d(x, taps[None, None].expand(channels, 1, *taps.shape), stride=(stride_y, stride_x), groups=channels)


def transposed_arguments(
    shape: Sequence[int],
    out: Sequence[int],
    taps: tuple[int, int],
    up: Sequence[int],
    down: Sequence[int],
    p: Sequence[int],
) -> tuple[int, int, int, int]:
    """Padding with which upfirdn2d (up and down exchanged, flip inverted) is the gradient of upfirdn2d.

    Args:
        shape, out: (height, width) of input and output.
        taps: (width, height) of the filter.
        up, down: [x, y].
        p: [x0, x1, y0, y1].
    """
    return (
        taps[0] - p[0] - 1,
        shape[1] * up[0] - out[1] * down[0] + p[0] - up[0] + 1,
        taps[1] - p[2] - 1,
        shape[0] * up[1] - out[0] * down[1] + p[2] - up[1] + 1,
    )


def filter2d_padding(f: Tensor | None, padding: Padding) -> tuple[int, int, int, int]:
    """Padding with which a filter keeps the size of its picture, plus ``padding``."""
    (fw, fh), (x0, x1, y0, y1) = filter_size(f), pads(padding)
    return x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2


def upsample2d_padding(f: Tensor | None, up: tuple[int, int], padding: Padding) -> tuple[int, int, int, int]:
    """Padding with which upsampling multiplies the size by ``up`` (x, y), plus ``padding``."""
    (fw, fh), (x0, x1, y0, y1), (ux, uy) = filter_size(f), pads(padding), up
    return x0 + (fw + ux - 1) // 2, x1 + (fw - ux) // 2, y0 + (fh + uy - 1) // 2, y1 + (fh - uy) // 2


def downsample2d_padding(f: Tensor | None, down: tuple[int, int], padding: Padding) -> tuple[int, int, int, int]:
    """Padding with which downsampling divides the size by ``down`` (x, y), plus ``padding``."""
    (fw, fh), (x0, x1, y0, y1), (dx, dy) = filter_size(f), pads(padding), down
    return x0 + (fw - dx + 1) // 2, x1 + (fw - dx) // 2, y0 + (fh - dy + 1) // 2, y1 + (fh - dy) // 2


# ---------------------------------------------------------------- small ones


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with broadcasting."""
    return torch.addcmul(c, a, b)
