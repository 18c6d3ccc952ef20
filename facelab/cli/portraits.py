# SPDX-License-Identifier: Apache-2.0
"""From a photo to what EG3D is fitted to: EG3D's crop and the 25 numbers of its camera.

A photo is either any photo, which the photo doctor crops and finds the camera of, or a crop with its camera as EG3D and
FaceDNeRF keep them: ``NAME.png`` with ``NAME.npy`` (or ``.json``, ``.txt``), or an entry of ``dataset.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facelab.data.eg3d_cameras import CameraSource
from facelab.data.preprocess import doctor
from facelab.data.preprocess.cameras import CameraEstimator
from facelab.data.preprocess.faces import FaceDetector
from facelab.errors import UserError

DATASET = "dataset.json"
FACE = "face"  # --camera: never from a file
NUMBERS = 25
NEAR_RADIUS, FAR_RADIUS = 0.03, 0.25  # relative distance from the model's radius: worth a word, refused
SKEW = 1e-2  # largest entry of R R^T - 1 that is a rotation still

Label = NDArray[np.float64]


@dataclass(frozen=True)
class Portrait:
    """What a run aims at.

    Attributes:
        name: of the photo.
        picture: (S, S, 3) uint8.
        label: (25,) EG3D's camera numbers.
        notes: what a person should know, one line each.
    """

    name: str
    picture: NDArray[np.uint8]
    label: Label
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PortraitChoices:
    """How photos are taken in.

    Attributes:
        size: pixels a side of the model's pictures.
        radius: distance of the model's cameras, scene units.
        pivot: what its cameras look at.
        aligned: photos without a camera are crops, too; their cameras come from the face.
        face: which face of a photo, 1 is the largest.
        force: also take what would be refused, if there is a face.
    """

    size: int
    radius: float = 2.7
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)
    aligned: bool = False
    face: int | None = None
    force: bool = False


def take_portrait(
    photo: Path,
    choices: PortraitChoices,
    detector: Callable[[], FaceDetector],
    camera: Label | None = None,
    estimator: Callable[[], CameraEstimator | None] = lambda: None,
) -> Portrait:
    """Take in one photo.

    Args:
        photo: a picture file; with a camera it is a crop.
        choices: see :class:`PortraitChoices`.
        detector: makes the detector, called only where there is no camera.
        camera: (25,) as :func:`camera_of` finds it.
        estimator: makes what finds cameras, called only where there is none; None: from the points.

    Raises:
        UserError: no picture, no face or none that can be used, a crop that is not square, a camera that is none.
    """
    if camera is None and not choices.aligned:
        found = doctor.prepare_photo(photo, detector(), face=choices.face, size=choices.size, camera=estimator())
        if found.label is None:
            raise UserError(
                f"{photo}: {'; '.join(found.reasons)}; a crop with its camera needs no face found: --camera"
            )
        if not choices.force:
            found.require()
        assert found.label is not None and found.crop is not None
        notes = [line for line in found.lines()[1:] if not found.go or not line.startswith("refused")]
        return Portrait(photo.stem, np.array(found.crop), found.label, tuple(notes))
    image = doctor.open_photo(photo)
    if abs(image.width - image.height) > max(1, max(image.size) // 100):
        raise UserError(
            f"{photo}: a photo with a camera (or --aligned) must be a square crop, got {image.width}x{image.height}; "
            "drop the camera to have it cropped"
        )
    if camera is None:
        label = doctor.prepare_photo(photo, detector(), face=choices.face, camera=estimator()).label
        if label is None:
            raise UserError(f"{photo}: no face was found, so the camera is not known; give it with --camera")
        camera, notes = label, []
    else:
        notes = check_camera(camera, str(photo), choices)
    sized = image if image.size == (choices.size,) * 2 else image.resize((choices.size,) * 2, Image.Resampling.LANCZOS)
    return Portrait(photo.stem, np.array(sized), camera, tuple(notes))


def check_camera(label: Label, origin: str, choices: PortraitChoices) -> list[str]:
    """What is odd about a camera, one line each.

    Raises:
        UserError: no rotation, a camera that looks away from the head, or a distance that is not the model's (which
            ``choices.force`` lets pass).
    """
    pose = label[:16].reshape(4, 4)
    turn, position = pose[:3, :3], pose[:3, 3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > SKEW or np.linalg.det(turn) < 0:
        raise UserError(
            f"the camera of {origin} is none: its 4x4 matrix (row-major, camera to world) holds no rotation; expected "
            "a label as in dataset.json"
        )
    if (np.asarray(choices.pivot) - position) @ turn[:, 2] <= 0:
        raise UserError(
            f"the camera of {origin} looks away from the head; expected camera to world with x right, y down, z forward "
            "(the OpenCV axes of dataset.json)"
        )
    radius = float(np.linalg.norm(position))
    off = abs(radius / choices.radius - 1)
    told = f"the camera of {origin} stands {radius:.3g} from the head's centre, the model's {choices.radius:.3g}"
    if off > FAR_RADIUS and not choices.force:
        raise UserError(f"{told}; expected a label of dataset.json (not of cameras.json); --force takes it as it is")
    return [f"note: {told}"] if off > NEAR_RADIUS else []


def camera_of(given: str | None, photo: Path, photos: Sequence[Path]) -> Label | None:
    """The camera of a crop, (25,) float64; None where none was given and none lies beside it.

    Args:
        given: ``--camera``: 25 numbers with commas, a camera file, a ``dataset.json``, or a folder with ``NAME.npy`` (or
            ``.json``, ``.txt``) or a ``dataset.json``; ``face``: none, it is to be found.

    Raises:
        UserError: no such file, another number of numbers, no entry for the photo, one camera for several photos.
    """
    if given is None:
        return _beside(photo)
    if given == FACE:
        return None
    if given.count(",") > 2:  # no file is called so
        if len(photos) > 1:
            raise UserError(f"--camera holds one camera for {len(photos)} photos, expected a folder or {DATASET}")
        return _parsed(given)
    path = Path(given)
    if path.is_dir():
        found = _in_folder(path, photo)
        if found is None:
            raise UserError(f"--camera: no camera for {photo.name} in {path}, expected {photo.stem}.npy or {DATASET}")
        return found
    if not path.is_file():
        raise UserError(f"--camera: no file or folder {given}; expected one, or {NUMBERS} numbers with commas")
    if not _lists_cameras(path) and len(photos) > 1:
        raise UserError(f"--camera {path} is one camera for {len(photos)} photos, expected a folder or {DATASET}")
    return _from_file(path, photo)


def _parsed(text: str) -> Label:
    """25 numbers with commas."""
    try:
        numbers = np.array([float(part) for part in text.split(",")])
    except ValueError:
        raise UserError(f"--camera expects {NUMBERS} numbers with commas or a file, got {text[:60]!r}") from None
    if numbers.shape != (NUMBERS,) or not np.isfinite(numbers).all():
        raise UserError(f"--camera expects {NUMBERS} finite numbers (4x4 camera to world, 3x3), got {numbers.size}")
    return numbers


def _from_file(path: Path, photo: Path) -> Label:
    if not _lists_cameras(path):
        named = CameraSource(path.parent).labels_of([path.name], path.parent) if path.suffix != ".json" else {}
        found = named.get(path.name)
        label = CameraSource().label(_json(path), str(path)) if found is None else found
        return np.asarray(label, dtype=np.float64)
    labels = CameraSource(path).labels_of([photo.name], photo.parent)
    if photo.name not in labels:
        raise UserError(f"{path} has no camera for {photo.name}; expected an entry of that file name")
    return np.asarray(labels[photo.name], dtype=np.float64)


def _in_folder(folder: Path, photo: Path) -> Label | None:
    found = CameraSource(folder).labels_of([photo.name], folder)
    if photo.name in found:
        return np.asarray(found[photo.name], dtype=np.float64)
    return _from_file(folder / DATASET, photo) if (folder / DATASET).is_file() else None


def _beside(photo: Path) -> Label | None:
    """A camera in the original's form beside a photo: its ``NAME.npy``, or an entry of ``dataset.json``."""
    if photo.with_suffix(".npy").is_file():
        return _from_file(photo.with_suffix(".npy"), photo)
    listing = photo.with_name(DATASET)
    if not listing.is_file():
        return None
    found = CameraSource(listing).labels_of([photo.name], photo.parent).get(photo.name)
    return None if found is None else np.asarray(found, dtype=np.float64)


def _lists_cameras(path: Path) -> bool:
    """Whether a file holds cameras by the names of pictures."""
    if path.suffix != ".json":
        return False
    content = _json(path)
    if isinstance(content, dict):
        return not any(key in content for key in ("pose", "cam2world", "transform_matrix", "label", "camera"))
    return (
        isinstance(content, list) and bool(content) and isinstance(content[0], (list, tuple)) and len(content[0]) == 2
    )


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cannot be read as a camera file ({reason}); mend or remove it") from error
