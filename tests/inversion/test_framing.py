# SPDX-License-Identifier: Apache-2.0
"""Upright squares, and photos taken in."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facelab.cameras.sphere import sphere_camera
from facelab.data.preprocess import doctor
from facelab.data.preprocess.cameras import GivenCoefficients
from facelab.data.preprocess.detectors import FileLandmarks, make_detector
from facelab.data.preprocess.labels import label_from_coefficients
from facelab.errors import UserError
from facelab.inversion.framing import Square, cut_labels, cut_square, upright_square
from facelab.inversion.photos import PhotoChoices, View, prepare, read_view, view_of_label

FACE = np.array([[80.0, 90], [120, 90], [100, 110], [85, 130], [115, 130]])


def turned(points: np.ndarray, degrees: float, centre: tuple[float, float] = (100, 100)) -> np.ndarray:
    """Clockwise as seen (y points down)."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (points - centre) @ matrix.T + centre


def test_the_square_of_a_level_face() -> None:
    """Eyes 40 apart and 40 above the mouth: the side is the larger of 4 x 40 and 3.6 x 40, the centre a tenth below."""
    square = upright_square(FACE)
    assert square.side == pytest.approx(160) and square.roll == pytest.approx(0)
    assert square.centre == pytest.approx((100, 94))
    long_face = FACE + np.array([[0, 0], [0, 0], [0, 0], [0, 40], [0, 40]])
    assert upright_square(long_face).side == pytest.approx(3.6 * 80)
    with pytest.raises(ValueError, match="on one spot"):
        upright_square(np.zeros((5, 2)))


@pytest.mark.parametrize("degrees", [-30.0, 12.0, 90.0])
def test_the_square_turns_with_the_head(degrees: float) -> None:
    square, level = upright_square(turned(FACE, degrees)), upright_square(FACE)
    assert math.degrees(square.roll) == pytest.approx(degrees)
    assert square.side == pytest.approx(level.side)
    assert square.centre == pytest.approx(tuple(turned(np.array([level.centre]), degrees)[0]))


def test_cutting() -> None:
    """A whole picture stays as it is; a turned one comes out upright; labels keep their numbers."""
    numbers = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    whole = Square((15.5, 15.5), (16.0, 0.0))
    assert np.array_equal(np.asarray(cut_square(Image.fromarray(numbers), whole, 32)), numbers)
    quarter = Square((15.5, 15.5), (0.0, 16.0))  # right is down: the head leans by 90 degrees
    assert np.array_equal(np.asarray(cut_square(Image.fromarray(numbers), quarter, 32)), np.rot90(numbers))
    assert np.array_equal(cut_labels(numbers[..., 0], quarter, 32), np.rot90(numbers[..., 0]))
    halved = np.asarray(cut_square(Image.fromarray(numbers), whole, 16)).astype(float)
    assert np.abs(halved - numbers.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))).max() <= 1.01  # rounded in two steps
    corner = Square((-0.5, -0.5), (16.0, 0.0))
    assert corner.outside((32, 32)) == pytest.approx(0.75) and whole.outside((32, 32)) == 0
    assert not np.asarray(cut_square(Image.fromarray(numbers), corner, 32))[:16].any()


def drawn(tmp_path: Path, degrees: float = 0.0, size: tuple[int, int] = (200, 200)) -> tuple[Path, Path]:
    """A picture with coloured spots where eyes and mouth are, and its points."""
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    points = turned(FACE, degrees)
    for (x, y), colour in zip(points, ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))):
        image[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5] = colour
    photo, landmarks = tmp_path / "me.png", tmp_path / "me.txt"
    Image.fromarray(image).save(photo)
    np.savetxt(landmarks, points)
    return photo, landmarks


def never() -> Any:
    raise AssertionError("no detector is needed here")


def test_photos_are_cut_upright(tmp_path: Path) -> None:
    photo, landmarks = drawn(tmp_path, 20.0)
    labels = np.zeros((200, 200), np.uint8)
    x, y = turned(FACE, 20.0)[2].astype(int)
    labels[y - 6 : y + 7, x - 6 : x + 7] = 2
    Image.fromarray(labels).save(tmp_path / "me_mask.png")
    found = prepare(photo, PhotoChoices(64, force=True), lambda: FileLandmarks(landmarks), tmp_path / "me_mask.png")
    assert found.picture.shape == (64, 64, 3) and found.view.roll == 0 and found.name == "me"
    row, column = np.argwhere((found.picture[..., 2] > 160) & (found.picture.sum(axis=2) < 330)).mean(axis=0)
    assert column == pytest.approx(31.5, abs=1.5)  # the nose tip of an upright face is in the middle
    assert found.label_map is not None
    rows, columns = np.nonzero(found.label_map == 2)
    assert columns.mean() == pytest.approx(31.5, abs=1.5) and rows.mean() == pytest.approx(row, abs=2.5)


def test_cameras_of_an_estimator(tmp_path: Path) -> None:
    """Deep3DFaceRecon's way in: its camera counts for photos and for crops, but not where the camera is known."""
    photo, landmarks = drawn(tmp_path, 0.0)
    given = GivenCoefficients(np.array([0.1, 0.3, 0.0]), np.array([0.0, 0.0, 0.2]))
    label = label_from_coefficients(given.angle, given.translation)
    expected = view_of_label(label)
    for choices in (PhotoChoices(32, force=True), PhotoChoices(32, aligned=True)):
        found = prepare(photo, choices, lambda: FileLandmarks(landmarks), None, lambda: given)
        assert (found.view.azimuth, found.view.elevation) == (expected.azimuth, expected.elevation)
        points = prepare(photo, choices, lambda: FileLandmarks(landmarks))
        assert abs(points.view.azimuth - expected.azimuth) > 0.05
    known = PhotoChoices(32, force=True, view=View(0.5, 0.0))
    assert prepare(photo, known, lambda: FileLandmarks(landmarks), None, never).view.azimuth == 0.5


def test_crops_that_lean_are_turned(tmp_path: Path) -> None:
    photo, _ = drawn(tmp_path, 20.0)
    view = View(0.1, -0.2, math.radians(20.0))
    found = prepare(photo, PhotoChoices(50, aligned=True, view=view), never)
    assert found.view == View(0.1, -0.2) and found.notes == ("turned by +20.0 degrees to stand upright",)
    red, green = (
        np.argwhere((found.picture[..., c] > 200) & (found.picture.sum(axis=2) < 330)).mean(axis=0) for c in (0, 1)
    )
    assert red[0] == pytest.approx(green[0], abs=1.0) and green[1] - red[1] == pytest.approx(10, abs=1)
    level = prepare(photo, PhotoChoices(50, aligned=True, view=View(0.0, 0.0)), never)
    assert level.notes == () and np.array_equal(
        level.picture, np.asarray(Image.open(photo).resize((50, 50), Image.Resampling.BOX))
    )


def test_photos_that_cannot_be_used(tmp_path: Path) -> None:
    Image.new("RGB", (160, 160), (128, 128, 128)).save(tmp_path / "wall.png")
    try:
        detector = make_detector("mtcnn")
    except UserError as error:
        pytest.skip(str(error))
    for choices in (PhotoChoices(32), PhotoChoices(32, force=True)):
        with pytest.raises(UserError, match="wall.png: not usable: .*no face"):
            prepare(tmp_path / "wall.png", choices, lambda: detector)
    with pytest.raises(UserError, match="no face was found, so the camera is not known; give it with --camera"):
        prepare(tmp_path / "wall.png", PhotoChoices(32, aligned=True), lambda: detector)
    Image.new("RGB", (160, 100)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="--aligned expects a square crop, got 160x100"):
        prepare(tmp_path / "wide.png", PhotoChoices(32, aligned=True, view=View(0, 0)), never)
    with pytest.raises(UserError, match="the mask is 160x100 but its picture wall.png is 160x160"):
        Image.new("L", (160, 100)).save(tmp_path / "wide_mask.png")
        prepare(
            tmp_path / "wall.png", PhotoChoices(32, aligned=True, view=View(0, 0)), never, tmp_path / "wide_mask.png"
        )


def test_views_of_cameras(tmp_path: Path) -> None:
    """Our own cameras come back as the angles they were made of; a turn about the axis is the roll."""
    label = sphere_camera(0.4, -0.2).label()[0].double().numpy()
    view = view_of_label(label)
    assert (view.azimuth, view.elevation) == pytest.approx((0.4, -0.2), abs=1e-6) and abs(view.roll) < 1e-6
    np.save(tmp_path / "a.npy", label.reshape(1, 25))
    (tmp_path / "a.json").write_text(json.dumps({"camera": label.tolist()}))
    for name in ("a.npy", "a.json"):
        again = read_view(tmp_path / name)
        assert (again.azimuth, again.elevation) == pytest.approx((view.azimuth, view.elevation))
    for name, value, line in (
        ("short.npy", np.zeros(7), "25 \\(or 16\\) finite numbers, got 7"),
        ("zeros.npy", np.zeros(25), "no rotation"),
        ("nan.npy", np.full(25, np.nan), "finite numbers"),
    ):
        np.save(tmp_path / name, value)
        with pytest.raises(UserError, match=line):
            read_view(tmp_path / name)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UserError, match="expected a camera"):
        read_view(tmp_path / "b.json")
    with pytest.raises(UserError, match="no such file"):
        read_view(tmp_path / "c.npy")


@pytest.mark.shared
def test_training_pictures_are_framed_by_their_own_square() -> None:
    """CelebAMask-HQ's pictures were cut by this rule: found points give back the whole picture, within 4 %."""
    folder = Path(os.environ["FACELAB_REAL_DATA"]) / "celebamask_pairs"
    detector = make_detector("mtcnn")
    photo = doctor.open_photo(folder / "1.jpg")
    (face,) = detector.detect(np.asarray(photo), "1.jpg")
    square = upright_square(face.points5)
    assert square.side == pytest.approx(photo.width, rel=0.04) and abs(square.roll) < math.radians(3)
    assert square.centre == pytest.approx((photo.width / 2, photo.height / 2), rel=0.04)
