# SPDX-License-Identifier: Apache-2.0
"""Regions by name, and codes of regions."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from facelab.data.regions import REGION_CLASSES
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.methods.cnerf import mixing
from facelab.methods.cnerf.regions import (
    NAMES,
    README_NAMES,
    RegionNumberWarning,
    exchange_table,
    parse_regions,
    region_index,
    region_names,
)

K, N, W, D = 9, 2, 4, 3


def test_order_of_the_channels() -> None:
    """The order the data set code feeds, not the one of the README."""
    assert NAMES[3] == "mouth" and NAMES[4] == "brow" and README_NAMES[3] == "brow" and README_NAMES[4] == "mouth"
    assert REGION_CLASSES[NAMES[3]] == (10, 11, 12) and REGION_CLASSES[NAMES[4]] == (6, 7)
    assert sorted(README_NAMES) == sorted(NAMES)
    table = exchange_table()
    assert [README_NAMES[i] for i in table] == list(NAMES)


def test_names_are_quiet_and_numbers_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_regions("Hair, eye,eye") == (2, 7)
        assert parse_regions(["lips", "eyebrow"]) == (3, 4)
    with pytest.warns(RegionNumberWarning, match=r"2 = eye, 3 = mouth \(CNeRF's README calls 3 brow\)"):
        assert parse_regions("2,3") == (2, 3)
    with pytest.warns(RegionNumberWarning, match=r"7 = hair; names"):
        assert parse_regions([7]) == (7,)
    with pytest.raises(UserError, match="unknown region 'hare', expected background.*Did you mean 'hair'"):
        parse_regions("eye,hare")
    with pytest.raises(UserError, match="region 9 does not exist, expected 0 to 8"):
        parse_regions("9")
    with pytest.raises(UserError, match="no region given"):
        parse_regions(" , ")
    assert region_names(5)[4] == "region_4" and region_index("region_4", region_names(5)) == 4


def codes(offset: float = 0.0) -> Codes:
    shape = torch.arange(N * K * W, dtype=torch.float32).reshape(N, K, W) + offset
    return Codes({"shape": shape, "texture": shape + 1000, "decoder": torch.full((N, W), offset)})


def test_codes_in_a_row_and_by_layer() -> None:
    c = codes()
    row = mixing.interleave(c.values["shape"], c.values["texture"])
    assert row.shape == (N, 2 * K, W) and torch.equal(row[:, 7], c.values["texture"][:, 3])
    for again, part in zip(mixing.separate(row), mixing.PARTS, strict=True):
        assert torch.equal(again, c.values[part])
    styles = mixing.layer_styles(c.values["shape"], c.values["texture"], D)
    assert styles.shape == (N, K, D + 2, W)
    assert torch.equal(styles[:, 5, :3], c.values["shape"][:, 5:6].expand(-1, 3, -1))
    assert torch.equal(styles[:, 5, 3:], c.values["texture"][:, 5:6].expand(-1, 2, -1))
    named = mixing.by_name(c)
    assert list(named)[:3] == ["background.shape", "background.texture", "face.shape"] and len(named) == 2 * K
    assert torch.equal(named["hair.texture"], c.values["texture"][:, 7])
    with pytest.raises(ValueError, match="expected codes"):
        mixing.separate(row[:, 1:])


def test_mixing_two_codes() -> None:
    first, second = torch.zeros(N, W), torch.ones(N, W)
    choices = torch.tensor([[0, 1], [2, 0], [1, 2]])
    shape, texture = mixing.mix(first, second, choices)
    assert shape[..., 0].tolist() == [[0, 1, 0], [0, 0, 1]]  # of the second only where the choice is 2
    assert texture[..., 0].tolist() == [[0, 1, 1], [1, 0, 1]]
    with pytest.raises(ValueError, match="choices are 0, 1 or 2"):
        mixing.mix(first, second, choices + 1)


def test_random_choices() -> None:
    draws = Draws(3).at(phase="g")
    drawn = mixing.draw_choices(draws, 200, 10)
    assert torch.equal(drawn, mixing.draw_choices(draws, 200, 10))
    assert not torch.equal(drawn, mixing.draw_choices(draws.at(chunk=1), 200, 10))
    counts = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert len(counts) == 3 and (counts - 1 / 3).abs().max() < 0.05
    replayed = random.Random(5)
    expected = [replayed.randint(0, 2) for _ in range(6)]  # regions outside, samples inside
    assert mixing.original_choices(random.Random(5), 3, 2).flatten().tolist() == expected


def test_blending_some_regions() -> None:
    a, b = codes(), codes(500.0)
    swapped = mixing.blend(a, b, "hair")
    assert torch.equal(swapped.values["shape"][:, 7], b.values["shape"][:, 7])
    assert torch.equal(swapped.values["texture"][:, 7], b.values["texture"][:, 7])
    others = [k for k in range(K) if k != 7]
    assert torch.equal(swapped.values["shape"][:, others], a.values["shape"][:, others])
    assert swapped.values["decoder"] is a.values["decoder"]
    half = mixing.blend(a, b[0], "eye,nose", 0.5, ["texture"])
    assert torch.equal(half.values["shape"], a.values["shape"])
    expected = (a.values["texture"] + b.values["texture"][:1])[:, [2, 5]] / 2
    torch.testing.assert_close(half.values["texture"][:, [2, 5]], expected)
    with pytest.raises(UserError, match="Did you mean 'nose'"):
        mixing.blend(a, b, "noze")
    with pytest.raises(ValueError, match="parts are shape and texture"):
        mixing.blend(a, b, "nose", parts=["colour"])
