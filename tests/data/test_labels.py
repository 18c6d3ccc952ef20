# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from facelab.data import labels


def test_golden_case(golden_dir):
    path = golden_dir / "fenerf" / "labels"
    if not path.with_suffix(".json").exists():
        pytest.skip(f"{path}.json is not there")
    meta = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    class_map = arrays["in_class_map"][None]
    predicted = labels.from_scores(arrays["in_label_scores"])
    one_hot = labels.one_hot(class_map)
    both = labels.one_hot(predicted) * one_hot
    either = (labels.one_hot(predicted) + one_hot).clamp(max=1)
    ours = {
        "out_one_hot18_pm1": labels.one_hot_pm1(class_map)[0],
        "out_one_hot19": one_hot[0],
        "out_color": labels.colorize(predicted).float(),
        "out_sofgan_to_celeba": labels.remap_sofgan(arrays["in_sofgan_class_map"]).float(),
        "out_miou_original": (both.sum((2, 3)) / (either.sum((2, 3)) + 1e-6)).mean(1),
    }
    assert set(ours) == set(meta["outputs"])
    for name, value in ours.items():
        torch.testing.assert_close(value, arrays[name], rtol=meta["rtol"], atol=meta["outputs"][name]["atol"])


def test_tables_agree():
    assert len(labels.CLASSES) == len(labels.PALETTE) == labels.NUM_CLASSES == 19
    assert len(set(labels.PALETTE)) == 19
    assert len(labels.SOFGAN_TO_CELEBA) == 20
    assert set(labels.SOFGAN_TO_CELEBA) == set(range(19))  # every class can be reached
    for left, right in labels.LEFT_RIGHT:
        assert labels.CLASSES[left][2:] == labels.CLASSES[right][2:]
        assert labels.CLASSES[left].startswith("l_") and labels.CLASSES[right].startswith("r_")
    assert labels.CLASSES[12] == "l_lip" and labels.FLIP_TABLE[12] == 12  # lower lip has no twin


def test_colours_and_back():
    ids = torch.arange(19, dtype=torch.uint8).repeat(2, 3, 1)
    picture = labels.colorize(ids)
    assert picture.dtype == torch.uint8 and picture.shape == (2, 3, 3, 19)
    assert picture[0, :, 0, 13].tolist() == [0, 0, 204]
    assert labels.decolorize(picture).equal(ids)
    alias = torch.tensor([51, 255, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert labels.decolorize(alias).item() == 7
    with pytest.raises(ValueError, match="1,2,3"):
        labels.decolorize(torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1))


def test_flip_exchanges_and_is_its_own_inverse():
    ids = torch.arange(19).view(1, 1, 19)
    flipped = labels.flip_labels(ids)
    assert flipped.flatten().tolist() == [0, 1, 2, 3, 5, 4, 7, 6, 9, 8, *range(10, 19)]
    assert labels.flip_labels(flipped).equal(ids)


def test_scores_without_background_channel():
    ids = torch.randint(0, 19, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    assert labels.from_scores(labels.one_hot_pm1(ids)).equal(ids)
    assert labels.from_scores(labels.one_hot(ids)[:, 1:], threshold=0.5).equal(ids)
    with pytest.raises(ValueError, match="18 or 19"):
        labels.from_scores(torch.zeros(1, 20, 2, 2))
    with pytest.raises(ValueError, match="integers"):
        labels.one_hot(torch.zeros(1, 2, 2))
