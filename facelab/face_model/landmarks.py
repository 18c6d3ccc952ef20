# SPDX-License-Identifier: Apache-2.0
"""The 68 landmarks in 300-W order: names, left/right exchange, groups for drawing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# name -> (first, last + 1, closed line)
GROUPS: dict[str, tuple[int, int, bool]] = {
    "contour": (0, 17, False),
    "right_brow": (17, 22, False),
    "left_brow": (22, 27, False),
    "nose_ridge": (27, 31, False),
    "nose_base": (31, 36, False),
    "right_eye": (36, 42, True),
    "left_eye": (42, 48, True),
    "outer_lips": (48, 60, True),
    "inner_lips": (60, 68, True),
}

FIVE = ("right_eye", "left_eye", "nose_tip", "right_mouth_corner", "left_mouth_corner")
_LIDS = ((37, 38, 40, 41), (43, 44, 46, 47))  # eye corners left out: they are the least certain


def to_five(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """68 points -> the five that face detectors give, in the order of :data:`FIVE`.

    Subject's right is picture-left in a frontal picture. An eye is the mean of its four lid points.

    Args:
        points: (..., 68, D).

    Returns:
        (..., 5, D).

    >>> to_five(np.arange(68.0)[:, None])[:, 0].tolist()
    [39.0, 45.0, 30.0, 48.0, 54.0]
    """
    eyes = [points[..., ids, :].mean(axis=-2) for ids in map(list, _LIDS)]
    return np.stack([*eyes, points[..., 30, :], points[..., 48, :], points[..., 54, :]], axis=-2)


def mirror_order() -> NDArray[np.int64]:
    """(68,) index of each landmark's partner on the other side of the face.

    >>> order = mirror_order()
    >>> int(order[36]), int(order[30]), bool((order[order] == np.arange(68)).all())
    (45, 30, True)
    """
    order = list(range(16, -1, -1)) + list(range(26, 16, -1)) + [27, 28, 29, 30, 35, 34, 33, 32, 31]
    order += [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    order += [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
    return np.array(order)
