# SPDX-License-Identifier: Apache-2.0
"""The 19 CelebAMask-HQ classes: names, colours, encodings and the exchange of left and right.

"Left" is the subject's left, which is the right side of the picture. A label map holds class
numbers, (N, H, W) integers; background is class 0 and has no channel of its own in FENeRF's
18-channel encoding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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


def _exchange_table() -> tuple[int, ...]:
    table = list(range(NUM_CLASSES))
    for left, right in LEFT_RIGHT:
        table[left], table[right] = right, left
    return tuple(table)


FLIP_TABLE: tuple[int, ...] = _exchange_table()


def one_hot_pm1(label_map: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W) class numbers -> (N, 18, H, W): +1 member, -1 not, classes 1..18; background is all -1 (FENeRF)."""
    return one_hot(label_map, dtype)[:, 1:] * 2 - 1


def one_hot(label_map: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W) class numbers -> (N, 19, H, W) of 0 and 1, on the map's device."""
    _check_map(label_map)
    classes = torch.arange(NUM_CLASSES, device=label_map.device).view(1, -1, 1, 1)
    return (label_map.unsqueeze(1) == classes).to(dtype)


def from_scores(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Class scores -> the label map (N, H, W), int64.

    Args:
        scores: (N, 19, H, W) with a background channel, or (N, 18, H, W) for classes 1..18.
        threshold: with 18 channels, background wins where no score exceeds it: 0 for scores
            in [-1, 1], 0.5 for scores in [0, 1]. Not used with 19 channels.

    Raises:
        ValueError: another number of channels.
    """
    if scores.ndim != 4 or scores.shape[1] not in (NUM_CLASSES - 1, NUM_CLASSES):
        raise ValueError(f"scores must be (N, 18 or 19, H, W), got {tuple(scores.shape)}")
    if scores.shape[1] == NUM_CLASSES - 1:
        background = torch.full_like(scores[:, :1], threshold)
        scores = torch.cat([background, scores], dim=1)  # argmax takes the first of equals: background
    return scores.argmax(dim=1)


def colorize(label_map: Tensor) -> Tensor:
    """(N, H, W) class numbers -> (N, 3, H, W) uint8 RGB palette picture, on the map's device."""
    _check_map(label_map)
    palette = torch.tensor(PALETTE, dtype=torch.uint8, device=label_map.device)
    return palette[label_map.long()].permute(0, 3, 1, 2).contiguous()


def decolorize(picture: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 RGB palette picture -> (N, H, W) uint8 class numbers; ValueError on a foreign colour."""
    if picture.ndim != 4 or picture.shape[1] != 3 or picture.dtype != torch.uint8:
        raise ValueError(f"a palette picture must be (N, 3, H, W) uint8, got {tuple(picture.shape)} {picture.dtype}")
    ids = from_palette(picture.permute(0, 2, 3, 1).cpu().numpy())
    return torch.from_numpy(ids).to(picture.device)


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


def flip_labels(label_map: Tensor) -> Tensor:
    """Exchange left and right classes (eyes, brows, ears); the caller mirrors the picture itself. Same dtype."""
    return remap(label_map, FLIP_TABLE)


def remap_sofgan(label_map: Tensor) -> Tensor:
    """Class numbers of the 20-class SofGAN parser -> CelebAMask-HQ numbers. Same shape and dtype."""
    return remap(label_map, SOFGAN_TO_CELEBA)


def remap(label_map: Tensor, table: tuple[int, ...]) -> Tensor:
    """Replace every class number c by ``table[c]``. Same shape and dtype."""
    return torch.tensor(table, dtype=label_map.dtype, device=label_map.device)[label_map.long()]


def _pack(picture: np.ndarray) -> np.ndarray:
    wide = picture.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _check_map(label_map: Tensor) -> None:
    if label_map.ndim != 3 or label_map.is_floating_point():
        raise ValueError(f"a label map must be (N, H, W) integers, got {tuple(label_map.shape)} {label_map.dtype}")
