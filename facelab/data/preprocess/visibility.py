# SPDX-License-Identifier: Apache-2.0
"""Is the face hidden or blurred? A detector's certainty does not tell: MTCNN gives 0.99 to a face behind a black bar.

Two things do. The points of hidden parts wander when the picture is mirrored, turned or reduced, because they are
guessed; and a covered eye or mouth has no contrast around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facelab.data.preprocess.faces import Face, FaceDetector, Points
from facelab.data.preprocess.labels import Array

SIDE, EYES = 256, 64.0  # pixels of the pictures looked at, and between the eyes in them
TURN = np.radians(10.0)
VARIANTS = ((0.0, 1.0, False), (TURN, 1.0, False), (-TURN, 1.0, False), (0.0, 0.6, False), (0.0, 1.0, True))
SWAP = [1, 0, 2, 4, 3]  # the five points of the mirrored picture
DISC = 0.2  # radius in eye distances within which contrast is measured


@dataclass(frozen=True)
class Visibility:
    """How far the points can be trusted.

    Attributes:
        wander: (5,) largest distance of each point from its median over the variants, in eye distances; zeros
            where points do not come from the picture.
        missed: variants in which no face was found.
        contrast: (5,) standard deviation of the brightness around each point, 0..128 grey levels.
    """

    wander: Array
    missed: int
    contrast: Array


def examine(photo: NDArray[np.uint8], face: Face, detector: FaceDetector) -> Visibility:
    """(H, W, 3) uint8 photo, one of its faces and the detector that found it -> what can be seen."""
    picture = Image.fromarray(photo)
    found: list[Points] = []
    for turn, zoom, mirror in VARIANTS if detector.looks else ():
        view, to_photo = _view(picture, face, turn, zoom, mirror)
        candidates = [np.append(c.points5, np.ones((5, 1)), axis=1) @ to_photo.T for c in detector.detect(view)]
        candidates = [points[SWAP] if mirror else points for points in candidates]
        near = [points for points in candidates if _distance(points, face).mean() < 1]
        if near:
            found.append(min(near, key=lambda points: float(_distance(points, face).mean())))
    wander = np.zeros(5)
    if found:
        middle = np.median([*found, face.points5], axis=0)
        wander = np.linalg.norm(np.array([*found, face.points5]) - middle, axis=-1).max(axis=0) / face.eye_distance
    missed = len(VARIANTS) - len(found) if detector.looks else 0
    return Visibility(wander, missed, _contrast(picture, face))


def _distance(points: Points, face: Face) -> Array:
    return np.linalg.norm(points - face.points5, axis=-1) / face.eye_distance


def _view(
    picture: Image.Image, face: Face, turn: float, zoom: float, mirror: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A square picture around the face and the (2, 3) matrix from its points to the photo's."""
    scale = face.eye_distance / (EYES * zoom)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if mirror:
        linear = linear @ np.diag([-1.0, 1.0])
    shift = face.points5.mean(axis=0) + 0.5 - linear @ np.array([SIDE / 2, SIDE / 2])
    source, reduce = picture, max(1, int(scale))
    if reduce > 1:  # the affine step below does not average
        source = picture.reduce(reduce)
    numbers = np.column_stack([linear, shift]) / reduce
    view = source.transform((SIDE, SIDE), Image.Transform.AFFINE, tuple(numbers.reshape(6)), Image.Resampling.BICUBIC)
    to_photo = np.column_stack([linear, shift + linear @ np.array([0.5, 0.5]) - 0.5])  # whole numbers are pixel middles
    return np.asarray(view), to_photo


def _contrast(picture: Image.Image, face: Face) -> Array:
    view, to_photo = _view(picture, face, 0.0, 1.0, False)
    grey = view.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    points = (face.points5 - to_photo[:, 2]) @ np.linalg.inv(to_photo[:, :2]).T
    rows, columns = np.mgrid[:SIDE, :SIDE]
    discs = [(columns - x) ** 2 + (rows - y) ** 2 < (DISC * EYES) ** 2 for x, y in points]
    return np.array([grey[disc].std() if disc.any() else 0.0 for disc in discs])
