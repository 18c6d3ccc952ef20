# SPDX-License-Identifier: Apache-2.0
"""Small picture sets for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def smooth_picture(width: int, height: int, number: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: gradients that differ between numbers and are not symmetric."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / max(1, width - 1)
    green = 255 * rows / max(1, height - 1)
    blue = (red * 0.5 + 37 * number) % 255
    return np.stack([red, green, blue], -1).astype(np.uint8)


def blocky_mask(width: int, height: int) -> np.ndarray:
    """(height, width) uint8: background rim, skin inside, left eye on the right side, right eye on the left."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 10 : -height // 10, width // 10 : -width // 10] = 1
    top, bottom = int(height * 0.35), int(height * 0.45)
    mask[top:bottom, int(width * 0.25) : int(width * 0.4)] = 5
    mask[top:bottom, int(width * 0.6) : int(width * 0.75)] = 4
    mask[: height // 8, : width // 2] = 13
    return mask


def write_pairs(root: Path, count: int = 3, size: tuple[int, int] = (40, 40), mask_size=None) -> Path:
    """FENeRF's layout with ``count`` pairs; returns the root."""
    images, masks = root / "celebahq_mask_img", root / "celebahq_mask_mask"
    images.mkdir(parents=True)
    masks.mkdir()
    for number in range(count):
        Image.fromarray(smooth_picture(*size, number)).save(images / f"{number:05d}.jpg", quality=95)
        Image.fromarray(blocky_mask(*(mask_size or size))).save(masks / f"{number:05d}.png")
    return root
