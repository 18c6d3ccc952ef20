# SPDX-License-Identifier: Apache-2.0
"""Penalties added to the adversarial losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.losses.adversarial import at_least_float32


def latent_penalty(predicted: Tensor, latent: Tensor) -> Tensor:
    """Mean square error between the latent a discriminator read off an image and the true one; both (N, W).

    Raises:
        ValueError: different shapes (a silent broadcast would compare the wrong things).
    """
    return _mean_square_error("latents", predicted, latent)


def pose_penalty(predicted: Tensor, angles: Tensor) -> Tensor:
    """Mean square error of the pose a discriminator read off an image; both (N, 2): (pitch, yaw) in radians.

    Raises:
        ValueError: different shapes.
    """
    return _mean_square_error("poses", predicted, angles)


def opacity_penalty(opacity: Tensor, semantics: Tensor) -> Tensor:
    """Mean square difference between what a ray stops and what its labels add up to.

    A picture over black does not tell a dark surface from an empty ray; the labels do: they add up to
    1 on the head and 0 beside it. The labels are the target, they get no gradient.

    Args:
        opacity: (N, 1, S, S) in [0, 1].
        semantics: (N, K, S, S) composited label values in [0, 1], background not among them.
    """
    target = at_least_float32(semantics).detach().sum(dim=1, keepdim=True).clamp(0, 1)
    return _mean_square_error("opacities", opacity, target)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of ``weights[name] * terms[name]``; terms of weight zero do not enter, not even their NaN.

    Raises:
        ValueError: no terms, or a term without a weight.
    """
    missing = sorted(set(terms) - set(weights))
    if missing or not terms:
        raise ValueError(f"every loss term needs a weight, these have none: {missing}" if missing else "no loss terms")
    kept = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
    if not kept:
        return torch.zeros((), device=next(iter(terms.values())).device)
    return torch.stack(kept).sum()


def _mean_square_error(what: str, predicted: Tensor, target: Tensor) -> Tensor:
    if predicted.shape != target.shape:
        raise ValueError(f"predicted {what} have shape {tuple(predicted.shape)}, true ones {tuple(target.shape)}")
    return F.mse_loss(at_least_float32(predicted), at_least_float32(target))
