# SPDX-License-Identifier: Apache-2.0
"""From 19 classes to the overlapping region channels that CNeRF's discriminators compare (arXiv 2302.01579, section 3).

A region is a group of classes. Small parts (eyes, brows, lips, nose, ears) are widened by some pixels before they are
put together, and what they grow over stays in the other channels too, so channels overlap.

The order of the channels is that of the data the released model was trained with: 3 is the mouth, 4 the brows (its
description exchanges the two). Ask for regions by name, not by number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from facelab.data.classes import NUM_CLASSES

REGION_CLASSES: dict[str, tuple[int, ...]] = {
    "background": (0,),
    "face": (1,),
    "eye": (3, 4, 5),
    "mouth": (10, 11, 12),
    "brow": (6, 7),
    "nose": (2,),
    "ear": (8, 9, 15),
    "hair": (13, 14),
    "neck_cloth": (16, 17, 18),
}
REGIONS: tuple[str, ...] = tuple(REGION_CLASSES)  # channel order
REGION_PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (239, 234, 90),
    (44, 105, 154),
    (4, 139, 168),
    (13, 179, 158),
    (131, 227, 119),
    (185, 231, 105),
    (107, 137, 198),
    (241, 196, 83),
)
# class -> side in pixels of the square by which it is widened, at every picture size
REFERENCE_WIDENING: dict[int, int] = {2: 3, 4: 3, 5: 3, 10: 3, 11: 3, 12: 3, 6: 4, 7: 4, 8: 5, 9: 5}
# the original's 4 x 4 reaches one pixel up and left but two down and right, so a mirrored face gets other brows; 5 x 5
# is the smallest symmetric square that covers it and its mirror images
WIDENING: dict[int, int] = {**REFERENCE_WIDENING, 6: 5, 7: 5}


def fuse_regions(
    label_map: Tensor,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    widening: Mapping[int, int] | None = None,
    reference: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Class numbers -> one channel for each group of classes, 1 where the widened classes are, else 0.

    Runs where the label map lies. Mirror the map first, then call this: the original does so too, and with its
    even square the order matters.

    Args:
        label_map: (N, H, W) integers, CelebAMask-HQ classes.
        groups: classes of each of the K channels; None means CNeRF's nine (``REGION_CLASSES``).
        widening: class -> side of its square in pixels, 1 where absent; a pixel at (r, c) spreads to rows
            r - (s - 1) // 2 ... r + s // 2 and the same columns. None means ``WIDENING``.
        reference: the original's squares (``REFERENCE_WIDENING``), 4 x 4 for the brows.

    Returns:
        (N, K, H, W) of 0 and 1; channels overlap.

    Raises:
        ValueError: not (N, H, W) integers, a class outside 0..18, both ``widening`` and ``reference``.

    >>> eye = torch.ones(1, 5, 5, dtype=torch.uint8); eye[0, 2, 2] = 4
    >>> channels = fuse_regions(eye)
    >>> channels.shape, channels[0, REGIONS.index("eye")].sum().item(), channels[0, REGIONS.index("face")].sum().item()
    (torch.Size([1, 9, 5, 5]), 9.0, 24.0)
    """
    if label_map.ndim != 3 or label_map.is_floating_point():
        raise ValueError(f"a label map must be (N, H, W) integers, got {tuple(label_map.shape)} {label_map.dtype}")
    if widening is not None and reference:
        raise ValueError("reference means the original's widening; expected one of widening and reference, got both")
    squares = widening if widening is not None else REFERENCE_WIDENING if reference else WIDENING
    chosen = tuple(tuple(group) for group in (REGION_CLASSES.values() if groups is None else groups))
    _check(label_map, chosen, squares)
    out = torch.zeros((len(label_map), len(chosen), *label_map.shape[1:]), dtype=dtype, device=label_map.device)
    numbers = label_map.long()
    for side, channels, table in _tables(chosen, tuple(sorted(squares.items())), dtype, label_map.device):
        out.index_add_(1, channels, widen(table[numbers].permute(0, 3, 1, 2), side))
    return out.clamp_(max=1)


@functools.lru_cache(maxsize=32)
def _tables(
    groups: tuple[tuple[int, ...], ...], squares: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> list[tuple[int, Tensor, Tensor]]:
    """For each side: the channels that have classes of it, and (19, channels) which classes; kept on the device."""
    sides, tables = dict(squares), []
    for side in sorted({sides.get(c, 1) for group in groups for c in group}):
        table = torch.zeros(NUM_CLASSES, len(groups), dtype=dtype)
        for channel, group in enumerate(groups):
            for number in group:
                table[number, channel] = float(sides.get(number, 1) == side)
        channels = table.any(dim=0).nonzero()[:, 0]
        tables.append((side, channels.to(device), table[:, channels].to(device)))
    return tables


def widen(members: Tensor, side: int) -> Tensor:
    """Binary dilation of (N, C, H, W) non-negative values by a square of ``side`` pixels, borders ignored.

    An even square reaches one pixel farther down and right than up and left (OpenCV's default anchor, side // 2).
    """
    if side <= 1:
        return members
    before, after = side // 2, (side - 1) // 2
    return F.max_pool2d(F.pad(members, (before, after, before, after)), side, stride=1)


def colour_regions(channels: Tensor, palette: Sequence[Sequence[int]] = REGION_PALETTE) -> Tensor:
    """(N, K, H, W) scores -> (N, 3, H, W) uint8: the colour of the strongest channel, the first of equals.

    ValueError if there are more channels than colours.
    """
    if channels.ndim != 4 or channels.shape[1] > len(palette):
        raise ValueError(f"expected (N, at most {len(palette)}, H, W) channels, got {tuple(channels.shape)}")
    colours = torch.tensor(palette, dtype=torch.uint8, device=channels.device)
    return colours[channels.argmax(dim=1)].permute(0, 3, 1, 2).contiguous()


def _check(label_map: Tensor, groups: Sequence[Sequence[int]], squares: Mapping[int, int]) -> None:
    outside = [c for group in groups for c in group if not 0 <= c < NUM_CLASSES]
    if outside:
        raise ValueError(f"classes are 0..{NUM_CLASSES - 1}, got {outside[0]} in the groups")
    small = [f"{c}: {s}" for c, s in squares.items() if s < 1]
    if small:
        raise ValueError(f"a class is widened by a square of at least 1 pixel, got {small[0]}")
    # a look at the values would make the host wait for a GPU; data sets check them when files are read
    if label_map.device.type == "cpu" and label_map.numel():
        low, high = int(label_map.min()), int(label_map.max())
        if low < 0 or high >= NUM_CLASSES:
            raise ValueError(f"classes are 0..{NUM_CLASSES - 1}, got {low if low < 0 else high} in the label map")
