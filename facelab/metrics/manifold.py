# SPDX-License-Identifier: Apache-2.0
"""Precision and recall of generated pictures by nearest neighbours (Kynkaanniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # rows of a distance matrix held at a time


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in 0..1.

    Attributes:
        precision: of the generated features that lie in the manifold of the real ones.
        recall: of the real features that lie in the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """A feature lies in a set's manifold if some member is not farther away than that member's k-th neighbour.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        neighbours: k; the point itself is not counted.

    Raises:
        ValueError: other shapes, values that are not finite, or too few features for k neighbours.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"expected (N, D) and (M, D) features, got {tuple(real.shape)} and {tuple(fake.shape)}")
    if neighbours < 1 or min(len(real), len(fake)) <= neighbours:
        fewest = min(len(real), len(fake))
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} features of each set, got {fewest}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features hold NaN or infinite values")
    return PrecisionRecall(_share_inside(fake, real, neighbours), _share_inside(real, fake, neighbours))


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radius = torch.cat(
        [_distances(rows, manifold).kthvalue(neighbours + 1, dim=1).values for rows in manifold.split(BLOCK)]
    )
    inside = sum(int((_distances(rows, manifold) <= radius).any(dim=1).sum()) for rows in points.split(BLOCK))
    return inside / len(points)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Euclidean, by differences: the distance of a point to itself is exactly 0."""
    return torch.cdist(rows.double(), columns.double(), compute_mode="donot_use_mm_for_euclid_dist")
