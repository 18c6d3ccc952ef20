# SPDX-License-Identifier: Apache-2.0
"""Frechet distance against formulas, scipy and numpy; accumulation in pieces and across processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.metrics.frechet import FeatureStats, frechet_distance, frechet_from_moments


def normal(count, dimension, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing * scale + shift


def stats_of(features):
    return FeatureStats(features.shape[1]).add(features)


def test_one_dimension_by_hand():
    # N(1, 4) and N(4, 9): (1 - 4)^2 + (2 - 3)^2 = 10
    one = lambda value: torch.tensor([value])
    assert frechet_from_moments(one(1.0), one([4.0]), one(4.0), one([9.0])) == pytest.approx(10)


def test_diagonal_covariances_by_hand():
    mean = torch.zeros(3)
    first, second = torch.diag(torch.tensor([1.0, 4.0, 0.0])), torch.diag(torch.tensor([9.0, 4.0, 25.0]))
    assert frechet_from_moments(mean, first, mean, second) == pytest.approx((1 - 3) ** 2 + 0 + 25)


def test_covariances_that_do_not_commute_equal_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    real, fake = normal(50, 6, 0), normal(40, 6, 1, scale=1.5, shift=0.3)
    first, second = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    gap = real.mean(0) - fake.mean(0)
    root = linalg.sqrtm(first @ second).real
    expected = float(gap @ gap) + np.trace(first + second - 2 * root)
    assert frechet_distance(stats_of(real), stats_of(fake)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_have_distance_zero_even_with_fewer_samples_than_dimensions():
    few = normal(5, 32, 2)
    assert frechet_distance(stats_of(few), stats_of(few)) == pytest.approx(0, abs=1e-4)
    shifted = frechet_distance(stats_of(few), stats_of(few + 1))
    assert shifted == pytest.approx(32, rel=1e-5)  # only the mean moved, by 1 in each of 32 dimensions


def test_distance_is_symmetric():
    first, second = stats_of(normal(30, 4, 3)), stats_of(normal(30, 4, 4))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-10)


@pytest.mark.parametrize("ddof", [0, 1])
def test_pieces_give_what_numpy_gives_at_once(ddof):
    features = normal(101, 7, 5, shift=1000.0)  # a large mean costs digits in naive sums
    whole, left, right = FeatureStats(7), FeatureStats(7), FeatureStats(7)
    for part in features.split(13):
        whole.add(part)
    left.add(features[:1])
    right.add(features[1:60]).add(features[60:]).add(features[:0])
    merged = FeatureStats(7).merge(left).merge(right).merge(FeatureStats(7))
    for stats in (whole, merged):
        assert stats.count == 101
        np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.covariance(ddof), np.cov(features.numpy().T, ddof=ddof), rtol=1e-9)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        FeatureStats(3).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStats(1).add(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="more than 1"):
        FeatureStats(1).add(torch.zeros(1, 1)).covariance()


WORKER = """
import sys, torch
from facelab.metrics.frechet import FeatureStats
rank, store, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
features = torch.randn(21, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
stats = FeatureStats(4).add(features[:5] if rank == 0 else features[5:]).all_reduce()
torch.save({"count": stats.count, "mean": stats.mean, "cov": stats.covariance()}, output)
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    root = Path(__file__).resolve().parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}.pt")], cwd=root
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    features = torch.randn(21, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = stats_of(features)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got["count"] == 21
        torch.testing.assert_close(got["mean"], alone.mean)
        torch.testing.assert_close(got["cov"], alone.covariance())
