# SPDX-License-Identifier: Apache-2.0
"""Overlap of label maps against counts by hand."""

from __future__ import annotations

import pytest
import torch

from facelab.metrics.segmentation import OverlapMeter, mean_iou, overlap_counts

TARGET = torch.tensor([[[0, 0, 1], [1, 1, 2]]])
GUESS = torch.tensor([[[0, 1, 1], [1, 1, 1]]])
# class 0: 1 of 2, class 1: 3 of 5, class 2: 0 of 1, class 3: absent


def test_counts_by_hand():
    intersection, union = overlap_counts(GUESS, TARGET, classes=4)
    assert intersection.tolist() == [[1, 3, 0, 0]] and union.tolist() == [[2, 5, 1, 0]]


def test_present_and_original_means_by_hand():
    assert float(mean_iou(GUESS, TARGET, 4, "present")) == pytest.approx((1 / 2 + 3 / 5 + 0) / 3)
    assert float(mean_iou(GUESS, TARGET, 4, "original")) == pytest.approx((1 / 2 + 3 / 5) / 4, abs=1e-6)


def test_a_perfect_result_is_1_in_present_and_less_in_original():
    assert float(mean_iou(TARGET, TARGET, 19)) == 1
    assert float(mean_iou(TARGET, TARGET, 19, "original")) == pytest.approx(3 / 19, abs=1e-6)


def test_meter_pools_pixels_per_class_and_averages_per_picture():
    meter = OverlapMeter(4).add(torch.cat([GUESS, TARGET]), torch.cat([TARGET, TARGET])).add(GUESS, TARGET)
    assert meter.pictures == 3
    per_class = meter.per_class()
    # twice the guess (1/2, 3/5, 0/1) and once the target itself (2/2, 3/3, 1/1)
    torch.testing.assert_close(per_class[:3], torch.tensor([4 / 6, 9 / 13, 1 / 3], dtype=torch.float64))
    assert bool(per_class[3].isnan())
    assert meter.mean() == pytest.approx((4 / 6 + 9 / 13 + 1 / 3) / 3)
    assert meter.mean_per_picture() == pytest.approx((2 * 1.1 / 3 + 1) / 3)
    assert meter.mean_per_picture("original") == pytest.approx((2 * 1.1 / 4 + 3 / 4) / 3, abs=1e-6)


def test_uint8_maps_do_not_overflow():
    maps = torch.full((3, 40, 40), 18, dtype=torch.uint8)
    intersection, union = overlap_counts(maps, maps)
    assert intersection[:, 18].tolist() == [1600] * 3 and union.sum() == 4800


@pytest.mark.parametrize(
    ("guess", "target", "words"),
    [
        (GUESS, TARGET[:, :1], "must both be"),
        (GUESS.float(), TARGET.float(), "integers"),
        (GUESS + 3, TARGET, r"0\.\.3, got 3\.\.4"),
        (GUESS, TARGET - 1, r"got -1"),
    ],
)
def test_bad_maps_are_refused(guess, target, words):
    with pytest.raises(ValueError, match=words):
        overlap_counts(guess, target, classes=4)


def test_unknown_kinds_and_empty_meters_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'present'"):
        mean_iou(GUESS, TARGET, 4, "presnt")
    with pytest.raises(ValueError, match="no pictures"):
        OverlapMeter().mean()
