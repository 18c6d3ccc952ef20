# SPDX-License-Identifier: Apache-2.0
"""Losses of inversions as functions of a :class:`~facelab.inversion.problem.Moment`; each returns (N,)."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.inversion.noise import noise_correlations
from facelab.inversion.problem import Moment, Target, Term
from facelab.inversion.start import CodeStatistics
from facelab.losses.perceptual import PerceptualNet, at_most, perceptual_distance
from facelab.losses.reconstruction import SHARPNESS, picture_mse, segmentation_cross_entropy

SMALLEST_SPREAD = 1e-4  # a code entry that hardly moves is not divided by less


def picture_term(moment: Moment) -> Tensor:
    """Mean squared difference of the pictures."""
    return picture_mse(moment.output.rgb, moment.target.picture)


def perceptual_term(net: PerceptualNet, target: Target, side: int = 256) -> Term:
    """Perceptual distance of the pictures, which are brought down to ``side`` pixels; the target's features are
    computed once."""
    with torch.no_grad():
        wanted = net.features(at_most(target.picture, side))
    return lambda moment: perceptual_distance(net, wanted, at_most(moment.output.rgb, side))


def scores_term(moment: Moment) -> Tensor:
    """Mean squared difference of the segmentation's scores. ValueError where either is missing."""
    if moment.output.semantics is None or moment.target.scores is None:
        raise ValueError("a loss of scores needs a generator with segmentation and a target with scores")
    return picture_mse(moment.output.semantics, moment.target.scores)


def labels_term(sharpness: float = SHARPNESS) -> Term:
    """Cross entropy of the segmentation. ValueError where it or the target's labels are missing."""

    def term(moment: Moment) -> Tensor:
        if moment.output.semantics is None or moment.target.labels is None:
            raise ValueError("a loss of labels needs a generator with segmentation and a target with labels")
        return segmentation_cross_entropy(moment.output.semantics, moment.target.labels, sharpness)

    return term


def prior_term(statistics: CodeStatistics) -> Term:
    """How far codes lie from the average: the mean square of all entries in standard deviations; 1 for random codes."""
    average, spread = statistics.average.values, statistics.spread.values

    def term(moment: Moment) -> Tensor:
        parts = [
            ((code - average[name]) / spread[name].clamp_min(SMALLEST_SPREAD)).flatten(1)
            for name, code in moment.codes.values.items()
            if name in average
        ]
        return torch.cat(parts, dim=1).square().mean(1)

    return term


def offsets_term(moment: Moment) -> Tensor:
    """FENeRF's: mean squares of what was added to each vector of the codes, summed (arXiv 2111.15490)."""
    parts = [value.square().mean(-1).reshape(len(value), -1).sum(1) for value in moment.offsets.values()]
    return torch.stack(parts).sum(0)


def noise_term(moment: Moment) -> Tensor:
    """What keeps noise maps noise, summed over the maps."""
    if not moment.noise:
        return moment.target.picture.new_zeros(len(moment.target))
    return noise_correlations(list(moment.noise.values()))
