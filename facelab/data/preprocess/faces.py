# SPDX-License-Identifier: Apache-2.0
"""What a detector gives, and which of several faces is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from facelab.errors import UserError
from facelab.face_model.landmarks import to_five

Points = NDArray[np.float64]
BOX_MARGIN = (0.9, 1.0, 0.9, 0.75)  # left, top, right, bottom: reach of a box around the points, in eye distances


@dataclass(frozen=True)
class Face:
    """One face of a picture.

    Attributes:
        box: left, top, right, bottom in pixels; may reach over the border.
        points5: (5, 2) pixels, x right, y down, pixel (0, 0) in the middle of the first pixel: eye, eye, nose tip,
            mouth corner, mouth corner; of each pair the one at picture-left first (the subject's right).
        score: certainty of the detector, 0..1; 1 for points given by hand.
        points68: (68, 2) in 300-W order if the detector knows them.
    """

    box: tuple[float, float, float, float]
    points5: Points
    score: float
    points68: Points | None = None

    def __post_init__(self) -> None:
        if np.shape(self.points5) != (5, 2) or not np.isfinite(self.points5).all():
            raise ValueError(f"points5 must be (5, 2) finite numbers, got {np.shape(self.points5)}")
        if self.points68 is not None and np.shape(self.points68) != (68, 2):
            raise ValueError(f"points68 must be (68, 2), got {np.shape(self.points68)}")

    @property
    def size(self) -> float:
        """Width plus height of the box in pixels: what 'largest face' means."""
        return (self.box[2] - self.box[0]) + (self.box[3] - self.box[1])

    @property
    def eye_distance(self) -> float:
        """Pixels between the eyes."""
        return float(np.linalg.norm(self.points5[1] - self.points5[0]))

    @staticmethod
    def from_points(points: Points, score: float = 1.0) -> Face:
        """(5, 2) or (68, 2) points -> a face with a box around them. ValueError on another shape."""
        points = np.asarray(points, dtype=np.float64)
        if points.shape not in ((5, 2), (68, 2)):
            raise ValueError(f"expected 5 or 68 points of two numbers, got {points.shape}")
        five = to_five(points) if len(points) == 68 else points
        reach = max(
            float(np.linalg.norm(five[1] - five[0])), float(np.linalg.norm(five[:2].mean(0) - five[3:].mean(0)))
        )
        low, high = five.min(axis=0), five.max(axis=0)
        left, top, right, bottom = (margin * reach for margin in BOX_MARGIN)
        box = (low[0] - left, low[1] - top, high[0] + right, high[1] + bottom)
        return Face(tuple(map(float, box)), five, score, points if len(points) == 68 else None)


class FaceDetector(Protocol):
    """Finds faces. ``name`` goes into reports; ``looks`` says whether points come from the picture itself."""

    name: str
    looks: bool

    def detect(self, image: NDArray[np.uint8], name: str = "") -> list[Face]:
        """(H, W, 3) uint8 RGB -> its faces, in any order; ``name`` is the picture's file name (providers that read files)."""
        ...


def by_size(faces: Sequence[Face]) -> list[Face]:
    """Largest first."""
    return sorted(faces, key=lambda face: -face.size)


def choose(faces: Sequence[Face], number: int | None, where: str) -> Face:
    """The face that is meant.

    Args:
        faces: at least one, largest first.
        number: 1 is the largest; None takes it.
        where: file name, for the message.

    Raises:
        UserError: there is no such face.
    """
    if number is None:
        return faces[0]
    if not 1 <= number <= len(faces):
        raise UserError(
            f"{where}: --face {number}, expected 1 to {len(faces)}, the faces found, largest first; the overlay of a run "
            "without --face numbers them"
        )
    return faces[number - 1]
