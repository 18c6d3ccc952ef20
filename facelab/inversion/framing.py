# SPDX-License-Identifier: Apache-2.0
"""Cutting a photo as the training pictures of CelebA-HQ and FFHQ were cut: upright, by eyes and mouth.

The square is that of arXiv 1710.10196, appendix C. Unlike EG3D's crop it is turned with the head, so that a camera of two
angles is enough to render it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]
LARGEST = 4096  # pixels a side of what is cut before it is reduced


@dataclass(frozen=True)
class Square:
    """A square in a photo.

    Attributes:
        centre: (2,) pixels, pixel (0, 0) in the middle of the first pixel, y down.
        across: (2,) from the centre to the middle of the right-hand edge, pixels.
    """

    centre: tuple[float, float]
    across: tuple[float, float]

    @property
    def side(self) -> float:
        """Pixels of the photo."""
        return 2 * float(np.hypot(*self.across))

    @property
    def roll(self) -> float:
        """Turn of the square in radians, positive where it leans to the right of the picture."""
        return float(np.arctan2(self.across[1], self.across[0]))

    def affine(self, side: int) -> tuple[float, ...]:
        """Pillow's six numbers: cut-out of ``side`` pixels -> photo, borders of pixels at whole numbers."""
        ax, ay = (2 * a / side for a in self.across)
        cx, cy = (
            c + 0.5 - p for c, p in zip(self.centre, (self.across[0] - self.across[1], self.across[0] + self.across[1]))
        )
        return (ax, -ay, cx, ay, ax, cy)

    def outside(self, size: tuple[int, int]) -> float:
        """Share of the square outside a photo of (width, height), 0..1, on a lattice of 64 x 64 points."""
        x, y = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64)
        a, b, c, d, e, f = self.affine(1)
        u, v = a * x + b * y + c, d * x + e * y + f
        return float(1 - ((u >= 0) & (u <= size[0]) & (v >= 0) & (v <= size[1])).mean())


def upright_square(points5: Points) -> Square:
    """The square around a face.

    Args:
        points5: (5, 2) pixels, y down: eyes, nose tip, mouth corners, picture-left first.

    Raises:
        ValueError: points on one spot.
    """
    eyes, mouth = points5[:2].mean(axis=0), points5[3:].mean(axis=0)
    across, up = points5[1] - points5[0], eyes - mouth
    # both the line of the eyes and the line to the mouth say which way is right
    right = across - np.array([up[1], -up[0]])
    length = np.hypot(*right)
    if not length > 1e-6:
        raise ValueError("the five points lie on one spot")
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*up))
    centre, reach = eyes - 0.1 * up, right / length * half
    return Square((float(centre[0]), float(centre[1])), (float(reach[0]), float(reach[1])))


def cut_square(image: Image.Image, square: Square, size: int) -> Image.Image:
    """The square as a picture of ``size`` pixels, averaged over areas; black outside the photo."""
    fine = size * max(1, min(int(np.ceil(square.side / size)), LARGEST // size))
    picture = image.transform(
        (fine, fine), Image.Transform.AFFINE, square.affine(fine), resample=Image.Resampling.BICUBIC
    )
    return picture if fine == size else picture.resize((size, size), Image.Resampling.BOX)


def cut_labels(labels: NDArray[np.uint8], square: Square, size: int) -> NDArray[np.uint8]:
    """The same for a map of classes, nearest pixels; class 0 outside."""
    image = Image.fromarray(labels)
    cut = image.transform((size, size), Image.Transform.AFFINE, square.affine(size), resample=Image.Resampling.NEAREST)
    return np.array(cut)
