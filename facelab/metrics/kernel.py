# SPDX-License-Identifier: Apache-2.0
"""Kernel distance between two sets of feature vectors (KID, Binkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the estimate over the subsets."""

    mean: float
    std: float


def polynomial_mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``, float64.

    Args:
        first: (M, D) features.
        second: (M, D) features, as many as ``first``.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(f"expected two (M, D) sets, M >= 2, got {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = first.double(), second.double()
    count, dimension = first.shape
    kernel_11 = (first @ first.T / dimension + 1) ** 3
    kernel_22 = (second @ second.T / dimension + 1) ** 3
    kernel_12 = (first @ second.T / dimension + 1) ** 3
    within = kernel_11.sum() - kernel_11.trace() + kernel_22.sum() - kernel_22.trace()
    return float(within / (count * (count - 1)) - 2 * kernel_12.mean())


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Mean of :func:`polynomial_mmd` over random subsets drawn without replacement.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        subsets: how many subsets.
        subset_size: features of each set in a subset; at most the smaller set is used.
        seed: of the choice of subsets.
    """
    if subsets < 1:
        raise ValueError(f"the kernel distance needs at least 1 subset, got {subsets}")
    size = min(subset_size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randperm(len(x), generator=generator)[:size] for x in (real, fake)] for _ in range(subsets)]
    return kernel_distance_of(real, fake, torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))


def kernel_distance_of(real: Tensor, fake: Tensor, rows_real: Tensor, rows_fake: Tensor) -> KernelDistance:
    """The kernel distance over given subsets.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        rows_real, rows_fake: (subsets, size) integer indices.
    """
    pairs = zip(rows_real.to(real.device).long(), rows_fake.to(fake.device).long(), strict=True)
    table = torch.tensor([polynomial_mmd(real[r], fake[f]) for r, f in pairs], dtype=torch.float64)
    return KernelDistance(float(table.mean()), float(table.std(correction=0)))
