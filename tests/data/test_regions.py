# SPDX-License-Identifier: Apache-2.0
"""Nine overlapping region channels: groups, widening, order, colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facelab.data.classes import CLASSES, FLIP_TABLE, NUM_CLASSES
from facelab.data.labels import flip_labels
from facelab.data.regions import (
    REFERENCE_WIDENING,
    REGION_CLASSES,
    REGION_PALETTE,
    REGIONS,
    WIDENING,
    colour_regions,
    fuse_regions,
)


def by_hand(label_map: np.ndarray, widening: dict[int, int]) -> np.ndarray:
    """(H, W) -> (9, H, W), pixel by pixel."""
    height, width = label_map.shape
    out = np.zeros((len(REGIONS), height, width), np.float32)
    for row, column in np.ndindex(height, width):
        number = int(label_map[row, column])
        side = widening.get(number, 1)
        channel = next(k for k, group in enumerate(REGION_CLASSES.values()) if number in group)
        top, left = max(0, row - (side - 1) // 2), max(0, column - (side - 1) // 2)
        out[channel, top : row + side // 2 + 1, left : column + side // 2 + 1] = 1
    return out


@pytest.mark.parametrize("reference", [False, True])
def test_channels_are_the_widened_classes(reference, device):
    maps = torch.from_numpy(np.random.default_rng(1).integers(0, NUM_CLASSES, (2, 11, 9)))
    found = fuse_regions(maps.to(device), reference=reference)
    squares = REFERENCE_WIDENING if reference else WIDENING
    expected = np.stack([by_hand(one.numpy(), squares) for one in maps])
    assert found.dtype == torch.float32 and (found.cpu().numpy() == expected).all()


def test_every_class_belongs_to_one_region():
    listed = [c for group in REGION_CLASSES.values() for c in group]
    assert sorted(listed) == list(range(NUM_CLASSES)) and len(REGIONS) == len(REGION_PALETTE) == 9
    names = {region: [CLASSES[c] for c in group] for region, group in REGION_CLASSES.items()}
    assert names["mouth"] == ["mouth", "u_lip", "l_lip"] and REGIONS.index("mouth") == 3
    assert names["brow"] == ["l_brow", "r_brow"] and REGIONS.index("brow") == 4


def test_even_square_of_the_reference_is_lopsided_and_ours_is_not():
    dot = torch.zeros(1, 9, 9, dtype=torch.uint8)
    dot[0, 4, 4] = 6
    brow = REGIONS.index("brow")
    spread = fuse_regions(dot, reference=True)[0, brow].nonzero()
    assert spread.amin(0).tolist() == [3, 3] and spread.amax(0).tolist() == [6, 6] and len(spread) == 16
    ours = fuse_regions(dot)[0, brow]
    assert ours.sum() == 25 and ours.equal(ours.flip(0)) and ours.equal(ours.flip(1))


def test_mirroring_commutes_with_our_widening_only():
    maps = torch.from_numpy(np.random.default_rng(3).integers(0, NUM_CLASSES, (1, 12, 12)))
    assert fuse_regions(flip_labels(maps).flip(-1)).equal(fuse_regions(maps).flip(-1))
    assert not fuse_regions(maps.flip(-1), reference=True).equal(fuse_regions(maps, reference=True).flip(-1))


def test_left_and_right_are_treated_alike():
    groups = {c: name for name, group in REGION_CLASSES.items() for c in group}
    for left, right in enumerate(FLIP_TABLE):
        assert groups[left] == groups[right] and WIDENING.get(left) == WIDENING.get(right)


def test_other_groups_and_squares():
    maps = torch.tensor([[[1, 4, 0, 0, 13]]])
    found = fuse_regions(maps, [(0,), (4, 13), ()], widening={4: 3}, dtype=torch.float64)
    assert found.dtype == torch.float64 and found[0, :, 0].tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 1], [0] * 5]


def test_colours_follow_the_strongest_channel():
    scores = torch.zeros(1, 9, 1, 3)
    scores[0, 4, 0, 1], scores[0, 7, 0, 2] = 2.0, 0.1
    assert colour_regions(scores)[0, :, 0].T.tolist() == [[0, 0, 0], [13, 179, 158], [107, 137, 198]]
    with pytest.raises(ValueError, match="at most 9"):
        colour_regions(torch.zeros(1, 10, 2, 2))


@pytest.mark.parametrize(
    ("label_map", "options", "words"),
    [
        (torch.full((1, 2, 2), 19), {}, "0..18, got 19 in the label map"),
        (torch.full((1, 2, 2), -1), {}, "got -1"),
        (torch.zeros(2, 2, dtype=torch.long), {}, r"\(N, H, W\)"),
        (torch.zeros(1, 2, 2), {}, "integers"),
        (torch.zeros(1, 2, 2, dtype=torch.long), {"groups": [(19,)]}, "19 in the groups"),
        (torch.zeros(1, 2, 2, dtype=torch.long), {"widening": {1: 0}}, "at least 1 pixel"),
        (torch.zeros(1, 2, 2, dtype=torch.long), {"widening": {}, "reference": True}, "got both"),
    ],
)
def test_bad_arguments_are_named(label_map, options, words):
    with pytest.raises(ValueError, match=words):
        fuse_regions(label_map, **options)
