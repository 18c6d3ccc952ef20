# SPDX-License-Identifier: Apache-2.0
"""The 19 CelebAMask-HQ classes as plain tables; :mod:`facelab.data.labels` has the tensor side.

"Left" is the subject's left, which is the right side of the picture. Kept free of torch so that
worker processes which only read and write files start at once.
"""

from __future__ import annotations

import numpy as np

CLASSES: tuple[str, ...] = (
    "background",
    "skin",
    "nose",
    "eye_g",  # glasses
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",  # earring
    "neck_l",  # necklace
    "neck",
    "cloth",
)
NUM_CLASSES = len(CLASSES)

PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (204, 0, 0),
    (76, 153, 0),
    (204, 204, 0),
    (51, 51, 255),
    (204, 0, 204),
    (0, 255, 255),
    (255, 204, 204),
    (102, 51, 0),
    (255, 0, 0),
    (102, 204, 0),
    (255, 255, 0),
    (0, 0, 153),
    (0, 0, 204),
    (255, 51, 153),
    (0, 204, 204),
    (0, 51, 0),
    (255, 153, 51),
    (0, 204, 0),
)
PAINTER_ALIASES: dict[tuple[int, int, int], int] = {(51, 255, 255): 7}  # FENeRF's painter colours r_brow so

PAINT_ORDER: tuple[str, ...] = CLASSES[1:]  # part masks are painted in this order, later ones overwrite
LEFT_RIGHT: tuple[tuple[int, int], ...] = ((4, 5), (6, 7), (8, 9))

SOFGAN_TO_CELEBA: tuple[int, ...] = (0, 1, 6, 7, 4, 5, 2, 2, 10, 11, 12, 8, 9, 15, 3, 17, 16, 18, 13, 14)
BISENET19_TO_CELEBA: tuple[int, ...] = (0, 1, 6, 7, 4, 5, 3, 8, 9, 15, 2, 10, 11, 12, 17, 16, 18, 13, 14)


def _exchange_table() -> tuple[int, ...]:
    table = list(range(NUM_CLASSES))
    for left, right in LEFT_RIGHT:
        table[left], table[right] = right, left
    return tuple(table)


FLIP_TABLE: tuple[int, ...] = _exchange_table()


def from_palette(picture: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (...) uint8 class numbers.

    The painter's second colour for class 7 is understood too.

    Raises:
        ValueError: a colour that no class has; names it.
    """
    known = {**{colour: number for number, colour in enumerate(PALETTE)}, **PAINTER_ALIASES}
    codes = np.array([_pack(np.array(colour)) for colour in known])
    numbers = np.array(list(known.values()), dtype=np.uint8)
    order = codes.argsort()
    packed = _pack(picture)
    place = np.searchsorted(codes[order], packed).clip(max=len(codes) - 1)
    foreign = codes[order][place] != packed
    if foreign.any():
        colour = ",".join(str(int(v)) for v in picture[foreign][0])
        raise ValueError(f"colour {colour} belongs to none of the {NUM_CLASSES} classes")
    return numbers[order][place]


def _pack(picture: np.ndarray) -> np.ndarray:
    wide = picture.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
