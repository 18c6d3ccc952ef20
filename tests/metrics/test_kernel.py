# SPDX-License-Identifier: Apache-2.0
"""Kernel distance by hand, against explicit double sums, and its subsets."""

from __future__ import annotations

import pytest
import torch

from facelab.metrics.kernel import kernel_distance, polynomial_mmd


def features(count, seed, shift=0.0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_two_points_by_hand():
    # D = 1: k(x, y) = (xy + 1)^3. x = 0, 1; y = 1, 2.
    # within x: k(0, 1) = 1 twice; within y: k(1, 2) = 27 twice; between: 1, 1, 8, 27
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert polynomial_mmd(first, second) == pytest.approx((2 + 54) / 2 - 2 * (1 + 1 + 8 + 27) / 4)


def test_equals_explicit_sums():
    x, y = features(9, 0), features(9, 1, shift=0.5)
    kernel = lambda a, b: (float(a @ b) / 6 + 1) ** 3
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    between = sum(kernel(a, b) for a in x for b in y) / 81
    assert polynomial_mmd(x, y) == pytest.approx(within - 2 * between)


def test_unbiased_near_zero_for_one_distribution_and_large_for_two():
    same = kernel_distance(features(600, 2), features(600, 3), subsets=20, subset_size=200)
    other = kernel_distance(features(600, 2), features(600, 4, shift=0.7), subsets=20, subset_size=200)
    assert abs(same.mean) < 0.05 and same.std > 0
    assert other.mean > 0.5


def test_subsets_depend_on_the_seed_alone():
    x, y = features(50, 5), features(40, 6)
    first = kernel_distance(x, y, subsets=3, subset_size=10, seed=1)
    assert first == kernel_distance(x, y, subsets=3, subset_size=10, seed=1)
    assert first != kernel_distance(x, y, subsets=3, subset_size=10, seed=2)


def test_a_subset_of_everything_is_the_whole_estimate():
    x, y = features(12, 7), features(12, 8)
    whole = kernel_distance(x, y, subsets=2, subset_size=1000)
    assert whole.mean == pytest.approx(polynomial_mmd(x, y)) and whole.std == pytest.approx(0, abs=1e-12)


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="M >= 2"):
        polynomial_mmd(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 1 subset"):
        kernel_distance(torch.zeros(3, 2), torch.zeros(3, 2), subsets=0)
