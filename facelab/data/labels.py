# SPDX-License-Identifier: Apache-2.0
"""Encodings of the 19 CelebAMask-HQ classes: one-hot, colours, and the exchange of left and right.

A label map holds class numbers, (N, H, W) integers; background is class 0 and has no channel of
its own in FENeRF's 18-channel encoding. The tables stand in :mod:`facelab.data.classes` and can
be had from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.data.classes import (
    CLASSES,
    FLIP_TABLE,
    LEFT_RIGHT,
    NUM_CLASSES,
    PAINT_ORDER,
    PAINTER_ALIASES,
    PALETTE,
    SOFGAN_TO_CELEBA,
    from_palette,
)

__all__ = [
    "CLASSES",
    "FLIP_TABLE",
    "LEFT_RIGHT",
    "NUM_CLASSES",
    "PAINTER_ALIASES",
    "PAINT_ORDER",
    "PALETTE",
    "SOFGAN_TO_CELEBA",
    "colorize",
    "decolorize",
    "flip_labels",
    "from_palette",
    "from_scores",
    "one_hot",
    "one_hot_pm1",
    "remap",
    "remap_sofgan",
]


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


def flip_labels(label_map: Tensor) -> Tensor:
    """Exchange left and right classes (eyes, brows, ears); the caller mirrors the picture itself. Same dtype."""
    return remap(label_map, FLIP_TABLE)


def remap_sofgan(label_map: Tensor) -> Tensor:
    """Class numbers of the 20-class SofGAN parser -> CelebAMask-HQ numbers. Same shape and dtype."""
    return remap(label_map, SOFGAN_TO_CELEBA)


def remap(label_map: Tensor, table: tuple[int, ...]) -> Tensor:
    """Replace every class number c by ``table[c]``. Same shape and dtype."""
    return torch.tensor(table, dtype=label_map.dtype, device=label_map.device)[label_map.long()]


def _check_map(label_map: Tensor) -> None:
    if label_map.ndim != 3 or label_map.is_floating_point():
        raise ValueError(f"a label map must be (N, H, W) integers, got {tuple(label_map.shape)} {label_map.dtype}")
