# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses: non-saturating logistic, top-k, R1.

Realness tensors are logits of shape (N,) or (N, 1), high for real. Losses are 0-d tensors of at
least float32, whatever autocast made of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TOPK_DECAY = 0.99


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def d_fake_loss(realness: Tensor) -> Tensor:
    """Discriminator loss of generated images: mean softplus(D(fake)) (Goodfellow et al., arXiv 1406.2661)."""
    return F.softplus(at_least_float32(realness)).mean()


def d_real_loss(realness: Tensor) -> Tensor:
    """Discriminator loss of real images: mean softplus(-D(real))."""
    return F.softplus(-at_least_float32(realness)).mean()


def g_loss(realness: Tensor, top: int | None = None) -> Tensor:
    """Non-saturating generator loss: mean softplus(-D(fake)) over the ``top`` most real images.

    Args:
        top: number of images kept (see :func:`topk_count`); None = all.

    Raises:
        ValueError: ``top`` is not between 1 and N.
    """
    logits = at_least_float32(realness).flatten()
    if top is not None:
        if not 1 <= top <= len(logits):
            raise ValueError(f"top must lie between 1 and the number of images {len(logits)}, got {top}")
        logits = logits.topk(top).values if top < len(logits) else logits
    return F.softplus(-logits).mean()


def topk_fraction(step: int, interval: float, floor: float) -> float:
    """Fraction of generated images the generator learns from: max(0.99^(step / interval), floor).

    Top-k training of GANs (Sinha et al., arXiv 2002.06224). ValueError unless interval > 0 and 0 < floor <= 1.
    """
    if interval <= 0 or not 0 < floor <= 1:
        raise ValueError(f"top-k needs interval > 0 and 0 < floor <= 1, got {interval} and {floor}")
    return max(TOPK_DECAY ** (step / interval), floor)


def topk_count(step: int, chunk: int, interval: float, floor: float) -> int:
    """Number of images kept of a chunk: ceil(fraction * chunk), see :func:`topk_fraction`.

    >>> [topk_count(step, chunk=10, interval=2000, floor=0.6) for step in (0, 20_000, 200_000)]
    [10, 10, 6]
    """
    return min(chunk, math.ceil(topk_fraction(step, interval, floor) * chunk))


def r1_penalty(real: Tensor, realness: Tensor, grad_scale: float | Tensor = 1.0) -> Tensor:
    """R1: mean over the batch of ||grad_x D(x)||^2 at real images (Mescheder et al., arXiv 1801.04406).

    The usual loss is ``0.5 * r1_lambda * r1_penalty(...)``. The result is differentiable in the
    parameters of D. Call it outside or inside autocast: the gradient is always taken outside, so
    that its own arithmetic is not rounded to half precision.

    Args:
        real: (N, ...) input of the discriminator, with ``requires_grad``.
        realness: D(real).
        grad_scale: loss scale of fp16 training, a number or a 0-d tensor. The sum of the logits is
            multiplied by it before the gradient is taken and the gradient divided by it after, so
            that half-precision gradients do not underflow on the way.

    Raises:
        ValueError: ``real`` does not require a gradient.
    """
    if not real.requires_grad:
        raise ValueError("R1 needs real.requires_grad_() before the discriminator sees the images")
    with torch.autocast(real.device.type, enabled=False):
        scaled = at_least_float32(realness).sum() * grad_scale
        (gradient,) = torch.autograd.grad(scaled, real, create_graph=True)
        gradient = at_least_float32(gradient) / grad_scale
        return gradient.square().flatten(1).sum(1).mean()
