# SPDX-License-Identifier: Apache-2.0
"""Deep3DFaceRecon's use of the Basel face model (arXiv 1903.08527): its 257 coefficients, rotation, camera, light, the
five points it aligns pictures by, and the model itself from a file that the user has.

The model's own units are 10 cm; x to the subject's left, y up, face towards +z; angles in radians. The model file is
not part of facelab (Basel Face Model 2009: academic, by registration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facelab.errors import UserError
from facelab.face_model.base import LinearHeadModel

LAYOUT = {"identity": 80, "expression": 64, "albedo": 80, "angle": 3, "light": 27, "translation": 3}
FILE_KEYS = dict(zip(LAYOUT, ("id", "exp", "tex", "angle", "gamma", "trans"), strict=True))  # in the original's files
WIDTH = sum(LAYOUT.values())  # 257
FOCAL, CENTRE, DISTANCE = 1015.0, 112.0, 10.0  # of the camera: pixels of the 224 pixel picture; 10 cm
FIRST_LIGHT = (0.8, *[0.0] * 8)  # what is added to the light of each colour channel
_LOBE = (math.pi, 2 * math.pi / math.sqrt(3), 2 * math.pi / math.sqrt(8))  # by order of the harmonics
_ORDERS = (0, 1, 1, 1, 2, 2, 2, 2, 2)
_SIGNS = (1, -1, 1, -1, 1, -1, 1, -1, 1)
_SKIN = 1  # CelebAMask-HQ class of all triangles: the file knows no parts
_KEYS = (  # of the model file
    "meanshape",
    "idBase",
    "exBase",
    "meantex",
    "texBase",
    "tri",
    "point_buf",
    "keypoints",
    "frontmask2_idx",
    "tri_mask2",
    "skinmask",
)
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


# --- camera and light


def to_camera(points: Tensor, angle: Tensor, translation: Tensor, distance: float = DISTANCE) -> Tensor:
    """Turned and moved into the camera's axes: x right, y UP, z depth in front of the camera.

    Args:
        points: (N, P, 3) of the model.
        angle, translation: (N, 3).
        distance: of the camera from the origin; 10 for pictures of the network, 0 for cGOF's second camera.
    """
    placed = points @ face_rotation(angle).to(points) + translation[:, None]
    return torch.cat([placed[..., :2], distance - placed[..., 2:]], dim=-1)


def project(camera_points: Tensor, focal: float = FOCAL, centre: float = CENTRE) -> Tensor:
    """(N, P, 3) points in the camera's axes -> (N, P, 2) pixels, x to the right and y UP; row = side - 1 - y."""
    return focal * camera_points[..., :2] / camera_points[..., 2:] + centre


def light_of(numbers: Tensor, first: Sequence[float] = FIRST_LIGHT) -> Tensor:
    """(N, 3, 9) light of the coefficients -> (N, 9, 3) in facelab's harmonics (see :mod:`facelab.lighting`).

    Brightness of a white surface is then ``lighting.basis(normal) @ light``, not clamped. ``first`` (9,) is added to
    every channel.
    """
    factor = [sign * _LOBE[order] for sign, order in zip(_SIGNS, _ORDERS, strict=True)]
    return ((numbers + numbers.new_tensor(first)) * numbers.new_tensor(factor)).transpose(1, 2)


# --- the model


@dataclass(frozen=True, kw_only=True)
class BaselFace(LinearHeadModel):
    """The face of ``BFM_model_front.mat``.

    Attributes:
        around: (V, 8) triangles at each vertex, padded with F.
        front: vertices of the region that is compared with photos.
        front_faces: (G, 3) triangles of that region.
        skin: (V,) 1 where the surface is skin of one colour, else 0.
    """

    around: Tensor
    front: Tensor
    front_faces: Tensor
    skin: Tensor

    @staticmethod
    def load(path: str | Path) -> BaselFace:
        """Read ``BFM_model_front.mat`` (MATLAB 5).

        Raises:
            UserError: no such file, or not this model.
        """
        from facelab import assets

        path = assets.find("bfm_front", path)
        try:
            from scipy.io import loadmat

            return BaselFace.from_arrays(loadmat(path))
        except Exception as error:  # damaged MATLAB files raise whatever the damage leads to
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{path}: expected BFM_model_front.mat, got a file that does not fit ({reason})") from error

    @staticmethod
    def from_arrays(file: Mapping[str, NDArray], recentre: bool = True) -> BaselFace:
        """The arrays of the file, whose numbers of vertices and triangles begin at 1.

        Args:
            file: arrays by the file's names.
            recentre: move the mean of the mean vertices to the origin, as the coefficients' translations expect.

        Raises:
            ValueError: an array is missing or does not fit the others.
        """
        missing = [key for key in _KEYS if key not in file]
        if missing:
            raise ValueError(f"no array {missing[0]}")

        def rows(key: str) -> Tensor:
            return torch.from_numpy(np.asarray(file[key], dtype=np.float32))

        def numbers(key: str, highest: int) -> Tensor:
            found = torch.from_numpy(np.asarray(file[key]).astype(np.int64)) - 1
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) <= highest:
                raise ValueError(f"{key} must hold numbers within 1..{highest + 1}")
            return found

        mean = rows("meanshape").view(-1, 3)
        vertices = len(mean)
        faces = numbers("tri", vertices - 1)
        bases = {key: rows(key).T.reshape(-1, vertices, 3) for key in ("idBase", "exBase", "texBase")}
        return BaselFace(
            mean_shape=mean - mean.mean(dim=0) if recentre else mean,
            identity_basis=bases["idBase"],
            expression_basis=bases["exBase"],
            mean_albedo=rows("meantex").view(vertices, 3) / 255,
            albedo_basis=bases["texBase"] / 255,
            faces=faces,
            face_labels=torch.full((len(faces),), _SKIN),
            landmarks=numbers("keypoints", vertices - 1).flatten(),
            around=numbers("point_buf", len(faces)).view(vertices, -1),
            front=numbers("frontmask2_idx", vertices - 1).flatten(),
            front_faces=numbers("tri_mask2", vertices - 1),
            skin=rows("skinmask").flatten(),
        )

    def normals(self, vertices: Tensor) -> Tensor:
        """(N, V, 3) positions -> (N, V, 3) unit normals; every triangle at a vertex counts alike, whatever its area."""
        a, b, c = (vertices[:, self.faces[:, k]] for k in range(3))
        flat = F.normalize(torch.linalg.cross(a - b, b - c), dim=-1, eps=1e-12)
        flat = torch.cat([flat, torch.zeros_like(flat[:, :1])], dim=1)  # what the padding names
        return F.normalize(flat[:, self.around].sum(dim=2), dim=-1, eps=1e-12)

    def shaded(self, found: FaceCoefficients, first: Sequence[float] = FIRST_LIGHT) -> Tensor:
        """(N, V, 3) RGB of the lit surface, not clamped; ``first`` as in :func:`light_of`."""
        from facelab import lighting

        normals = self.normals(self.vertices(found.identity, found.expression))
        turned = normals @ face_rotation(found.angle).to(normals)
        return (lighting.basis(turned) @ light_of(found.light, first)) * self.linear_albedo(found.albedo)

    def in_camera(self, found: FaceCoefficients) -> Tensor:
        """(N, V, 3) vertices in the camera's axes, see :func:`to_camera`."""
        return to_camera(self.vertices(found.identity, found.expression), found.angle, found.translation)

    def landmarks68(self, found: FaceCoefficients) -> Tensor:
        """(N, 68, 2) pixels of the 224 pixel picture, y UP."""
        return project(self.landmark_positions(self.in_camera(found)))
