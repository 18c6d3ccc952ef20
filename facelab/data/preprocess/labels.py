# SPDX-License-Identifier: Apache-2.0
"""Poses as numpy matrices and EG3D's 25 numbers; the conventions themselves stand in :mod:`facelab.data.eg3d_labels`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from facelab.data import eg3d_labels

Array = NDArray[np.float64]
FOCAL, RADIUS = eg3d_labels.FOCAL, eg3d_labels.RADIUS
FLIP = np.diag([1.0, -1.0, -1.0])  # x right, y up, towards the viewer <-> x right, y down, forward


def label(pose: Array) -> Array:
    """(4, 4) camera-to-world -> (25,) with the crop's intrinsics."""
    matrix = torch.from_numpy(np.asarray(pose, dtype=np.float64))
    return eg3d_labels.make_label(matrix[None], eg3d_labels.intrinsics(FOCAL))[0].numpy()


def normalised_pose(pose: Array) -> Array:
    """(4, 4) with the camera moved along the line from the origin to the labels' radius; the rotation stays."""
    matrix = torch.from_numpy(np.asarray(pose, dtype=np.float64))
    return eg3d_labels.normalise_pose(matrix[None])[0].numpy()


def label_from_coefficients(angle: Array, translation: Array) -> Array:
    """Angles (3,) in radians and translation (3,) of a Deep3DFaceRecon fit -> (25,), as the released labels."""
    pair = (torch.from_numpy(np.asarray(part, dtype=np.float64))[None] for part in (angle, translation))
    return eg3d_labels.label_from_face_model(*pair)[0].numpy()


def mirror_label(numbers: Array) -> Array:
    """(25,) -> (25,): the camera of the mirrored picture."""
    return eg3d_labels.mirror_label(torch.from_numpy(np.asarray(numbers, dtype=np.float64))[None])[0].numpy()


def view_angles(pose: Array) -> tuple[float, float, float]:
    """(4, 4) or (3, 3) camera-to-world -> yaw, pitch, roll of the view in radians.

    Yaw is positive when the camera stands at the subject's left (+x), pitch when it stands above, roll when
    the head leans towards picture-right; all are 0 for a level frontal picture.
    """
    rotation = np.asarray(pose)[:3, :3]
    backward = -rotation[:, 2]
    yaw = np.arctan2(backward[0], backward[2])
    pitch = np.arcsin(np.clip(backward[1], -1.0, 1.0))
    level_right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    up = np.cross(backward, level_right)
    roll = np.arctan2(rotation[:, 0] @ up, rotation[:, 0] @ level_right)
    return float(yaw), float(pitch), float(roll)
