# SPDX-License-Identifier: Apache-2.0
"""Path length regularisation (StyleGAN2, arXiv 1912.04958, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.losses.adversarial import at_least_float32


@dataclass(frozen=True)
class PathLength:
    """What :func:`path_length` found.

    Attributes:
        penalty: 0-d, to be minimised.
        lengths: (N,) how far each picture moves per unit of its codes, attached.
        mean: 0-d, the running mean after this batch, detached: the next call's ``mean``.
    """

    penalty: Tensor
    lengths: Tensor
    mean: Tensor


def path_lengths(image: Tensor, codes: Tensor, noise: Tensor) -> Tensor:
    """(N,): sqrt(mean over the codes of the squared norm of the gradient of sum(image * noise) / sqrt(H W)).

    The result is differentiable in whatever made the pictures; a picture on which its codes have no influence at all
    has length 0, where the square root has no finite gradient. Under autocast the gradient is taken outside it.

    Args:
        image: (N, C, H, W), made from ``codes``.
        codes: (N, L, W) with ``requires_grad``.
        noise: (N, C, H, W) standard normal.

    Raises:
        ValueError: shapes that do not fit, or codes without a gradient.
    """
    if not codes.requires_grad:
        raise ValueError("path lengths need codes.requires_grad_() before the generator sees them")
    if noise.shape != image.shape or codes.ndim != 3 or len(codes) != len(image):
        raise ValueError(
            f"expected noise of the shape of the pictures {tuple(image.shape)} and codes ({len(image)}, L, W), got "
            f"{tuple(noise.shape)} and {tuple(codes.shape)}"
        )
    with torch.autocast(image.device.type, enabled=False):
        scaled = at_least_float32(image) * (noise / math.sqrt(image.shape[2] * image.shape[3]))
        (gradient,) = torch.autograd.grad(scaled.sum(), codes, create_graph=True)
        return at_least_float32(gradient).square().sum(dim=2).mean(dim=1).sqrt()


def path_length(image: Tensor, codes: Tensor, noise: Tensor, mean: Tensor, decay: float = 0.01) -> PathLength:
    """Mean squared deviation of the lengths from their running mean.

    The running mean takes this batch in first, and the gradient flows through it too.

    Args:
        image, codes, noise: see :func:`path_lengths`.
        mean: 0-d running mean so far; 0 at the start.
        decay: share of this batch in the running mean.

    Raises:
        ValueError: as :func:`path_lengths`; a decay outside (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1], got {decay}")
    lengths = path_lengths(image, codes, noise)
    before = mean.detach().to(lengths)
    now = before + decay * (lengths.mean() - before)
    return PathLength((lengths - now).square().mean(), lengths, now.detach())
