# SPDX-License-Identifier: Apache-2.0
"""From a photo (or a crop) to what an inversion aims at: an upright square picture, label map, azimuth and elevation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from facelab.data import reading
from facelab.data.preprocess import doctor
from facelab.data.preprocess.cameras import CameraEstimator
from facelab.data.preprocess.faces import FaceDetector
from facelab.data.preprocess.labels import view_angles
from facelab.data.transforms import resize_mask
from facelab.errors import UserError
from facelab.inversion.framing import Square, cut_labels, cut_square, upright_square
from facelab.nn.pretrained.face_parsing import FaceParser

PARSER_SIDE = 512  # pixels of the picture that a parser sees
LEVEL = math.radians(1.0)  # crops that lean more are turned upright
MUCH = 0.05  # share of the square outside the photo that is worth a word
PHOTOS_LABEL = (16, 25)  # numbers of a camera file


@dataclass(frozen=True)
class View:
    """A camera of two angles in radians, and how the head leans in the picture (positive: to picture-right)."""

    azimuth: float
    elevation: float
    roll: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """What an inversion aims at.

    Attributes:
        name: of the photo.
        picture: (S, S, 3) uint8.
        label_map: (S, S) uint8 of the 19 classes, or None.
        view: where the camera stands; the picture is upright.
        notes: what a person should know, one line each.
    """

    name: str
    picture: NDArray[np.uint8]
    label_map: NDArray[np.uint8] | None
    view: View
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhotoChoices:
    """How photos are taken in.

    Attributes:
        size: pixels a side of the target.
        aligned: the files are crops framed as the model's training pictures.
        view: the camera, if it is known.
        face: which face of a photo, 1 is the largest.
        force: also take photos that the doctor refuses, if there is a face.
        parser: makes the label map where no mask is given.
    """

    size: int
    aligned: bool = False
    view: View | None = None
    face: int | None = None
    force: bool = False
    parser: FaceParser | None = None


def prepare(
    photo: Path,
    choices: PhotoChoices,
    detector: Callable[[], FaceDetector],
    mask: Path | None = None,
    estimator: Callable[[], CameraEstimator | None] = lambda: None,
) -> Prepared:
    """Take in one photo.

    Args:
        photo: a picture file.
        choices: see :class:`PhotoChoices`.
        detector: makes the detector, called only where points are needed.
        mask: label map of the whole photo (index PNG, palette PNG or .npy).
        estimator: makes what finds cameras, called only where there is none; None: from the points.

    Raises:
        UserError: no picture, no face or none that can be used, a mask that does not belong to it.
    """
    notes: list[str] = []
    view = choices.view
    if choices.aligned:
        image = doctor.open_photo(photo)
        _check_square(photo, image)
        view = _view_of_crop(photo, choices, detector(), estimator()) if view is None else view
        square = _whole(image, view.roll if abs(view.roll) > LEVEL else 0.0)
        if square.roll:
            notes.append(f"turned by {math.degrees(square.roll):+.1f} degrees to stand upright")
    else:
        camera = estimator() if view is None else None
        found = doctor.prepare_photo(photo, detector(), face=choices.face, camera=camera)
        if not choices.force or found.label is None or found.face is None:
            found.require()
        assert found.label is not None and found.face is not None
        notes += [line for line in found.lines()[1:] if not found.go or not line.startswith("refused")]
        image, square = found.photo, upright_square(found.face.points5)
        view = view_of_label(found.label) if view is None else view
        if (outside := square.outside(image.size)) > MUCH:
            notes.append(f"{100 * outside:.0f} % of the square lie outside the photo and are black")
    picture = np.array(cut_square(image, square, choices.size))
    labels = _labels(photo, image, square, choices, mask)
    return Prepared(photo.stem, picture, labels, View(view.azimuth, view.elevation), tuple(notes))


def view_of_label(label: NDArray[np.float64]) -> View:
    """A label of 25 (or 16) numbers -> azimuth, elevation and the roll that a camera of two angles cannot have."""
    yaw, pitch, roll = view_angles(np.asarray(label, dtype=np.float64)[:16].reshape(4, 4))
    return View(yaw, pitch, roll)


def read_view(path: Path) -> View:
    """The view of a camera file: ``.npy`` of 25 (or 16) numbers, or ``.json`` of prepare_photo.

    Raises:
        UserError: unreadable, another number of numbers, or no camera.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            numbers = np.asarray(content["camera"] if isinstance(content, dict) else content, dtype=np.float64)
        else:
            numbers = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: expected a camera, .npy or .json of prepare_photo; cannot be read ({reason})"
        ) from error
    numbers = numbers.reshape(-1)
    if numbers.size not in PHOTOS_LABEL or not np.isfinite(numbers).all():
        raise UserError(f"{path}: expected a camera of 25 (or 16) finite numbers, got {numbers.size}")
    turn = numbers[:16].reshape(4, 4)[:3, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-2:
        raise UserError(
            f"{path}: expected a camera, row-major camera to world first; its first numbers are no rotation"
        )
    return view_of_label(numbers)


def _view_of_crop(
    photo: Path, choices: PhotoChoices, detector: FaceDetector, estimator: CameraEstimator | None
) -> View:
    found = doctor.prepare_photo(photo, detector, face=choices.face, camera=estimator)
    if found.label is None:
        raise UserError(f"{photo}: no face was found, so the camera is not known; give it with --camera")
    return view_of_label(found.label)


def _check_square(photo: Path, image: Image.Image) -> None:
    if abs(image.width - image.height) > max(1, max(image.size) // 100):
        raise UserError(
            f"{photo}: --aligned expects a square crop, got {image.width}x{image.height}; without it photos are cut"
        )


def _whole(image: Image.Image, roll: float) -> Square:
    """All of a crop, or as much when it is turned."""
    reach = min(image.size) / 2
    centre = ((image.width - 1) / 2, (image.height - 1) / 2)
    return Square(centre, (reach * math.cos(roll), reach * math.sin(roll)))


def _labels(
    photo: Path, image: Image.Image, square: Square, choices: PhotoChoices, mask: Path | None
) -> NDArray[np.uint8] | None:
    if mask is not None:
        labels, _ = reading.read_mask(mask)
        problem = reading.aspect_problem(photo, image.size, mask, (labels.shape[1], labels.shape[0]))
        if problem:
            raise UserError(problem)
        return cut_labels(resize_mask(labels, *image.size), square, choices.size)
    if choices.parser is None:
        return None
    crop = np.array(cut_square(image, square, max(PARSER_SIDE, choices.size)))
    device = next(choices.parser.net.parameters()).device
    seen = torch.from_numpy(crop).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
    return choices.parser(seen, (choices.size, choices.size))[0].cpu().numpy().astype(np.uint8)
