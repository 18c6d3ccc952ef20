# SPDX-License-Identifier: Apache-2.0
"""The pictures that Deep3DFaceRecon's network sees: faces aligned by five points, or a fixed part of generated ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from facelab.data import eg3d_labels
from facelab.data.preprocess.crop import CropPlan, cut, fit_standard, plan_crop
from facelab.data.preprocess.faces import Points
from facelab.face_model.bfm import alignment_points

UNIT_PIXELS = 102.0  # pixels per unit of the standard head
SIDE = 224
# cGOF's fixed part of 256 pixel pictures: scale, and the head's centre (x, and y counted upwards)
FIXED_SCALE, FIXED_CENTRE, FIXED_SIZE = 0.8975788298782894, (128.04371143331298, 89.95939537909564), 256


@dataclass(frozen=True)
class FaceAlignment:
    """One aligned face.

    Attributes:
        picture: (side, side) RGB; black outside the photo.
        plan: where it lies in the photo.
        scale: pixels of the picture per pixel of the photo.
        centre: where the standard head's centre lies in the photo: x, and y counted UPWARDS from the lowest row.
    """

    picture: Image.Image
    plan: CropPlan
    scale: float
    centre: tuple[float, float]

    def carry(self, points: Points) -> NDArray[np.float64]:
        """(..., 2) photo pixels, y DOWN -> pixels of the picture, y UP, as the original's landmark loss takes them.

        Its formula knows nothing of the whole pixels that the picture was cut at, so this differs from
        :meth:`CropPlan.to_crop` by up to a pixel.
        """
        size, resized = np.array(self.plan.picture), np.array(self.plan.resized)
        points = np.asarray(points, dtype=np.float64)
        upward = np.stack([points[..., 0], size[1] - 1 - points[..., 1]], axis=-1)
        return (upward - self.centre + size / 2) * self.scale - (resized / 2 - self.plan.wide / 2)


def align_face(
    photo: Image.Image, points: Points, standard: Points, unit_pixels: float = UNIT_PIXELS, side: int = SIDE
) -> FaceAlignment:
    """Scale a photo so that one unit of the standard head has 102 pixels, and cut 224 pixels around it; not turned.

    Args:
        photo: RGB.
        points: (5, 2) or (68, 2) photo pixels, y DOWN.
        standard: (5, 3) standard points, y up, face towards +z.
        unit_pixels, side: 102 and 224.

    Raises:
        ValueError: another number of points, or they lie on one spot or are not finite.
    """
    five = alignment_points(points) if len(points) == 68 else np.asarray(points)
    plan = plan_crop(five, photo.size, standard, unit_pixels, side, side)
    scale, x, y = fit_standard(five, photo.size[1], standard)
    return FaceAlignment(cut(photo, plan, side), plan, unit_pixels / scale, (x, y))


def fixed_crop(
    images: Tensor,
    scale: float = FIXED_SCALE,
    centre: tuple[float, float] | None = None,
    side: int = SIDE,
) -> Tensor:
    """The same part of every picture of a generator, for which no landmarks are looked for (cGOF). Differentiable.

    Args:
        images: (N, C, S, S).
        scale: pixels of the result per pixel of the pictures.
        centre: pixels, x and y counted UPWARDS; None takes cGOF's average, which belongs to its framing of heads.
        side: of the result.

    Returns:
        (N, C, side, side), 0 outside the pictures; bicubic, so values may leave their range a little.

    Raises:
        ValueError: pictures that are not square.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (N, C, S, S), got {tuple(images.shape)}")
    size = images.shape[2]
    if centre is None:
        centre = (FIXED_CENTRE[0] * size / FIXED_SIZE, FIXED_CENTRE[1] * size / FIXED_SIZE)
    crop = eg3d_labels.crop_of((size, size), (1.0, *centre), side, scale)
    sized = F.interpolate(images, (crop.height, crop.width), mode="bicubic", align_corners=False)
    right, low = crop.left + side - crop.width, crop.up + side - crop.height
    return F.pad(sized, (-crop.left, right, -crop.up, low))
