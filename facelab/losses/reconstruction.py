# SPDX-License-Identifier: Apache-2.0
"""How far a rendered picture and its segmentation are from given ones: one number for each of N pictures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 5.0  # scores in -1..1 times this are taken for logits


def picture_mse(picture: Tensor, target: Tensor) -> Tensor:
    """(N, C, H, W) against the same -> (N,) mean squared differences. ValueError for other shapes."""
    if picture.shape != target.shape:
        raise ValueError(f"expected pictures of one shape, got {tuple(picture.shape)} and {tuple(target.shape)}")
    return F.mse_loss(picture, target, reduction="none").flatten(1).mean(1)


def segmentation_cross_entropy(
    semantics: Tensor, labels: Tensor, sharpness: float = SHARPNESS, ignore: int = -1
) -> Tensor:
    """Scores of K classes against label maps -> (N,) mean cross entropy.

    Args:
        semantics: (N, K, H, W) scores in about [-1, 1].
        labels: (N, H, W) integers in 0..K-1, or ``ignore`` where nothing is known.
        sharpness: factor that makes logits of scores.

    Raises:
        ValueError: other shapes, or a label that is no class.
    """
    if semantics.ndim != 4 or labels.shape != (len(semantics), *semantics.shape[2:]):
        raise ValueError(f"expected labels of {tuple(semantics.shape)} scores, got {tuple(labels.shape)}")
    known = labels != ignore
    if bool(((labels < 0) | (labels >= semantics.shape[1]))[known].any()):
        raise ValueError(f"labels must be 0..{semantics.shape[1] - 1} or {ignore}, got others")
    losses = F.cross_entropy(sharpness * semantics, torch.where(known, labels, 0).long(), reduction="none")
    known = known.to(losses)
    return (losses * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)
