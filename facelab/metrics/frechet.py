# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two sets of feature vectors (Heusel et al., arXiv 1706.08500).

Everything is float64. Means and covariances are accumulated in one pass with the parallel update
of Chan, Golub and LeVeque (1983), so sets may be larger than memory and split over processes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureStats:
    """Count, mean and scatter of D-dimensional features, as they come in.

    >>> stats = FeatureStats(1).add(torch.tensor([[1.0], [2.0]])).add(torch.tensor([[6.0]]))
    >>> stats.count, stats.mean.tolist(), stats.covariance().tolist()
    (3, [3.0], [[7.0]])
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        if dimension < 1:
            raise ValueError(f"features need at least 1 dimension, got {dimension}")
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> FeatureStats:
        """Take (B, D) features; returns itself.

        Raises:
            ValueError: another width, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (B, {len(self.mean)}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values")
        if len(features) == 0:
            return self
        batch = features.detach().to(self.mean)
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._absorb(len(batch), mean, centred.T @ centred)
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Take in what another accumulator has seen; returns itself."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge {len(other.mean)}-d statistics into {len(self.mean)}-d ones")
        if other.count:
            self._absorb(other.count, other.mean.to(self.mean), other._scatter.to(self.mean))
        return self

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def covariance(self, ddof: int = 1) -> Tensor:
        """(D, D) covariance: divided by ``count - ddof`` (1: numpy.cov, pytorch-fid; 0: population, EG3D)."""
        if self.count <= ddof:
            raise ValueError(f"a covariance needs more than {ddof} samples, got {self.count}")
        return self._scatter / (self.count - ddof)

    def all_reduce(self) -> FeatureStats:
        """Merge over all processes of torch.distributed in rank order; the same result on each. Returns itself."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        count = torch.tensor([self.count], dtype=torch.float64, device=self.mean.device)
        packed = torch.cat([count, self.mean, self._scatter.flatten()])
        parts = [torch.empty_like(packed) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, packed)
        merged = FeatureStats(len(self.mean), self.mean.device)
        for part in parts:
            number, mean, scatter = part[0], part[1 : 1 + len(self.mean)], part[1 + len(self.mean) :]
            if number > 0:
                merged._absorb(round(float(number)), mean, scatter.view_as(self._scatter))
        self.count, self.mean, self._scatter = merged.count, merged.mean, merged._scatter
        return self


def frechet_distance(first: FeatureStats, second: FeatureStats, ddof: int = 1) -> float:
    """Squared Frechet distance of the normal distributions fitted to two feature sets; see :class:`FeatureStats`."""
    return frechet_from_moments(first.mean, first.covariance(ddof), second.mean, second.covariance(ddof))


def frechet_from_moments(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` in float64.

    The trace of the root is that of the symmetric ``(R C2 R)^(1/2)`` with R = C1^(1/2), whose
    eigenvalues are real: no complex parts to discard and no offset for singular covariances.

    Args:
        mean_1, mean_2: (D,).
        cov_1, cov_2: (D, D) symmetric, positive semidefinite.
    """
    mean_1, cov_1, mean_2, cov_2 = (x.double() for x in (mean_1, cov_1, mean_2, cov_2))
    if not mean_1.shape == mean_2.shape == cov_1.shape[:1] == cov_2.shape[:1]:
        raise ValueError(f"moments of {tuple(mean_1.shape)} and {tuple(mean_2.shape)} features cannot be compared")
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov_2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root
    return max(float(distance), 0.0)  # rounding may leave -1e-12 for equal sets
