# SPDX-License-Identifier: Apache-2.0
"""Conventions of Deep3DFaceRecon (arXiv 1903.08527) on the Basel face model: its 257 coefficients, its rotation, the
five points it aligns pictures by.

The model's own units are 10 cm; x to the subject's left, y up, face towards +z; angles in radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LAYOUT = {"identity": 80, "expression": 64, "albedo": 80, "angle": 3, "light": 27, "translation": 3}
FILE_KEYS = dict(zip(LAYOUT, ("id", "exp", "tex", "angle", "gamma", "trans"), strict=True))  # in the original's files
WIDTH = sum(LAYOUT.values())  # 257
_EYES = ((36, 39), (42, 45))  # corners of each eye in 300-W order


@dataclass(frozen=True)
class FaceCoefficients:
    """N faces.

    Attributes:
        identity, expression, albedo: (N, 80), (N, 64), (N, 80) standard deviations.
        angle: (N, 3) about x, y, z, radians; see :func:`face_rotation`.
        light: (N, 3, 9) spherical harmonics of each colour channel, without the constant first term.
        translation: (N, 3) in 10 cm.
    """

    identity: Tensor
    expression: Tensor
    albedo: Tensor
    angle: Tensor
    light: Tensor
    translation: Tensor

    @staticmethod
    def split(numbers: Tensor) -> FaceCoefficients:
        """(N, 257) numbers in the order of :data:`LAYOUT`. ValueError for another shape."""
        if numbers.ndim != 2 or numbers.shape[1] != WIDTH:
            raise ValueError(f"face coefficients must be (N, {WIDTH}), got {tuple(numbers.shape)}")
        parts = dict(zip(LAYOUT, numbers.split(list(LAYOUT.values()), dim=1), strict=True))
        return FaceCoefficients(**(parts | {"light": parts["light"].reshape(-1, 3, 9)}))

    def join(self) -> Tensor:
        """The way back, (N, 257)."""
        return torch.cat([getattr(self, name).flatten(1) for name in LAYOUT], dim=1)


def face_rotation(angle: Tensor) -> Tensor:
    """(N, 3) angles about x, y, z in radians -> (N, 3, 3) ``(Rz Ry Rx)^T`` of right-handed rotations, float64.

    It turns row vectors: ``points @ rotation``.
    """
    parts = []
    for axis, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        cosine, sine = angle[:, axis].double().cos(), angle[:, axis].double().sin()
        matrix = torch.eye(3, dtype=torch.float64, device=angle.device).repeat(len(angle), 1, 1)
        matrix[:, i, i], matrix[:, j, j] = cosine, cosine
        matrix[:, i, j], matrix[:, j, i] = -sine, sine
        parts.append(matrix)
    return (parts[2] @ parts[1] @ parts[0]).transpose(1, 2)


def alignment_points(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """68 points in 300-W order -> the five that pictures are aligned by: eyes, nose tip, mouth corners.

    An eye is the middle of its corners, unlike in :func:`facelab.face_model.landmarks.to_five`.

    Args:
        points: (..., 68, D).

    Returns:
        (..., 5, D), of each pair the subject's right first.

    >>> alignment_points(np.arange(68.0)[:, None])[:, 0].tolist()
    [37.5, 43.5, 30.0, 48.0, 54.0]
    """
    eyes = [points[..., list(corners), :].mean(axis=-2) for corners in _EYES]
    return np.stack([*eyes, points[..., 30, :], points[..., 48, :], points[..., 54, :]], axis=-2)
