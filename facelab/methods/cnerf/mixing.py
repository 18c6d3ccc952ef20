# SPDX-License-Identifier: Apache-2.0
"""Codes of CNeRF: one of shape and one of texture for each region, and how they are mixed.

K regions, D shape layers of a local generator (two texture layers follow), N samples, W width of a code.
The original keeps 2 K codes in a row, shape 0, texture 0, shape 1, texture 1 ..., and spreads them over K (D + 2) layers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from facelab.draws import Draws
from facelab.generator import Codes
from facelab.methods.cnerf.regions import parse_regions, region_names

TEXTURE_LAYERS = 2
PARTS = ("shape", "texture")
BOTH_FIRST, SHAPE_OF_FIRST, BOTH_SECOND = 0, 1, 2  # choices of a region: codes from w1; shape w1, texture w2; from w2


def code_names(regions: int) -> tuple[str, ...]:
    """Names of the 2 K codes in the original's order.

    >>> code_names(9)[6:8]
    ('mouth.shape', 'mouth.texture')
    """
    return tuple(f"{name}.{part}" for name in region_names(regions) for part in PARTS)


def interleave(shape: Tensor, texture: Tensor) -> Tensor:
    """Shape and texture codes (N, K, W) -> the original's row of codes (N, 2 K, W)."""
    return torch.stack([shape, texture], dim=2).flatten(1, 2)


def separate(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The original's row of codes (N, 2 K, W) -> shape and texture codes (N, K, W). ValueError for an odd number."""
    if codes.ndim != 3 or codes.shape[1] % 2:
        raise ValueError(f"expected codes (N, 2 K, W), got {tuple(codes.shape)}")
    pairs = codes.unflatten(1, (-1, 2))
    return pairs[:, :, 0], pairs[:, :, 1]


def layer_styles(shape: Tensor, texture: Tensor, depth: int) -> Tensor:
    """Shape and texture codes (N, K, W) -> styles of all layers (N, K, D + 2, W)."""
    shapes = shape[:, :, None].expand(-1, -1, depth, -1)
    return torch.cat([shapes, texture[:, :, None].expand(-1, -1, TEXTURE_LAYERS, -1)], dim=2)


def repeat(w: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """One code (N, W) for every region, shape and texture."""
    codes = w[:, None].expand(-1, regions, -1)
    return codes, codes


def mix(first: Tensor, second: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of two w (N, W) by ``choices`` (K, N): 0 both of the first, 1 shape of the first and texture of the second,
    2 both of the second. -> shape and texture codes (N, K, W)."""
    if choices.device.type == "cpu" and choices.numel():  # a look at a GPU's numbers would make the host wait
        low, high = int(choices.min()), int(choices.max())
        if low < BOTH_FIRST or high > BOTH_SECOND:
            raise ValueError(f"choices are 0, 1 or 2, got {low} to {high}")
    chosen = choices.to(first.device).T[..., None]  # N, K, 1
    shape = torch.where(chosen == BOTH_SECOND, second[:, None], first[:, None])
    texture = torch.where(chosen == BOTH_FIRST, first[:, None], second[:, None])
    return shape, texture


def draw_choices(draws: Draws, regions: int, count: int, name: str = "region_mixing") -> Tensor:
    """(K, N) choices, each as likely."""
    return (3 * draws.uniform(name, (regions, count))).long().clamp_max(BOTH_SECOND)


def original_choices(source: random.Random, regions: int, count: int) -> Tensor:
    """(K, N) choices in the original's order of Python's random numbers: regions outside, samples inside."""
    return torch.tensor([[source.randint(BOTH_FIRST, BOTH_SECOND) for _ in range(count)] for _ in range(regions)])


def blend(
    codes: Codes,
    other: Codes,
    regions: str | Iterable[str | int],
    amount: float = 1.0,
    parts: Sequence[str] = PARTS,
) -> Codes:
    """Codes with those of some regions moved towards another head's: 1 puts the other's in, 0.5 is half way.

    Args:
        codes, other: of one generator, as many samples each (or one other for all).
        regions: names.
        parts: ``shape``, ``texture`` or both.

    Raises:
        UserError: an unknown region. ValueError: an unknown part, codes of other sizes.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts are {' and '.join(PARTS)}, got {unknown}")
    count = codes.values["shape"].shape[1]
    channels = list(parse_regions(regions, region_names(count)))
    changed = dict(codes.values)
    for part in parts:
        mine, theirs = codes.values[part], other.values[part]
        if mine.shape[1:] != theirs.shape[1:]:
            raise ValueError(f"{part} codes of sizes {tuple(mine.shape[1:])} and {tuple(theirs.shape[1:])}")
        kept = torch.zeros(count, 1, dtype=mine.dtype, device=mine.device)
        kept[channels] = amount
        changed[part] = torch.lerp(mine, theirs.to(mine).expand_as(mine), kept.expand_as(mine))
    return Codes(changed)


def by_name(codes: Codes) -> dict[str, Tensor]:
    """Codes -> name (``hair.texture``) -> (N, W), in the original's order."""
    row = interleave(codes.values["shape"], codes.values["texture"])
    return dict(zip(code_names(row.shape[1] // 2), row.unbind(1), strict=True))
