# SPDX-License-Identifier: Apache-2.0
"""Head pose from 5 or 68 points: perspective least squares on the procedural head, no weights.

Unknown are the camera's rotation and position and the head's shape (components with a standard normal prior). The
points are those of the crop, whose focal length EG3D fixes, so no focal length of the photo is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from facelab.data.preprocess.faces import Points
from facelab.data.preprocess.head_points import HeadPoints, head_points
from facelab.data.preprocess.labels import FLIP, FOCAL, RADIUS, Array, normalised_pose

POINT_NOISE = 0.008  # of the crop's side: MTCNN differs from hand-made points by 0.03 eye distances (0.26 sides)
DISTANCE_NOISE = 0.15  # scene units around RADIUS: the crop sets the head's size


@dataclass(frozen=True)
class HeadPose:
    """A fitted camera.

    Attributes:
        cam2world: (4, 4) OpenCV axes, EG3D's scene, as fitted (its radius is not exactly 2.7).
        misfit: how unlikely the points are as a human head's, noise and shape together: square root of the cost per
            degree of freedom; about 1 is usual.
        components: (K,) shape in standard deviations.
    """

    cam2world: Array
    misfit: float
    components: Array

    def label_pose(self) -> Array:
        """(4, 4) at the labels' radius 2.7."""
        return normalised_pose(self.cam2world)


def fit_pose(points: Points, focal: float = FOCAL) -> HeadPose:
    """Fit the procedural head to points.

    Args:
        points: (5, 2) or (68, 2) normalised crop coordinates, 0..1, y down.
        focal: in sides of the crop.

    Raises:
        ValueError: another shape.
    """
    from scipy.optimize import least_squares
    from scipy.spatial.transform import Rotation

    points = np.asarray(points, dtype=np.float64)
    if points.shape not in ((5, 2), (68, 2)) or not np.isfinite(points).all():
        raise ValueError(f"expected (5, 2) or (68, 2) finite points, got {points.shape}")
    head = head_points(len(points))  # type: ignore[arg-type]
    centre = head.mean.mean(axis=0)
    weight = 1 / (POINT_NOISE * head.noise[:, None])

    def errors(unknown: Array) -> Array:
        turn = Rotation.from_rotvec(unknown[:3]).as_matrix() @ FLIP
        picture = _project(head, centre, turn, unknown[3:6], unknown[6:], focal)
        prior = np.append(unknown[6:], (np.linalg.norm(unknown[3:6]) - RADIUS) / DISTANCE_NOISE)
        return np.concatenate([((picture - points) * weight).ravel(), prior])

    start = _start(points, head, centre, focal)
    best = least_squares(errors, start, method="trf", max_nfev=100)
    turn = Rotation.from_rotvec(best.x[:3]).as_matrix() @ FLIP
    pose = np.eye(4)
    pose[:3, :3] = turn.T
    pose[:3, 3] = centre - turn.T @ best.x[3:6]
    misfit = float(np.sqrt(2 * best.cost / (points.size - 6)))  # least_squares halves the sum of squares
    return HeadPose(pose, misfit, best.x[6:])


def _project(head: HeadPoints, centre: Array, turn: Array, shift: Array, components: Array, focal: float) -> Points:
    """World-to-camera rotation ``turn`` about ``centre``, then ``shift`` -> (P, 2) normalised coordinates."""
    shape = head.mean - centre + np.tensordot(components, head.basis, axes=1)
    camera = shape @ turn.T + shift
    return focal * camera[:, :2] / camera[:, 2:].clip(min=0.1) + 0.5


def _start(points: Points, head: HeadPoints, centre: Array, focal: float) -> Array:
    """Frontal, with the roll of the points and their middle in its place."""
    if len(points) == 5:
        right, left = points[0], points[1]
    else:
        right, left = points[36:42].mean(axis=0), points[42:48].mean(axis=0)
    roll = np.arctan2(left[1] - right[1], left[0] - right[0])
    middle = (points.mean(axis=0) - 0.5) * RADIUS / focal
    return np.concatenate([[0.0, 0.0, roll], middle, [RADIUS], np.zeros(len(head.basis))])


def project(cam2world: Array, points: Array, focal: float = FOCAL) -> Points:
    """(..., 3) world points -> (..., 2) normalised picture coordinates, y down."""
    camera = (np.asarray(points) - cam2world[:3, 3]) @ cam2world[:3, :3]
    return focal * camera[..., :2] / camera[..., 2:] + 0.5
