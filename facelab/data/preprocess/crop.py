# SPDX-License-Identifier: Apache-2.0
"""EG3D's FFHQ crop: where it lies in a photo, cutting it, and carrying points over.

Five points of the picture are fitted to five points of a standard head by two affine rows (weak perspective); the
mean length of the rows is the scale, their offsets say where the head's centre is. The picture is scaled so that one
unit of the standard head has 300 pixels, a square of 1024 pixels is cut around the centre, of which the middle 700
pixels become the picture (512 pixels usually). The head is not turned upright: its roll belongs to the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from facelab.data import eg3d_labels
from facelab.data.preprocess.faces import Points

UNIT_PIXELS = 300.0  # pixels per unit of the standard head in the wide square
WIDE, MIDDLE = 1024, 700  # the wide square and what is kept of it
RIM = 4  # source pixels around a cut that its resampling kernel may see


@dataclass(frozen=True)
class CropPlan:
    """Where the crop lies.

    Attributes:
        picture: (width, height) of the photo.
        resized: (width, height) the whole photo would be scaled to.
        corner: left and top of the wide square in the scaled photo, whole pixels.
        wide, middle: sides of the wide square and of its kept middle.
    """

    picture: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    wide: int = WIDE
    middle: int = MIDDLE

    @property
    def factor(self) -> NDArray[np.float64]:
        """(2,) scaled pixels per photo pixel, x and y (they differ by the rounding of the size)."""
        return np.array(self.resized) / np.array(self.picture)

    @property
    def low(self) -> NDArray[np.float64]:
        """(2,) left and top of the kept square in scaled pixels."""
        margin = int((self.wide - self.middle) / 2)
        return np.array(self.corner, dtype=np.float64) + margin

    @property
    def source_side(self) -> float:
        """Side of the crop in pixels of the photo: how much detail there is."""
        return float(self.middle / self.factor.mean())

    def to_crop(self, points: Points) -> Points:
        """(..., 2) photo pixels -> normalised crop coordinates, 0..1 from border to border, y down."""
        return ((np.asarray(points) + 0.5) * self.factor - self.low) / self.middle

    def to_photo(self, points: Points) -> Points:
        """The inverse of :meth:`to_crop`."""
        return (np.asarray(points) * self.middle + self.low) / self.factor - 0.5

    def outside(self) -> float:
        """Share of the crop that lies outside the photo and is black, 0..1."""
        low, size = self.low, np.array(self.resized, dtype=np.float64)
        common = (np.minimum(low + self.middle, size) - np.maximum(low, 0)).clip(min=0)
        return float(1 - common.prod() / self.middle**2)


def plan_crop(
    points5: Points,
    picture: tuple[int, int],
    standard: Points,
    unit_pixels: float = UNIT_PIXELS,
    wide: int = WIDE,
    middle: int = MIDDLE,
) -> CropPlan:
    """Find the crop. Sizes and corners are cut to whole pixels towards zero, as the released labels expect.

    Args:
        points5: (5, 2) photo pixels, y DOWN.
        picture: (width, height).
        standard: (5, 3) points of the standard head, y up, face towards +z.
        unit_pixels, wide, middle: 300, 1024, 700; the crop for face reconstruction is 102, 224, 224.

    Raises:
        ValueError: the points lie on one spot or are not finite.
    """
    fit = fit_standard(points5, picture[1], standard)
    crop = eg3d_labels.crop_of(picture, fit, wide, unit_pixels)
    return CropPlan(picture, (max(1, crop.width), max(1, crop.height)), (crop.left, crop.up), wide, middle)


def fit_standard(points5: Points, height: int, standard: Points) -> tuple[float, float, float]:
    """Fit of the standard head -> photo pixels per unit, and where its centre lies: x, and y counted UPWARDS.

    Args:
        points5: (5, 2) photo pixels, y DOWN.
        height: of the photo.
        standard: (5, 3).

    Raises:
        ValueError: the points lie on one spot or are not finite.
    """
    if not np.ptp(points5, axis=0).max() > 1e-3:
        raise ValueError("the five points lie on one spot")
    upward = np.stack([points5[:, 0], height - 1 - points5[:, 1]], axis=-1)
    return eg3d_labels.weak_perspective(torch.from_numpy(upward), torch.from_numpy(standard))


def cut(image: Image.Image, plan: CropPlan, size: int = 512) -> Image.Image:
    """The crop, (size, size); black outside the photo.

    Only the needed part is scaled (bicubic), so a face of few pixels in a large photo costs no memory;
    the result is that of scaling the whole photo and cutting. The last step is Lanczos.
    """
    factor, side = plan.factor, plan.middle
    low = plan.low.astype(int)
    inner_low = np.maximum(low, 0)
    inner_high = np.minimum(low + side, np.array(plan.resized))
    canvas = Image.new("RGB", (side, side))
    if (inner_low < inner_high).all():
        rim = np.ceil(RIM * np.maximum(factor, 1)).astype(int)
        outer_low = np.maximum(inner_low - rim, 0)
        outer_high = np.minimum(inner_high + rim, np.array(plan.resized))
        box = (*(outer_low / factor), *np.minimum(outer_high / factor, np.array(image.size)))
        part = image.resize(tuple(map(int, outer_high - outer_low)), Image.Resampling.BICUBIC, box=box)
        offset = inner_low - outer_low
        part = part.crop((*map(int, offset), *map(int, offset + inner_high - inner_low)))
        canvas.paste(part, tuple(map(int, inner_low - low)))
    return canvas if size == side else canvas.resize((size, size), Image.Resampling.LANCZOS)
