# SPDX-License-Identifier: Apache-2.0
"""The landmarks of the procedural head as a small linear model, and where that head stands in EG3D's scene.

EG3D's scene is defined by its released labels: a head scaled and placed as Deep3DFaceRecon's. The similarity below
puts ours there. It was found once, without any photograph: scale and shift (no rotation) that bring the five mean
points of our head closest to the five standard points of that programme; :func:`align_frames` does it again.
The five points so placed also serve as the standard points of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from facelab.data.preprocess.labels import Array
from facelab.data.reading import reason_of
from facelab.errors import UserError
from facelab.face_model.bfm import alignment_points
from facelab.face_model.landmarks import to_five

UNIT = 0.27  # EG3D's scene units per unit (10 cm) of the standard head
CENTRE = np.array([0.0, 0.006, 0.161])  # where the standard head's origin lies in EG3D's scene
STANDARD_SCALE = 14.2656  # units of the standard head (10 cm) per scene unit of the procedural head
STANDARD_SHIFT = np.array([0.0, 0.2194, -0.6725])
KEPT = {5: 12, 68: 24}  # shape components; five mirrored points of a linear model have no more than 12 in use
CONTOUR_NOISE = 3.0  # the jaw line slides over the face as it turns: such points count less


@dataclass(frozen=True)
class HeadPoints:
    """P landmarks in EG3D's scene units.

    Attributes:
        mean: (P, 3), x to the subject's left, y up, face towards +z.
        basis: (K, P, 3) displacement per standard deviation of each component.
        noise: (P,) how uncertain a detector is of each point, relative to the best ones.
    """

    mean: Array
    basis: Array
    noise: Array


def to_scene(points: Array) -> Array:
    """Procedural head's scene units -> EG3D's, (..., 3)."""
    return UNIT * (STANDARD_SCALE * np.asarray(points, dtype=np.float64) + STANDARD_SHIFT) + CENTRE


@lru_cache(maxsize=2)
def head_points(count: Literal[5, 68]) -> HeadPoints:
    """The 5 or 68 landmarks with the components of their shape that matter. ValueError on another count."""
    from facelab.face_model.procedural import ProceduralHead

    if count not in KEPT:
        raise ValueError(f"expected 5 or 68 landmarks, got {count}")
    model = ProceduralHead.create()
    ids = model.landmarks
    mean = model.mean_shape[ids].double().numpy()
    identity = model.identity_basis[:, ids].double().numpy()
    expression = model.expression_basis[:, ids].double().numpy()
    basis = np.concatenate([identity, expression])
    noise = np.ones(68)
    noise[:17] = CONTOUR_NOISE
    if count == 5:
        mean, basis, noise = to_five(mean), to_five(basis), np.ones(5)
    _, strength, direction = np.linalg.svd(basis.reshape(len(basis), -1), full_matrices=False)
    kept = (strength[:, None] * direction)[: KEPT[count]].reshape(-1, count, 3)
    return HeadPoints(to_scene(mean), UNIT * STANDARD_SCALE * kept, noise)


def standard_points() -> Array:
    """(5, 3) points of the standard head that the crop is fitted to, in its units (10 cm)."""
    return (head_points(5).mean - CENTRE) / UNIT


def read_standard_points(path: str) -> Array:
    """The official five or 68 standard points from ``.mat`` (key ``lm``), ``.npy`` or text -> (5, 3).

    Raises:
        UserError: unreadable or wrongly shaped.
    """
    if not Path(path).is_file():
        raise UserError(f"no standard points at {path}: expected a .mat, .npy or .txt file; check the path")
    try:
        if path.endswith(".mat"):
            from scipy.io import loadmat

            table = np.asarray(loadmat(path, variable_names=["lm"])["lm"], dtype=np.float64)
        else:
            table = np.load(path, allow_pickle=False) if path.endswith(".npy") else np.loadtxt(path)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{path}: expected standard points (5, 3) or (68, 3), got an unreadable file ({reason_of(error)})"
        ) from error
    if table.shape not in ((5, 3), (68, 3)) or not np.isfinite(table).all():
        raise UserError(f"{path}: expected standard points (5, 3) or (68, 3), got {table.shape}")
    if len(table) == 5:
        return table
    return alignment_points(table).astype(np.float64)


def align_frames(standard: Array) -> tuple[float, Array]:
    """Scale and shift that bring the procedural head's five mean points closest to (5, 3) standard points."""
    from facelab.face_model.procedural import ProceduralHead

    model = ProceduralHead.create()
    points = to_five(model.mean_shape[model.landmarks].double().numpy())
    ours, theirs = points - points.mean(axis=0), standard - standard.mean(axis=0)
    scale = float((ours * theirs).sum() / (ours**2).sum())
    shift = standard.mean(axis=0) - scale * points.mean(axis=0)
    shift[0] = 0.0  # heads are symmetric
    return scale, shift
