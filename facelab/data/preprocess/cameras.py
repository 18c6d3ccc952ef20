# SPDX-License-Identifier: Apache-2.0
"""Where a photo's camera comes from: the fit to its points (see :mod:`facelab.data.preprocess.pose`), or
Deep3DFaceRecon's network, as the cameras of EG3D's released data sets do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from facelab.data.preprocess.alignment import align_face
from facelab.data.preprocess.faces import Face
from facelab.data.preprocess.head_points import standard_points
from facelab.data.preprocess.labels import Array, label_from_coefficients
from facelab.data.reading import reason_of
from facelab.errors import UserError, nearest

if TYPE_CHECKING:
    from facelab.nn.pretrained.face_reconstruction import FaceRegressor

SOURCES = ("points", "deep3d")
ANGLE, TRANSLATION = slice(224, 227), slice(254, 257)


@dataclass(frozen=True)
class Estimate:
    """A camera from elsewhere than the points.

    Attributes:
        label: (25,) EG3D's camera numbers.
        origin: where it comes from, for reports.
        coefficients: (257,) of the face model if they are known.
    """

    label: Array
    origin: str
    coefficients: Array | None = None


class CameraEstimator(Protocol):
    """Looks at a face and says where the camera stands."""

    def estimate(self, photo: Image.Image, face: Face, where: str) -> Estimate:
        """RGB photo, one of its faces, and the file's name for messages -> its camera."""
        ...


@dataclass(frozen=True)
class GivenCoefficients:
    """Angles (3,) in radians and translation (3,) of a Deep3DFaceRecon fit that somebody else made of this face."""

    angle: Array
    translation: Array

    def estimate(self, photo: Image.Image, face: Face, where: str) -> Estimate:
        """See :class:`CameraEstimator`."""
        return Estimate(label_from_coefficients(self.angle, self.translation), "coefficients")


class Deep3dCamera:
    """Deep3DFaceRecon's network on the aligned face.

    Args:
        network: see :func:`facelab.nn.pretrained.face_reconstruction.load_face_regressor`.
        standard: (5, 3) standard points that faces are aligned to; None takes the procedural head's. Cameras are
            right for a crop that was aligned to the same points.
    """

    def __init__(self, network: FaceRegressor, standard: Array | None = None) -> None:
        self.network = network
        self.standard = standard_points() if standard is None else standard

    def coefficients(self, photo: Image.Image, face: Face) -> Array:
        """(257,) face coefficients. ValueError if the points cannot be aligned."""
        import torch

        picture = align_face(photo, face.points5, self.standard).picture
        device = next(self.network.parameters()).device
        seen = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device).float() / 255
        with torch.no_grad():
            return self.network(seen)[0].double().cpu().numpy()

    def estimate(self, photo: Image.Image, face: Face, where: str) -> Estimate:
        """See :class:`CameraEstimator`. UserError if the network gives no finite numbers."""
        try:
            numbers = self.coefficients(photo, face)
        except ValueError as error:
            raise UserError(f"{where}: cannot be aligned: {error}; check the points") from error
        if not np.isfinite(numbers).all():
            raise UserError(f"{where}: the reconstruction network gives NaN or infinite numbers; check its weights")
        return Estimate(label_from_coefficients(numbers[ANGLE], numbers[TRANSLATION]), "deep3d", numbers)


def make_camera_estimator(
    name: str = "points",
    *,
    weights: str | Path | None = None,
    standard: Array | None = None,
    device: str = "cpu",
) -> CameraEstimator | None:
    """An estimator by name; None for ``points``, which need nothing.

    Args:
        name: one of :data:`SOURCES`.
        weights: Deep3DFaceRecon's ``epoch_20.pth``; None takes the one that was imported (``deep3d_recon``).
        standard: (5, 3) standard points of the crop, None for the procedural head's.
        device: where the network computes.

    Raises:
        UserError: an unknown name, no weights, or weights that nothing would read.
    """
    if name not in SOURCES:
        raise UserError(
            f"unknown camera source {name!r}, expected one of {', '.join(SOURCES)}.{nearest(name, SOURCES)}"
        )
    if name == "points":
        if weights is not None:
            raise UserError("--deep3d-weights has no effect on cameras from points; add --camera-from deep3d")
        return None
    from facelab.nn.pretrained.face_reconstruction import load_face_regressor

    return Deep3dCamera(load_face_regressor(weights, device), standard)


class LateCamera:
    """An estimator that is made when the first camera is wanted, as :class:`~.detectors.LateDetector` is.

    Args:
        make: makes it, once; may raise UserError.
    """

    def __init__(self, make: Callable[[], CameraEstimator | None]) -> None:
        self._made = functools.cache(make)

    def estimate(self, photo: Image.Image, face: Face, where: str) -> Estimate:
        """See :class:`CameraEstimator`."""
        estimator = self._made()
        assert estimator is not None, "cameras from points need no estimator"
        return estimator.estimate(photo, face, where)


def late_camera_estimator(
    name: str, *, weights: str | Path | None = None, standard: Array | None = None, device: str = "cpu"
) -> CameraEstimator | None:
    """:func:`make_camera_estimator`, but a network's file is opened when the first camera is wanted."""
    make = functools.partial(make_camera_estimator, name, weights=weights, standard=standard, device=device)
    return LateCamera(make) if name == "deep3d" else make()


def named_coefficients(numbers: Array) -> dict[str, list[float]]:
    """(257,) face coefficients -> lists under the names of the original's result files: id, exp, tex, angle ..."""
    from facelab.face_model.bfm import FILE_KEYS, LAYOUT

    parts = np.split(np.asarray(numbers), np.cumsum(list(LAYOUT.values()))[:-1])
    return {key: part.tolist() for key, part in zip(FILE_KEYS.values(), parts, strict=True)}


def read_coefficients(path: str | Path) -> tuple[Array, Array]:
    """Angles and translation of one face from a Deep3DFaceRecon result.

    Args:
        path: ``.mat`` or ``.npz`` with ``angle`` and ``trans``, or ``.npy`` with all 257 coefficients.

    Raises:
        UserError: unreadable, or without them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no face coefficients at {path}: expected a .mat, .npz or .npy file; check the path")
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            table = loadmat(path, variable_names=["angle", "trans"])
            angle, shift = table["angle"], table["trans"]
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as table:
                angle, shift = table["angle"], table["trans"]
        else:
            flat = np.load(path, allow_pickle=False).reshape(-1)
            angle, shift = flat[224:227], flat[254:257]
        pair = tuple(np.asarray(part, dtype=np.float64).reshape(3) for part in (angle, shift))
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{path}: expected face coefficients with 'angle' and 'trans' (three numbers each), in .mat, .npz or .npy; it "
            f"cannot be read ({reason_of(error)})"
        ) from error
    if not np.isfinite(pair).all():
        raise UserError(f"{path}: face coefficients hold NaN or infinite numbers; fit the face again")
    return pair[0], pair[1]
