# SPDX-License-Identifier: Apache-2.0
"""Crops with cameras in every form in which EG3D and FaceDNeRF have them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facelab.cli.portraits import PortraitChoices, camera_of, check_camera, take_portrait
from facelab.errors import UserError
from tests.commands.eg3d_models import crop

CHOICES = PortraitChoices(16)


def no_detector() -> Any:
    raise AssertionError("there is a camera, so no face is looked for")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return crop(tmp_path, "me")


@pytest.fixture
def label(photo: Path) -> np.ndarray:
    return np.load(photo.with_suffix(".npy")).reshape(25)


def test_every_form_of_a_camera(photo: Path, label: np.ndarray, tmp_path: Path) -> None:
    other = tmp_path / "cameras"
    other.mkdir()
    (other / "one.json").write_text(json.dumps(label.tolist()))
    (other / "report.json").write_text(json.dumps({"photo": "x.jpg", "camera": label.tolist(), "go": True}))
    (other / "list.json").write_text(json.dumps({"labels": [["me.png", label.tolist()], ["b.png", [0] * 25]]}))
    (other / "one.txt").write_text(" ".join(map(str, label)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "dataset.json").write_text((other / "list.json").read_text())
    forms = [None, photo.with_suffix(".npy"), photo.parent, folder, ",".join(map(str, label))]
    forms += [other / name for name in ("one.json", "report.json", "list.json", "one.txt")]
    for form in forms:
        found = camera_of(None if form is None else str(form), photo, [photo])
        assert found is not None, form
        np.testing.assert_allclose(found, label, atol=1e-7, err_msg=str(form))
    assert camera_of("face", photo, [photo]) is None
    photo.with_suffix(".npy").unlink()
    assert camera_of(None, photo, [photo]) is None
    (tmp_path / "dataset.json").write_text((other / "list.json").read_text())
    np.testing.assert_allclose(camera_of(None, photo, [photo]), label, atol=1e-7)  # type: ignore[arg-type]


def test_cameras_that_are_refused(photo: Path, label: np.ndarray, tmp_path: Path) -> None:
    photos = [photo, tmp_path / "b.png"]
    (tmp_path / "list.json").write_text(json.dumps({"labels": [["x.png", label.tolist()]]}))
    (tmp_path / "cut.json").write_text('{"labels": [')
    np.save(tmp_path / "nan.npy", np.full(25, np.nan))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    cases = [
        (str(photo.with_suffix(".npy")), photos, "one camera for 2 photos"),
        (",".join(["1"] * 25), photos, "one camera for 2 photos"),
        (",".join(["1"] * 26), [photo], "got 26"),
        ("1,2,3,x", [photo], "25 numbers with commas or a file"),
        (str(tmp_path / "list.json"), [photo], "has no camera for me.png"),
        (str(tmp_path / "cut.json"), [photo], "cannot be read as a camera file"),
        (str(tmp_path / "nan.npy"), [photo], "NaN or infinite"),
        (str(tmp_path / "objects.npy"), [photo], "cannot be read"),
        (str(tmp_path / "gone"), [photo], "no file or folder"),
    ]
    for given, several, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            camera_of(given, photo, several)
        assert "\n" not in str(caught.value)


def moved(label: np.ndarray, radius: float) -> np.ndarray:
    changed = label.copy()
    changed[[3, 7, 11]] *= radius / np.linalg.norm(label[[3, 7, 11]])
    return changed


def test_where_a_camera_may_stand(label: np.ndarray) -> None:
    assert check_camera(label, "me.png", CHOICES) == []
    (note,) = check_camera(moved(label, 2.965), "R.png", CHOICES)
    assert "stands 2.96 from the head's centre, the model's 2.7" in note
    with pytest.raises(UserError, match="stands 4 from.*--force"):
        check_camera(moved(label, 4), "me.png", CHOICES)
    assert check_camera(moved(label, 4), "me.png", PortraitChoices(16, force=True))
    assert check_camera(moved(label, 1.7), "car.png", PortraitChoices(16, radius=1.7)) == []
    turned = label.copy()
    turned[[1, 2, 5, 6, 9, 10]] *= -1  # OpenGL's axes
    with pytest.raises(UserError, match="looks away from the head"):
        check_camera(turned, "me.png", CHOICES)
    mirrored = label.copy()
    mirrored[[0, 4, 8]] *= -1
    with pytest.raises(UserError, match="holds no rotation"):
        check_camera(mirrored, "me.png", CHOICES)


def test_a_crop_is_brought_to_size_without_stripes(tmp_path: Path, label: np.ndarray) -> None:
    """A pattern finer than the small picture becomes even grey instead of a coarser one."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "s.png")
    taken = take_portrait(tmp_path / "s.png", CHOICES, no_detector, label)
    assert taken.picture.shape == (16, 16, 3) and np.abs(taken.picture.astype(int) - 100).max() < 15
    Image.fromarray(stripes[:40]).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="must be a square crop, got 64x40"):
        take_portrait(tmp_path / "wide.png", CHOICES, no_detector, label)
