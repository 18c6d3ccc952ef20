# SPDX-License-Identifier: Apache-2.0
"""Precision and recall by hand."""

from __future__ import annotations

import pytest
import torch

from facelab.metrics import manifold
from facelab.metrics.manifold import precision_recall

REAL = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # distance to the nearest other: 1, 1, 1, 8
FAKE = torch.tensor([[0.5], [3.0], [3.5], [19.0]])  # 2.5, 0.5, 0.5, 15.5


def test_shares_by_hand() -> None:
    found = precision_recall(REAL, FAKE, neighbours=1)
    # generated: 0.5 within 1 of 0; 3.0 within 1 of 2; 3.5 within 8 of 10 (6.5); 19 is 9 from 10
    # real: 0, 1, 2 within 2.5 of 0.5; 10 within 15.5 of 19
    assert found.precision == 3 / 4 and found.recall == 1
    assert precision_recall(FAKE, REAL, neighbours=1).precision == 1


def test_equal_sets_and_far_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == manifold.PrecisionRecall(1, 1)
    assert precision_recall(x, x + 100) == manifold.PrecisionRecall(0, 0)
    y = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    whole = precision_recall(x, y)
    monkeypatch.setattr(manifold, "BLOCK", 7)
    assert precision_recall(x, y) == whole and 0 < whole.precision < 1


def test_bad_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 features of each set, got 3"):
        precision_recall(REAL[:3], FAKE)
    with pytest.raises(ValueError, match=r"expected \(N, D\)"):
        precision_recall(REAL, FAKE.expand(4, 2))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(REAL, FAKE * torch.nan)
