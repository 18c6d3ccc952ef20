# SPDX-License-Identifier: Apache-2.0
"""Codes that change into each other: closed curves against scipy, straight lines against hand-made mixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facelab.generator import Codes
from facelab.inference.interpolation import closed_cubic_spline, loop_codes, straight_codes


def heads(count: int) -> list[Codes]:
    source = torch.Generator().manual_seed(count)
    return [
        Codes({"geo": torch.randn(1, 2, 3, generator=source), "app": torch.randn(1, 4, generator=source)})
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_loops_pass_through_every_head_and_close(count: int) -> None:
    keys, frames = heads(count), 4
    loop = list(loop_codes(keys, "both", frames))
    assert len(loop) == count * frames
    for k, key in enumerate(keys):
        assert all(torch.equal(loop[k * frames].values[name], value) for name, value in key.values.items())
    # turned by one head, the curve is the same: it has no beginning
    turned = list(loop_codes([*keys[1:], keys[0]], "both", frames))
    for a, b in zip(loop[frames:] + loop[:frames], turned, strict=True):
        torch.testing.assert_close(a.values["geo"], b.values["geo"])


def test_loops_are_smooth_at_the_seam() -> None:
    curve = closed_cubic_spline(np.random.RandomState(0).randn(4, 2))
    step = 1e-4

    def derivatives(place: float) -> list[np.ndarray]:
        before, here, after = (curve(place + d) for d in (-step, 0.0, step))
        return [(here - before) / step, (after - here) / step]

    for place in (0.0, 2.0, 4.0):
        first, second = derivatives(place)
        assert np.abs(first - second).max() < 0.01 < np.abs(first).max()
    assert np.allclose(curve(0.3), curve(4.3))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_loops_are_the_tiled_interpolation_of_the_original(count: int) -> None:
    """Five copies side by side, cubic (not-a-knot) in between: the farther their ends, the less these weigh."""
    interpolate = pytest.importorskip("scipy.interpolate")
    values = np.random.RandomState(1).randn(count, 3)
    tiled = interpolate.interp1d(np.arange(-2 * count, 3 * count), np.tile(values, (5, 1)), kind="cubic", axis=0)
    at = np.arange(count * 10) / 10
    difference = np.abs(closed_cubic_spline(values)(at) - tiled(at)).max() / np.ptp(values, axis=0).max()
    assert difference < {2: 0.02, 3: 1e-3, 6: 1e-6}[count]


def test_what_does_not_move_is_the_first_head() -> None:
    keys = heads(3)
    loop = list(loop_codes(keys, "geo", 2))
    assert all(torch.equal(codes.values["app"], keys[0].values["app"]) for codes in loop)
    assert torch.equal(loop[2].values["geo"], keys[1].values["geo"])
    still = list(loop_codes(keys, "non", 2))
    assert all(torch.equal(codes.values["geo"], keys[0].values["geo"]) for codes in still) and len(still) == 6


def test_straight_lines() -> None:
    keys = heads(3)
    line = list(straight_codes(keys, "both", [0.0, 0.5]))
    assert len(line) == 4
    torch.testing.assert_close(line[1].values["app"], (keys[0].values["app"] + keys[1].values["app"]) / 2)
    assert torch.equal(line[2].values["geo"], keys[1].values["geo"])
    alone = list(straight_codes(keys[:1], "both", [0.0, 0.3, 1.0]))
    assert len(alone) == 3 and all(torch.equal(a.values["geo"], keys[0].values["geo"]) for a in alone)
