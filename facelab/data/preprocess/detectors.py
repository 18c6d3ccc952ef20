# SPDX-License-Identifier: Apache-2.0
"""Where faces and their points come from: MTCNN, dlib, or files."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facelab.data.preprocess.faces import Face, FaceDetector
from facelab.data.reading import reason_of
from facelab.errors import UserError, nearest

DETECTORS = ("mtcnn", "dlib")
SEARCH_SIDE = 1600  # pictures with a longer side are reduced for the search; such small faces are of no use anyway
DLIB_FILE = "shape_predictor_68_face_landmarks.dat"
FILE_KINDS = (".txt", ".npy", ".json")


class MtcnnDetector:
    """MTCNN with the weights of an installed facenet-pytorch, or of a folder.

    Args:
        folder: holds pnet.pt, rnet.pt, onet.pt; None finds the installed package.
        device: where to compute.

    Raises:
        UserError: no weights.
    """

    name = "mtcnn"
    looks = True

    def __init__(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        from facelab.nn.pretrained.mtcnn import Mtcnn

        self.model = Mtcnn.from_files(folder).to(device)
        self.device = device

    def detect(self, image: NDArray[np.uint8], name: str = "") -> list[Face]:
        """See :class:`facelab.data.preprocess.faces.FaceDetector`."""
        import torch
        from PIL import Image

        factor = SEARCH_SIDE / max(image.shape[:2])
        if factor < 1:
            size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
            small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        else:
            size, small = (image.shape[1], image.shape[0]), image
        found = self.model.detect(torch.from_numpy(np.array(small)).permute(2, 0, 1).to(self.device))
        ratio = np.array([image.shape[1] / size[0], image.shape[0] / size[1]])
        boxes = found.boxes.double().cpu().numpy().reshape(-1, 2, 2) * ratio
        points = (found.points.double().cpu().numpy() + 0.5) * ratio - 0.5
        return [
            Face(tuple(map(float, box.reshape(4))), five, float(score))
            for box, five, score in zip(boxes, points, found.scores, strict=True)
        ]


class DlibDetector:
    """dlib's frontal detector with its 68-point predictor.

    Args:
        predictor: a ``shape_predictor_*.dat`` file; None looks into an installed face_recognition_models
            (never imported). The usual 68-point file was trained on 300-W: research only.

    Raises:
        UserError: dlib or the file is missing.
    """

    name = "dlib"
    looks = True

    def __init__(self, predictor: str | Path | None = None) -> None:
        if importlib.util.find_spec("dlib") is None:
            raise UserError("dlib is not installed; 'pip install facelab[prep]', or use --detector mtcnn")
        import dlib  # type: ignore[import-not-found]

        path = _dlib_file() if predictor is None else Path(predictor)
        if not path.is_file():
            raise UserError(f"no file {path}: expected a dlib shape predictor; check the path")
        self._search = dlib.get_frontal_face_detector()
        try:
            self._predict = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise UserError(
                f"{path}: expected a dlib shape predictor, got a file dlib cannot read ({error})"
            ) from error

    def detect(self, image: NDArray[np.uint8], name: str = "") -> list[Face]:
        """See :class:`facelab.data.preprocess.faces.FaceDetector`."""
        image = np.ascontiguousarray(image)
        boxes, scores, _ = self._search.run(image, 1, 0.0)
        faces = []
        for box, score in zip(boxes, scores):
            shape = self._predict(image, box)
            points = np.array([(part.x, part.y) for part in shape.parts()], dtype=np.float64)
            certainty = float(1 / (1 + np.exp(-8 * (score - 0.1))))  # a margin of 0.4 and more is safe
            corners = (float(box.left()), float(box.top()), float(box.right()), float(box.bottom()))
            if len(points) != 68:
                raise UserError(
                    f"the dlib predictor gives {len(points)} points, expected 68; its file of 5 points has no mouth corners"
                )
            face = Face.from_points(points, certainty)
            faces.append(Face(corners, face.points5, certainty, face.points68))
        return faces


class FileLandmarks:
    """Points written by somebody else.

    Args:
        path: one file for one picture, or for many (``.json`` that maps file names to points), or a folder
            with ``<picture's stem>.txt``, ``.npy`` or ``.json``.

    Text files have one line "x y" for each of 5 or 68 points, npy arrays are (5, 2), (68, 2) or (K, 5 or 68, 2)
    for K faces, JSON holds the same nested lists. Pixels, y down.

    Raises:
        UserError: no such file or folder.
    """

    name = "file"
    looks = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(
                f"no landmarks at {self.path}: expected a file or a folder of {', '.join(FILE_KINDS)} files"
            )

    def detect(self, image: NDArray[np.uint8], name: str = "") -> list[Face]:
        """See :class:`facelab.data.preprocess.faces.FaceDetector`; ``name`` chooses the file or the entry."""
        path = self._file_for(name) if self.path.is_dir() else self.path
        table = read_points(path, name)
        return [Face.from_points(points) for points in table]

    def _file_for(self, name: str) -> Path:
        stem = Path(name).stem
        for kind in FILE_KINDS:
            if stem and (self.path / f"{stem}{kind}").is_file():
                return self.path / f"{stem}{kind}"
        raise UserError(f"no landmarks for {name}: expected {stem}{'|'.join(FILE_KINDS)} in {self.path}")


class LateDetector:
    """A detector that is made when it first looks at a picture: what is wrong with the picture is then said first.

    Args:
        make: makes it, once; may raise UserError.
    """

    def __init__(self, make: Callable[[], FaceDetector]) -> None:
        self._made = functools.cache(make)

    @property
    def name(self) -> str:
        return self._made().name

    @property
    def looks(self) -> bool:
        return self._made().looks

    def detect(self, image: NDArray[np.uint8], name: str = "") -> list[Face]:
        """See :class:`facelab.data.preprocess.faces.FaceDetector`."""
        return self._made().detect(image, name)


def read_points(path: Path, name: str = "") -> NDArray[np.float64]:
    """(K, 5 or 68, 2) points of K faces from a file.

    Args:
        path: ``.txt``, ``.npy`` or ``.json``.
        name: the picture's file name, for JSON files that hold many.

    Raises:
        UserError: missing, unreadable or wrongly shaped.
    """
    try:
        if path.suffix == ".npy":
            table: Any = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            table = _entry(json.loads(path.read_text(encoding="utf-8")), name, path)
        else:
            table = np.loadtxt(path, ndmin=2)
        points = np.asarray(table, dtype=np.float64)
    except (OSError, ValueError, TypeError) as error:
        reason = reason_of(error)[:120]
        raise UserError(f"{path}: expected 5 or 68 points 'x y', got a file that cannot be read ({reason})") from error
    points = points[None] if points.ndim == 2 else points
    if not np.isfinite(points).all():
        raise UserError(
            f"{path}: expected 5 or 68 points of two numbers, got NaN or infinite ones; find the points again"
        )
    if points.ndim != 3 or points.shape[1] not in (5, 68) or points.shape[2] != 2:
        raise UserError(
            f"{path}: expected 5 or 68 points of two numbers, got an array of shape {points.shape[1:]}; "
            "order: eyes, nose tip, mouth corners, picture-left first, or 300-W"
        )
    return points


def make_detector(
    name: str = "mtcnn",
    *,
    landmarks: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
) -> FaceDetector:
    """A detector by name; files of landmarks win when they are given.

    Args:
        name: one of :data:`DETECTORS`.
        landmarks: see :class:`FileLandmarks`.
        weights: MTCNN's folder or dlib's predictor file; None finds the installed package.

    Raises:
        UserError: an unknown name, or something is not installed.
    """
    if landmarks is not None:
        return FileLandmarks(landmarks)
    if name == "mtcnn":
        return MtcnnDetector(weights, device)
    if name == "dlib":
        return DlibDetector(weights)
    raise UserError(f"unknown detector {name!r}, expected {' or '.join(DETECTORS)}.{nearest(name, DETECTORS)}")


def _entry(value: Any, name: str, path: Path) -> Any:
    """The points of ``name`` in a JSON value: a list, {"landmarks": list} or {file name: either}."""
    if isinstance(value, dict) and "landmarks" in value:
        value = value["landmarks"]
    if isinstance(value, dict):
        for key in (name, Path(name).name, Path(name).stem):
            if key in value:
                return _entry(value[key], name, path)
        raise UserError(f"{path}: no landmarks for {name}.{nearest(name, value)}")
    return value


def _dlib_file() -> Path:
    spec = importlib.util.find_spec("face_recognition_models")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "models" / DLIB_FILE
        if path.is_file():
            return path
    raise UserError(
        f"no dlib shape predictor: expected {DLIB_FILE}; install face_recognition_models or give --detector-weights"
    )
