# SPDX-License-Identifier: Apache-2.0
"""Edits of regions: exactly those codes change, and the picture follows."""

from __future__ import annotations

import warnings

import pytest
import torch

from facelab.cameras.sphere import sphere_camera
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.methods.cnerf.editing import (
    BackgroundWarning,
    count_changes,
    mix_region,
    resample_region,
    swap_region,
)
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.regions import NAMES, RegionNumberWarning
from tests.methods.cnerf.faces import SETTINGS, tiny

HAIR, EYE = NAMES.index("hair"), NAMES.index("eye")
CAMERA = sphere_camera(0.0, 0.0)


@pytest.fixture(scope="module")
def generator() -> CNerfGenerator:
    made = tiny()
    made.update_averages()
    return made


def head(generator: CNerfGenerator, seed: int, truncation: float = 0.7) -> Codes:
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return generator.map({"z": z}, truncation=truncation)


def changed_rows(first: Codes, second: Codes) -> dict[str, list[int]]:
    """Which regions differ, by kind of code."""
    return {
        name: (value != second.values[name])[0].reshape(-1, value.shape[-1]).any(-1).nonzero()[:, 0].tolist()
        for name, value in first.values.items()
    }


def test_swap_changes_the_codes_of_the_region_alone(generator: CNerfGenerator) -> None:
    b, a = head(generator, 1), head(generator, 2)
    made = swap_region(b, a, "hair, eyes")
    assert changed_rows(b, made) == {"shape": [EYE, HAIR], "texture": [EYE, HAIR], "decoder": []}
    for part in ("shape", "texture"):
        assert torch.equal(made.values[part][:, [EYE, HAIR]], a.values[part][:, [EYE, HAIR]])
    texture = swap_region(b, a, ["hair"], ["texture"])
    assert changed_rows(b, texture) == {"shape": [], "texture": [HAIR], "decoder": []}


def test_a_swap_exchanges_two_of_the_original_s_row_of_codes(generator: CNerfGenerator) -> None:
    """Codes 2 r and 2 r + 1 of the row of 18 come from the other head, the decoder keeps its own."""
    b, a = head(generator, 1), head(generator, 2)
    row_b, row_a = (c.values["decoder"].expand(18, -1).clone() for c in (b, a))
    row_b[2 * HAIR : 2 * HAIR + 2] = row_a[2 * HAIR : 2 * HAIR + 2]
    expected = Codes({"shape": row_b[None, ::2], "texture": row_b[None, 1::2], "decoder": b.values["decoder"]})
    made = swap_region(b, a, "hair")
    with torch.no_grad():
        first, second, plain = (generator.render(generator.scene(c), CAMERA, SETTINGS).rgb for c in (made, expected, b))
    assert torch.equal(first, second) and not torch.equal(first, plain)


def test_mixing_is_linear_and_goes_beyond(generator: CNerfGenerator) -> None:
    b, a = head(generator, 1), head(generator, 2)
    for amount in (0.0, 0.25, 1.5):
        made = mix_region(b, a, "nose", amount).values["shape"][0, NAMES.index("nose")]
        mine, theirs = (c.values["shape"][0, NAMES.index("nose")] for c in (b, a))
        torch.testing.assert_close(made, mine + amount * (theirs - mine))
    assert changed_rows(b, mix_region(b, a, "nose", 0.0)) == {"shape": [], "texture": [], "decoder": []}


def test_resampled_codes(generator: CNerfGenerator) -> None:
    b = head(generator, 1)
    alone = resample_region(generator, b, "hair", seed=4)
    both = resample_region(generator, b, ["hair", "eye"], seed=4)
    assert changed_rows(b, alone) == {"shape": [HAIR], "texture": [HAIR], "decoder": []}
    assert changed_rows(alone, both) == {"shape": [EYE], "texture": [EYE], "decoder": []}  # hair is the same
    new = [both.values[part][0, region] for part in ("shape", "texture") for region in (HAIR, EYE)]
    assert all(not torch.equal(new[i], new[j]) for i in range(4) for j in range(i))
    assert not torch.equal(resample_region(generator, b, "hair", seed=5).values["shape"], alone.values["shape"])
    average = resample_region(generator, b, "hair", truncation=0.0, parts=["shape"])
    torch.testing.assert_close(average.values["shape"][0, HAIR], generator.average_w)
    assert changed_rows(b, average)["texture"] == []
    whole, half = (resample_region(generator, b, "hair", 4, psi).values["shape"][0, HAIR] for psi in (1.0, 0.5))
    torch.testing.assert_close(half, (whole + generator.average_w) / 2)


def test_codes_truncated_twice_stay_so() -> None:
    twice = tiny(double_truncation=True)
    twice.update_averages()
    made = swap_region(head(twice, 1), head(twice, 2), "hair")
    assert made.values["truncation"].tolist() == [[pytest.approx(0.7)]]


def test_the_background_is_warned_of(generator: CNerfGenerator) -> None:
    b, a = head(generator, 1), head(generator, 2)
    with pytest.warns(BackgroundWarning, match="base shape under all regions"):
        made = swap_region(b, a, "background")
    points = torch.zeros(1, 4, 2, 3)
    with torch.no_grad():
        before, after = (generator.base_distance(generator.scene(c), points) for c in (b, made))
    assert not torch.equal(before, after)  # and the warning tells the truth
    with pytest.warns(BackgroundWarning):
        resample_region(generator, b, ["background"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = swap_region(b, a, "hair")
    with torch.no_grad():
        assert torch.equal(generator.base_distance(generator.scene(other), points), before)
    with pytest.warns(RegionNumberWarning, match=r"3 = mouth \(CNeRF's README calls 3 brow\)"):
        swap_region(b, a, "3")


def test_refusals(generator: CNerfGenerator) -> None:
    b, a = head(generator, 1), head(generator, 2)
    with pytest.raises(UserError, match="unknown region 'hiar'.*Did you mean 'hair'"):
        swap_region(b, a, "hiar")
    with pytest.raises(ValueError, match="parts are shape and texture"):
        mix_region(b, a, "hair", 0.5, ["shapes"])
    with pytest.raises(ValueError, match="parts are shape and texture"):
        resample_region(generator, b, "hair", parts=["form"])
    fresh = tiny()
    with pytest.raises(ValueError, match="update_averages"):
        resample_region(fresh, b, "hair")
    assert resample_region(fresh, b, "hair", truncation=1.0).values["shape"].shape == (1, 9, 5)


@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_amounts_are_numbers(amount: float) -> None:
    codes = Codes({part: torch.zeros(1, len(NAMES), 2) for part in ("shape", "texture")})
    with pytest.raises(UserError, match=f"amount: expected a finite number such as 0.5, got {amount}"):
        mix_region(codes, codes, "hair", amount)


def test_changes_are_counted_inside_and_outside() -> None:
    before = torch.zeros(2, 3, 2, 2)
    after = before.clone()
    after[0, 1, 0, 0] = 0.5  # in hair
    after[1, :, 1, 1] = -0.5  # in the face
    after[1, 0, 0, 0] = 0.01  # too little to be seen
    labels = torch.tensor([[[7, 1], [1, 1]], [[1, 1], [1, 1]]])
    grown = labels.clone()
    grown[0, 0, 1] = 7  # hair that came with the edit
    found = count_changes(before, after, labels, grown, "hair")
    assert (found.inside, found.outside, found.changed_inside, found.changed_outside) == (2, 6, 1, 1)
    assert found.report()["outside_share"] == 0.5
