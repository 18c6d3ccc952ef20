# SPDX-License-Identifier: Apache-2.0
"""Edits of CNeRF heads, region by region: codes in, codes out.

    model = facelab.load("models/cnerf.safetensors")
    b, a = model.codes(3), model.codes(7)
    picture = model.render(swap_region(b, a, "hair"))  # A's hair on B

The code of the decoder stays: it belongs to the head that is edited. Codes of seeds are truncated already, nothing
here truncates them again. The codes of the background also drive the base shape under all regions, so changing them
changes every region's geometry (:class:`BackgroundWarning`).

N heads, K regions, W width of a code, S side of a picture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes, sample_latents
from facelab.methods.cnerf import mixing
from facelab.methods.cnerf.mixing import PARTS
from facelab.methods.cnerf.regions import NAMES, parse_regions, region_names
from facelab.metrics.region_independence import THRESHOLD, Changes, changed_pixels

if TYPE_CHECKING:
    from facelab.methods.cnerf.model import CNerfGenerator

BACKGROUND = 0  # the region whose codes the base shape shares

Regions = str | Iterable[str | int]


class BackgroundWarning(UserWarning):
    """An edit of the background, which changes the base shape of the whole head."""


def swap_region(codes: Codes, other: Codes, regions: Regions, parts: Sequence[str] = PARTS) -> Codes:
    """A head with some regions of another.

    Args:
        codes, other: of one generator, as many heads each, or one other for all.
        regions: names (``"hair"``, ``"eye,brow"``, or a list).
        parts: ``shape``, ``texture`` or both.

    Raises:
        UserError: an unknown region, with the nearest name. ValueError: an unknown part, codes of other sizes.

    >>> a, b = (Codes({"shape": torch.full((1, 9, 2), v), "texture": torch.full((1, 9, 2), v)}) for v in (0.0, 1.0))
    >>> made = swap_region(b, a, "hair")
    >>> made.values["shape"][0, :, 0].tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    """
    return mix_region(codes, other, regions, 1.0, parts)


def mix_region(codes: Codes, other: Codes, regions: Regions, amount: float, parts: Sequence[str] = PARTS) -> Codes:
    """A head with some regions moved towards another's: 0 leaves it, 1 swaps, beyond 1 exaggerates.

    Arguments and errors as of :func:`swap_region`; UserError for an amount that is not finite, too.

    >>> a, b = (Codes({"shape": torch.full((1, 9, 2), v), "texture": torch.full((1, 9, 2), v)}) for v in (0.0, 1.0))
    >>> made = mix_region(b, a, ["eye", "nose"], 0.25, parts=["texture"])
    >>> made.values["texture"][0, :6, 0].tolist(), made.values["shape"].equal(b.values["shape"])
    ([1.0, 1.0, 0.75, 1.0, 1.0, 0.75], True)
    """
    if not math.isfinite(amount):
        raise UserError(f"amount: expected a finite number such as 0.5, got {amount}")
    channels = list(parse_regions(regions, region_names(codes.values["shape"].shape[1])))
    _warn_of_background(channels, codes)
    return mixing.blend(codes, other, _names(channels, codes), amount, parts)


@torch.no_grad()
def resample_region(
    generator: CNerfGenerator,
    codes: Codes,
    regions: Regions,
    seed: int = 0,
    truncation: float = 0.7,
    parts: Sequence[str] = PARTS,
) -> Codes:
    """A head with new random codes in some regions.

    Every region and part has random numbers of its own, so a region gets the same new code whichever others are
    resampled with it, and no two have the same.

    Args:
        generator: whose mapping network makes the codes; with stored averages unless ``truncation`` is 1.
        seed: of the new codes.
        truncation: psi of the new codes; 1 = full variety.

    Raises:
        UserError: an unknown region. ValueError: an unknown part, or no stored average.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"parts are {' and '.join(PARTS)}, got {unknown}")
    if truncation != 1.0 and not generator.has_averages:
        raise ValueError("no stored average: call update_averages() once before truncating")
    names = region_names(codes.values["shape"].shape[1])
    channels = list(parse_regions(regions, names))
    _warn_of_background(channels, codes)
    changed = {part: codes.values[part].clone() for part in parts}
    for channel in channels:
        for part in parts:
            draws = Draws(seed).at(phase=f"resample {names[channel]} {part}")
            z = sample_latents(generator.latent_spec, draws, len(codes), generator.average_w.device)["z"]
            w = generator.mapping(z)
            w = w if truncation == 1.0 else torch.lerp(generator.average_w, w, truncation)
            changed[part][:, channel] = w.to(changed[part])
    return Codes({**codes.values, **changed})


def count_changes(
    before: Tensor,
    after: Tensor,
    labels_before: Tensor,
    labels_after: Tensor,
    regions: Regions,
    threshold: float = THRESHOLD,
    names: Sequence[str] = NAMES,
) -> Changes:
    """Which pixels an edit changed: in its regions and outside.

    Args:
        before, after: (N, 3, S, S) pictures in [-1, 1] of the same cameras.
        labels_before, labels_after: (N, S, S) region of each pixel; a pixel is inside if either names an edited region.
        regions: what was edited.
        threshold: a pixel changed if a channel did by more than so many levels of 255.

    >>> black, white = -torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    >>> hair = torch.tensor([[[7, 7], [1, 1]]])
    >>> count_changes(black, white, hair, hair, "hair").report()["outside_share"]
    0.5
    """
    edited = torch.tensor(parse_regions(regions, names), device=labels_before.device)
    inside = torch.isin(labels_before, edited) | torch.isin(labels_after, edited)
    changes = Changes()
    changes.add(changed_pixels(before, after, threshold), inside)
    return changes


def _names(channels: Sequence[int], codes: Codes) -> list[str]:
    names = region_names(codes.values["shape"].shape[1])
    return [names[channel] for channel in channels]


def _warn_of_background(channels: Sequence[int], codes: Codes) -> None:
    if BACKGROUND in channels:
        warnings.warn(
            f"the codes of {_names([BACKGROUND], codes)[0]} also drive the base shape under all regions: the geometry of "
            "the whole head changes",
            BackgroundWarning,
            stacklevel=3,
        )
