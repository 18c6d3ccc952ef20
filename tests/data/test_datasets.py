# SPDX-License-Identifier: Apache-2.0
"""Layouts, caches, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facelab.data import CelebAMaskHQ, ImageFolder
from facelab.data.labels import PALETTE, colorize
from facelab.errors import UserError
from tests.data.pictures import blocky_mask, smooth_picture, write_pairs

IMG, MASK = "celebahq_mask_img", "celebahq_mask_mask"


def test_three_layouts_give_the_same_samples(tmp_path, pairs):
    plain = CelebAMaskHQ(pairs, 16)
    other = tmp_path / "other"
    shutil.copytree(pairs / IMG, other / "images")
    shutil.copytree(pairs / MASK, other / "masks")
    flat = tmp_path / "flat"
    shutil.copytree(pairs / IMG, flat)
    for path in (pairs / MASK).iterdir():
        shutil.copy(path, flat / f"{path.stem}_mask.png")
        shutil.copy(path, flat / f"{path.stem}_maskcolor.png")  # looks on, takes no part
    (pairs / IMG / ".00007.jpg.tmp.jpg").write_bytes(b"")  # left by an interrupted writer
    for root in (pairs, other, flat):
        found = CelebAMaskHQ(root, 16)
        assert len(found) == 3 and found.validate().decoded == 3
        assert all(found[i].image.equal(plain[i].image) for i in range(3))
        assert all(found[i].label_map.equal(plain[i].label_map) for i in range(3))


def test_names_decide_not_their_order(tmp_path):
    """1.jpg, 10.jpg but 10_mask.png, 1_mask.png: sorted lists would pair the wrong files."""
    for number, value in (("1", 3), ("10", 7)):
        Image.fromarray(smooth_picture(20, 20)).save(tmp_path / f"{number}.jpg")
        Image.fromarray(np.full((20, 20), value, np.uint8)).save(tmp_path / f"{number}_mask.png")
    found = CelebAMaskHQ(tmp_path, 8)
    values = {path.stem: int(found[i].label_map[0, 0, 0]) for i, path in enumerate(found.images)}
    assert values == {"1": 3, "10": 7}


def test_no_common_names_pair_by_order_with_a_note(pairs):
    for number, path in enumerate(sorted((pairs / MASK).iterdir())):
        path.rename(path.with_name(f"seg{number}.png"))
    assert "paired by sorted order" in CelebAMaskHQ(pairs, 8).validate().notes[0]


def test_crop_from_the_description(pairs):
    assert CelebAMaskHQ(pairs, 16).chain.crop == 0.8
    (pairs / "dataset.json").write_text(json.dumps({"crop": 1.0}))
    assert CelebAMaskHQ(pairs, 16).chain.crop == 1.0
    assert CelebAMaskHQ(pairs, 16, crop=0.5).chain.crop == 0.5


@pytest.mark.parametrize("reference", [False, True])
def test_caches_change_nothing(pairs, tmp_path, reference):
    plain = CelebAMaskHQ(pairs, 16, reference=reference, cache="none").items([0, 2], [True, False])
    for kind in ("memory", tmp_path / "cache"):
        for _ in range(2):
            cached = CelebAMaskHQ(pairs, 16, reference=reference, cache=kind)
            for _ in range(2):
                again = cached.items([0, 2], [True, False])
                assert again.image.equal(plain.image) and again.label_map.equal(plain.label_map)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # the second data set found the first one's files


def test_disk_cache_survives_and_notices_changes(pairs, tmp_path):
    folder = tmp_path / "cache"
    before = CelebAMaskHQ(pairs, 16, cache=folder)[1].image
    victim = pairs / IMG / "00001.jpg"
    found = CelebAMaskHQ(pairs, 16, cache=folder)
    victim.write_bytes(b"gone")
    assert found[1].image.equal(before)  # not decoded again
    with pytest.raises(UserError, match="00001"):
        CelebAMaskHQ(pairs, 16, cache=folder)[1]  # another file: another cache


def truncate(root: Path) -> None:
    path = root / IMG / "00001.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def save_mask(root: Path, array: np.ndarray, mode: str | None = None) -> None:
    Image.fromarray(array, mode).save(root / MASK / "00001.png")


def with_value(root: Path, value: int) -> None:
    mask = blocky_mask(40, 40)
    mask[3, 4] = value
    save_mask(root, mask)


def foreign_colour(root: Path) -> None:
    picture = np.array(PALETTE, np.uint8)[blocky_mask(40, 40)]
    picture[5, 5] = (1, 2, 3)
    save_mask(root, picture)


def lossy_masks(root: Path) -> None:
    for path in list((root / MASK).iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def empty(root: Path) -> None:
    for path in [*(root / IMG).iterdir(), *(root / MASK).iterdir()]:
        path.unlink()


def replaced_name(root: Path) -> None:
    (root / MASK / "00001.png").rename(root / MASK / "00009.png")


BAD = {
    "no folder": (lambda r: shutil.rmtree(r), ("no such folder", "celebahq_mask_img/", "prepare_data.py")),
    "a file": (lambda r: (shutil.rmtree(r), r.write_text("x")), ("got a file",)),
    "nothing inside": (lambda r: (shutil.rmtree(r), r.mkdir()), ("an empty folder", "prepare_data.py")),
    "empty folders": (empty, ("empty folders",)),
    "no masks folder": (lambda r: shutil.rmtree(r / MASK), ("celebahq_mask_mask/ is missing",)),
    "a mask less": (lambda r: (r / MASK / "00001.png").unlink(), ("3 pictures but 2 masks", "00001.jpg")),
    "an image less": (lambda r: (r / IMG / "00002.jpg").unlink(), ("2 pictures but 3 masks", "00002.png")),
    "another name": (replaced_name, ("00001.jpg has no mask", "expected 00001.png")),
    "truncated picture": (truncate, ("00001.jpg", "damaged")),
    "no picture": (lambda r: (r / IMG / "00000.jpg").write_text("hello"), ("00000.jpg", "damaged")),
    "value 37": (lambda r: with_value(r, 37), ("00001.png", "mask value 37", "0..18")),
    "binary 255": (lambda r: with_value(r, 255), ("00001.png", "mask value 255")),
    "foreign colour": (foreign_colour, ("00001.png", "1,2,3", "single-channel")),
    "jpeg masks": (lossy_masks, ("00000.jpg", "PNG")),
    "aspect": (lambda r: save_mask(r, blocky_mask(40, 30)), ("00001.png", "40x30", "40x40", "aspect")),
    "description": (lambda r: (r / "dataset.json").write_text('{"crop": "all"}'), ("dataset.json", "crop")),
    "broken description": (lambda r: (r / "dataset.json").write_text("{"), ("dataset.json", "JSON")),
    "16 bits": (
        lambda r: (
            Image.fromarray(np.full((40, 40), 9000, np.uint16)).save(r / IMG / "00001.png")
            or (r / IMG / "00001.jpg").unlink()
        ),
        ("00001.png", "8 bits"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_before_training(pairs, case):
    spoil, said = BAD[case]
    spoil(pairs)
    with pytest.raises(UserError) as caught:
        CelebAMaskHQ(pairs, 16).validate(fast=True)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message


@pytest.mark.parametrize("case", ["truncated picture", "value 37", "foreign colour", "aspect", "16 bits"])
def test_reading_says_it_too(pairs, case):
    """Without a check first, and whatever a fast check of a large set did not decode."""
    spoil, said = BAD[case]
    spoil(pairs)
    with pytest.raises(UserError) as caught:
        CelebAMaskHQ(pairs, 16)[1]
    assert "\n" not in str(caught.value) and said[0] in str(caught.value)


def test_all_problems_of_a_set_are_listed(pairs):
    with_value(pairs, 37)
    (pairs / IMG / "00002.jpg").write_bytes(b"")
    problems, report = CelebAMaskHQ(pairs, 16).inspect(fast=False)
    assert len(problems) == 2 and "37" in problems[0] and "00002.jpg" in problems[1]
    assert report.decoded == 1 and report.class_images[13] == 1


def test_fast_check_of_a_large_set_sees_truncation(tmp_path, monkeypatch):
    from facelab.data import image_folder

    monkeypatch.setattr(image_folder, "FAST_LIMIT", 2)
    monkeypatch.setattr(image_folder, "FAST_DECODES", 1)
    root = write_pairs(tmp_path / "set", count=4)
    assert CelebAMaskHQ(root, 16).validate().decoded == 1
    assert CelebAMaskHQ(root, 16).validate(fast=False).decoded == 4
    truncate(root)
    with pytest.raises(UserError, match="00001"):
        CelebAMaskHQ(root, 16).validate()


@pytest.mark.parametrize("form", ["colour", "palette file", "grey in three channels", "16 bit"])
def test_other_forms_of_masks_are_understood(pairs, form):
    mask = blocky_mask(40, 40)
    if form == "colour":
        save_mask(pairs, np.array(PALETTE, np.uint8)[mask])
    elif form == "palette file":
        image = Image.fromarray(mask, "P")
        image.putpalette([v for i in range(19) for v in (10 * i, 3, 200)])  # colours that mean nothing
        image.save(pairs / MASK / "00001.png")
    elif form == "grey in three channels":
        save_mask(pairs, np.stack([mask] * 3, -1))
    else:
        save_mask(pairs, mask.astype(np.uint16))
    found = CelebAMaskHQ(pairs, 40, crop=1.0)
    notes = found.validate().notes
    assert ("read as class numbers" in "".join(notes)) == (form == "colour")
    assert (found[1].label_map[0].numpy() == mask).all()


def test_small_oblong_picture_works_and_warns_once(tmp_path):
    root = write_pairs(tmp_path / "set", size=(100, 80), mask_size=(50, 40))
    found = CelebAMaskHQ(root, 128)
    with pytest.warns(UserWarning, match=r"smaller than 128 px .*100x80"):
        report = found.validate()
    assert report.smallest == (100, 80) and "enlarged" in report.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = found.items([0, 1])  # said once
        CelebAMaskHQ(root, 64).validate()  # 0.8 * 80 = 64: not enlarged
    assert batch.image.shape == (2, 3, 128, 128) and batch.label_map.shape == (2, 128, 128)


def test_picture_folder_chains(tmp_path):
    picture = np.dstack([smooth_picture(30, 30), np.full((30, 30), 255, np.uint8)])
    picture[:, :10, 3] = 0
    (tmp_path / "deep").mkdir()
    Image.fromarray(picture).save(tmp_path / "deep" / "b.png")
    Image.fromarray(smooth_picture(178, 218)).save(tmp_path / "a.jpg")
    found = ImageFolder(tmp_path, 15, chain="carla")
    assert [p.name for p in found.images] == ["a.jpg", "b.png"] and not found.chain.flips
    assert (found[1].image[0, :, :, :5] == 255).all()
    assert (ImageFolder(tmp_path, 15, chain="carla", alpha="black")[1].image[0, :, :, :5] == 0).all()
    assert found[1].label_map is None
    for chain in ("celeba", "cats"):
        for reference in (False, True):
            assert ImageFolder(f"{tmp_path}/*.jpg", 32, chain=chain, reference=reference)[0].image.shape == (
                1,
                3,
                32,
                32,
            )


def test_picture_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ImageFolder(tmp_path / "none", 8)
    with pytest.raises(UserError, match="no pictures"):
        ImageFolder(f"{tmp_path}/*.jpg", 8)
    with pytest.raises(UserError, match="Did you mean 'celeba'"):
        ImageFolder(tmp_path, 8, chain="celba")


@pytest.mark.shared
def test_real_pairs(real_pairs):
    found = CelebAMaskHQ(real_pairs, 128)
    assert len(found) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = found.validate()
    assert report.class_images[1] == 5 and report.class_pixels[3] == 0  # skin everywhere, no glasses
    batch = found.items(range(5))
    assert (batch.image.permute(0, 2, 3, 1)[batch.label_map == 0].float().mean()) < 12  # background is black
    for label_map in batch.label_map:
        columns = {c: (label_map == c).nonzero()[:, 1].float().mean() for c in (4, 5)}
        assert columns[4] > columns[5]  # "left" is the subject's
    colours = np.asarray(Image.open(real_pairs / "4_maskcolor.png").convert("RGB"))
    plain = CelebAMaskHQ(real_pairs, 512, crop=1.0)
    assert (colorize(plain[4].label_map)[0].permute(1, 2, 0).numpy() == colours).all()
