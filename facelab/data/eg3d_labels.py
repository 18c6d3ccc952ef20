# SPDX-License-Identifier: Apache-2.0
"""EG3D's 25-number camera labels: where they come from, their mirror image, other programs' conventions.

A label is a row-major 4x4 camera-to-world matrix (OpenCV axes) and row-major 3x3 intrinsics divided by
the image size. Everything here takes and returns torch tensors and computes in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.cameras.camera import Camera, opengl_to_opencv
from facelab.errors import UserError, nearest
from facelab.face_model.bfm import face_rotation

FOCAL = 2985.29 / 700  # FFHQ and AFHQ: 1015 * (1024 / 224) * (300 / 466.285) pixels of a 700 pixel crop
SHAPENET_FOCAL = 1.7074
RADIUS = 2.7
COR_CENTRE = (0.0, 0.0, 0.175)  # centre of rotation of the labels "cor" and "simplify"
MODES = ("orig", "cor", "simplify")
CONVENTIONS = {
    "opencv_c2w": "camera to world, x right, y down, z forward (EG3D, facelab)",
    "opengl_c2w": "camera to world, x right, y up, looks along -z (Blender, NeRF, pi-GAN)",
    "opencv_w2c": "world to camera, x right, y down, z forward (COLMAP, OpenCV extrinsics)",
    "opengl_w2c": "world to camera, x right, y up, looks along -z (OpenGL view matrix)",
}
_MODEL_CAMERA = 10.0  # distance of Deep3DFaceRecon's camera in its own units
_MODEL_SCALE, _MODEL_SHIFT = 0.27, (0.0, 0.006, 0.161)
_POINTS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")


# ------------------------------------------------------------------ labels and conventions


def intrinsics(focal: float | Tensor, count: int = 1, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """(count, 3, 3) float64 normalised intrinsics with square pixels."""
    matrix = torch.zeros(count, 3, 3, dtype=torch.float64)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.as_tensor(focal, dtype=torch.float64)
    matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = centre[0], centre[1], 1.0
    return matrix


def make_label(cam2world: Tensor, intrinsics_N33: Tensor) -> Tensor:
    """(N, 4, 4) and (N or 1, 3, 3) -> (N, 25) float64."""
    inner = intrinsics_N33.double().expand(len(cam2world), 3, 3)
    return Camera(cam2world.double(), inner).label()


def to_opencv_cam2world(matrix: Tensor, convention: str) -> Tensor:
    """(N, 4, 4) of one of :data:`CONVENTIONS` -> camera-to-world with OpenCV axes, float64.

    Raises:
        UserError: an unknown convention, or a world-to-camera matrix without an inverse.
    """
    if convention not in CONVENTIONS:
        hint = nearest(convention, CONVENTIONS)
        raise UserError(f"unknown camera convention {convention!r}, expected one of {', '.join(CONVENTIONS)}.{hint}")
    matrix = matrix.double()
    if convention.endswith("w2c"):
        if bool((torch.linalg.det(matrix[:, :3, :3]).abs() < 1e-9).any()):
            raise UserError("a world-to-camera matrix has no inverse: expected a rotation, got a singular matrix")
        matrix = torch.linalg.inv(matrix)
    return opengl_to_opencv(matrix) if convention.startswith("opengl") else matrix


def mirror_label(label: Tensor) -> Tensor:
    """Labels (N, 25) of the mirrored pictures: pose F P F with F = diag(-1, 1, 1, 1), the intrinsics stay.

    The sign of entries (0,1), (0,2), (1,0), (2,0), (0,3) changes; the dtype stays.
    """
    sign = torch.ones(25, dtype=label.dtype, device=label.device)
    sign[[1, 2, 3, 4, 8]] = -1
    return label * sign


def rescale_positions(label: Tensor, factor: float | Tensor) -> Tensor:
    """The same pictures in other scene units: camera positions times ``factor`` (a number or (N,))."""
    label = label.clone()
    label[:, [3, 7, 11]] *= torch.as_tensor(factor, dtype=label.dtype).reshape(-1, 1)
    return label


def on_radius(label: Tensor, radius: float) -> Tensor:
    """Every position moved along its own direction to ``radius``; ValueError for a camera at the origin."""
    distance = label[:, [3, 7, 11]].norm(dim=1)
    if bool((distance < 1e-9).any()):
        raise ValueError("a camera at the origin has no direction to move along")
    return rescale_positions(label, radius / distance)


# ------------------------------------------------------------------ from face reconstruction


def pose_from_face_model(angle: Tensor, trans: Tensor) -> Tensor:
    """Deep3DFaceRecon's rotation angles and translation, both (N, 3) -> (N, 4, 4) pose before its normalisation."""
    rotation = face_rotation(angle)
    shifted = trans.double() - torch.tensor([0.0, 0.0, _MODEL_CAMERA], dtype=torch.float64)
    centre = -(rotation @ shifted[..., None])[..., 0]
    pose = torch.eye(4, dtype=torch.float64).repeat(len(angle), 1, 1)
    pose[:, :3, :3] = rotation * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    pose[:, :3, 3] = _MODEL_SCALE * centre + torch.tensor(_MODEL_SHIFT, dtype=torch.float64)
    return pose


def normalise_pose(
    pose: Tensor, mode: str = "orig", radius: float = RADIUS, centre: tuple[float, ...] = COR_CENTRE
) -> Tensor:
    """Bring raw poses (N, 4, 4) to the labels' sphere.

    ``orig`` (released labels): position on the sphere of ``radius`` around the origin, rotation as it is.
    ``cor``: the sphere stands around ``centre``. ``simplify``: the same position, but a rotation without
    roll that looks at the centre. ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.{nearest(mode, MODES)}")
    middle = torch.tensor(centre if mode != "orig" else (0.0, 0.0, 0.0), dtype=torch.float64)
    direction = torch.nn.functional.normalize(pose[:, :3, 3].double() - middle, dim=-1)
    result = pose.double().clone()
    result[:, :3, 3] = radius * direction + middle
    if mode == "simplify":
        result[:, :3, :3] = look_at(direction)
    return result


def look_at(direction: Tensor) -> Tensor:
    """(N, 3) directions from the target to the camera -> (N, 3, 3) OpenCV camera axes without roll, y up."""
    forward = -torch.nn.functional.normalize(direction, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=direction.dtype).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)


def label_from_face_model(
    angle: Tensor, trans: Tensor, mode: str = "orig", focal: float = FOCAL, radius: float = RADIUS
) -> Tensor:
    """Deep3DFaceRecon's pose -> (N, 25) label as the released models were trained on (``mode`` orig)."""
    return make_label(normalise_pose(pose_from_face_model(angle, trans), mode, radius), intrinsics(focal))


def afhq_pose(rotation: Tensor, radius: float = RADIUS) -> Tensor:
    """AFHQ: (N, 3, 3) rotations alone -> (N, 4, 4) poses; the camera stands ``radius`` behind its own z axis."""
    pose = torch.eye(4, dtype=torch.float64).repeat(len(rotation), 1, 1)
    pose[:, :3, :3] = rotation.double()
    pose[:, :3, 3] = -radius * rotation.double()[:, :, 2]
    return pose


# ------------------------------------------------------------------ the crop that belongs to a label


@dataclass(frozen=True)
class Crop:
    """How a photo becomes a crop: resize to ``width`` x ``height``, then cut a square at (``left``, ``up``)."""

    width: int
    height: int
    left: int
    up: int
    size: int


def weak_perspective(points: Tensor, model_points: Tensor) -> tuple[float, float, float]:
    """Least squares fit of 5 image points (y upwards) by 5 model points -> (scale, x shift, y shift).

    Args:
        points: (5, 2) pixels, y counted from the lower edge: left eye, right eye, nose, left and right mouth
            corner, sides as in the picture.
        model_points: (5, 3).

    Raises:
        ValueError: other shapes, or points that are not finite.
    """
    points, model_points = torch.as_tensor(points).double(), torch.as_tensor(model_points).double()
    if points.shape != (5, 2) or model_points.shape != (5, 3):
        got = f"{tuple(points.shape)} and {tuple(model_points.shape)}"
        raise ValueError(f"expected (5, 2) image points ({', '.join(_POINTS)}) and (5, 3) model points, got {got}")
    if not (points.isfinite().all() and model_points.isfinite().all()):
        raise ValueError("landmarks hold NaN or infinite numbers")
    system = torch.cat([model_points, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    rows = torch.linalg.lstsq(system, points).solution  # (4, 2), a column per image axis
    scale = float(rows[:3].norm(dim=0).mean())
    return scale, float(rows[3, 0]), float(rows[3, 1])


def crop_of(size: tuple[int, int], fit: tuple[float, float, float], target: int = 1024, rescale: float = 300.0) -> Crop:
    """The crop of a photo of (width, height) pixels whose landmarks gave ``fit``.

    EG3D's pictures: 1024 and 300, then the middle 700 pixels; the reconstruction network's input: 224 and 102.
    """
    (width, height), (scale, shift_x, shift_y) = size, fit
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"the scale of the landmarks must be positive, got {scale}")
    factor = rescale / scale
    new_width, new_height = int(width * factor), int(height * factor)
    left = int(new_width / 2 - target / 2 + (shift_x - width / 2) * factor)
    up = int(new_height / 2 - target / 2 + (height / 2 - shift_y) * factor)
    return Crop(new_width, new_height, left, up, target)
