# SPDX-License-Identifier: Apache-2.0
"""Convolutions with resampling and modulation (StyleGAN2, arXiv 1912.04958), and the filtered leaky ReLU of StyleGAN3.

Compositions of native convolutions with :func:`cuda_ops.upfirdn2d` and :func:`cuda_ops.bias_act`, so every
order of gradient that those have is there. They run in the dtype of ``x``; under autocast the native
convolutions take autocast's dtype, and what follows them keeps it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cuda_ops import reference_filters as reference
from cuda_ops.activation import bias_act
from cuda_ops.convolution_derivatives import conv2d, conv_transpose2d
from cuda_ops.filters import upfirdn2d
from cuda_ops.reference_filters import Padding

DEMODULATION_EPS = 1e-8


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Upsample with ``f``, pad, convolve, downsample with ``f``, in the cheapest equal order.

    Args:
        x: (N, C, H, W).
        w: (O, C / groups, kh, kw), cast to the dtype of ``x``.
        f: result of :func:`cuda_ops.setup_filter`, or None.
        up, down: factors.
        padding: int, [x, y] or [x0, x1, y0, y1] of zeros around the upsampled picture; with padding k // 2
            the result is ``up / down`` times as large as ``x``.
        groups: as in a native convolution.
        flip_weight: True: correlation, as native convolutions do; False: convolution. Layers with ``up=2``
            pass False: the stored weight is then used as it is by a transposed convolution.
        flip_filter: as in :func:`cuda_ops.upfirdn2d`.

    Returns:
        (N, O, H * up / down, W * up / down).

    Raises:
        ValueError: shapes that do not fit, or factors below 1.
    """
    if w.ndim != 4 or x.ndim != 4 or x.shape[1] != w.shape[1] * groups:
        raise ValueError(f"input {tuple(x.shape)} and weight {tuple(w.shape)} do not fit with groups={groups}")
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(
            f"groups is {groups}, expected a positive number that divides the {w.shape[0]} output channels"
        )
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name} is {factor!r}, expected a positive int")
    w = w.to(x.dtype)
    kh, kw = w.shape[2:]
    p = reference.pads(padding)
    if up > 1:
        p = reference.upsample2d_padding(f, (up, up), p)
    if down > 1:
        p = reference.downsample2d_padding(f, (down, down), p)
    if kh == kw == 1 and up == 1 and down > 1:
        x = upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter)
        return _convolve(x, w, groups=groups, flip_weight=flip_weight)
    if kh == kw == 1 and up > 1 and down == 1:
        x = _convolve(x, w, groups=groups, flip_weight=flip_weight)
        return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=up**2)
    if up == 1 and down > 1:
        x = upfirdn2d(x, f, padding=p, flip_filter=flip_filter)
        return _convolve(x, w, stride=down, groups=groups, flip_weight=flip_weight)
    if up > 1:
        x, p = _transposed(x, w, up, p, groups, flip_weight)
        x = upfirdn2d(x, f, padding=p, flip_filter=flip_filter, gain=up**2)
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
    if p[0] == p[1] >= 0 and p[2] == p[3] >= 0:
        return _convolve(x, w, padding=(p[2], p[0]), groups=groups, flip_weight=flip_weight)
    return _convolve(upfirdn2d(x, None, padding=p), w, groups=groups, flip_weight=flip_weight)


def _convolve(
    x: Tensor, w: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0), groups: int = 1, flip_weight: bool = True
) -> Tensor:
    """Native convolution; ``flip_weight`` as in :func:`conv2d_resample`."""
    return conv2d(x, w if flip_weight else w.flip([2, 3]), stride=stride, padding=padding, groups=groups)


def _transposed(
    x: Tensor, w: Tensor, up: int, p: tuple[int, int, int, int], groups: int, flip_weight: bool
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Zero insertion and convolution as one transposed convolution -> its result and the padding left to do."""
    out_channels, in_channels, kh, kw = w.shape
    w = w.reshape(groups, out_channels // groups, in_channels, kh, kw).transpose(1, 2)
    w = w.reshape(groups * in_channels, out_channels // groups, kh, kw)
    w = w.flip([2, 3]) if flip_weight else w
    x0, x1, y0, y1 = p[0] - kw + 1, p[1] - kw + up, p[2] - kh + 1, p[3] - kh + up
    tx, ty = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
    x = conv_transpose2d(x, w, stride=up, padding=(ty, tx), groups=groups)
    return x, (x0 + tx, x1 + tx, y0 + ty, y1 + ty)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
) -> Tensor:
    """Convolution whose weight is scaled by a style per sample and input channel, and normalised.

    With w' = weight * style, y = conv(x, w' * d) + noise, d = (sum_{i,k} w'^2 + 1e-8)^(-1/2) per output channel.

    Args:
        x: (N, I, H, W).
        weight: (O, I, k, k), best kept in float32.
        styles: (N, I).
        noise: added after the demodulation; broadcastable to the result.
        up, down, padding, resample_filter, flip_weight: as in :func:`conv2d_resample`.
        demodulate: False: d = 1.
        fused_modconv: True: one grouped convolution with a weight per sample; False: scale the input and
            the result around a plain convolution (less memory). Equal up to rounding.

    Returns:
        (N, O, H', W') in the dtype of ``x``. In float16 with ``demodulate``, weights and styles are brought
        to size 1 first, which the demodulation takes away again but for its 1e-8.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 4 or weight.ndim != 4:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"input and weight have shapes {got}, expected (N, I, H, W) and (O, I, k, k)")
    n, out_channels, in_channels = x.shape[0], weight.shape[0], weight.shape[1]
    if x.shape[1] != in_channels or styles.shape != (n, in_channels):
        raise ValueError(
            f"styles have shape {tuple(styles.shape)} and the input {tuple(x.shape)}, "
            f"expected ({n}, {in_channels}) and {in_channels} channels"
        )
    if x.dtype == torch.float16 and demodulate:
        weight = weight / (_largest(weight, [1, 2, 3]) * math.sqrt(weight[0].numel()))
        styles = styles / _largest(styles, [1])
    scale = None
    if demodulate:
        energy = styles.square() @ weight.square().sum(dim=[2, 3]).t().to(styles.dtype)
        scale = (energy + DEMODULATION_EPS).rsqrt()
    resampling = {"f": resample_filter, "up": up, "down": down, "padding": padding, "flip_weight": flip_weight}
    if not fused_modconv or n == 0:  # a grouped convolution has at least one group
        y = conv2d_resample(x * styles.to(x.dtype)[:, :, None, None], weight, **resampling)
        return _scale_and_add(y, scale, noise)
    w = weight[None] * styles[:, None, :, None, None]
    if scale is not None:
        w = w * scale[:, :, None, None, None]
    # a reshape of one sample would lose its memory order
    joined = x if n == 1 else x.reshape(1, n * in_channels, *x.shape[2:])
    y = conv2d_resample(joined, w.reshape(n * out_channels, *w.shape[2:]), groups=n, **resampling)
    y = y if n == 1 else y.reshape(n, out_channels, *y.shape[2:])
    return y if noise is None else y + noise.to(y.dtype)


def _largest(x: Tensor, dims: list[int]) -> Tensor:
    """The largest absolute value along ``dims``; 1 where all are zero, which then stay zero when divided by it."""
    largest = x.abs().amax(dim=dims, keepdim=True)
    return largest.masked_fill(largest == 0, 1)


def _scale_and_add(y: Tensor, scale: Tensor | None, noise: Tensor | None) -> Tensor:
    """y * scale (N, O) + noise, what there is of them, in one pass."""
    factor = None if scale is None else scale.to(y.dtype)[:, :, None, None]
    if factor is None or noise is None:
        y = y if factor is None else y * factor
        return y if noise is None else y + noise.to(y.dtype)
    return reference.fma(y, factor, noise.to(y.dtype))


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Bias, upsample, leaky ReLU with gain and clamp, downsample: the non-linearity of StyleGAN3 (arXiv 2106.12423).

    A composition, with no kernel of its own: only StyleGAN3 networks call it and none of our models is one.

    Args:
        x: (N, C, H, W).
        fu, fd: filters of the upsampling and the downsampling.
        b: bias (C,).
        up, down: factors.
        padding: int, [x, y] or [x0, x1, y0, y1], in upsampled pixels.
        gain, slope, clamp: of the leaky ReLU.
        flip_filter: as in :func:`cuda_ops.upfirdn2d`.

    Returns:
        (N, C, oH, oW) with oW = (W * up + x0 + x1 - (fu_w - 1) - (fd_w - 1) + down - 1) // down.
    """
    x = bias_act(x, b)
    x = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)
