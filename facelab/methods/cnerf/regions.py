# SPDX-License-Identifier: Apache-2.0
"""The nine regions of CNeRF by name: order of the channels, and the trap in it.

The order is that of the original's data set code, which decides what a trained model means. Its README, the comment of
its inference script and its list of class names exchange two of them: they call 3 the brow and 4 the mouth
(``README_NAMES``). Whoever gives numbers is therefore told what they mean here. Classes and colours of each region
stand in :mod:`facelab.data.regions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from facelab.data.regions import REGION_PALETTE
from facelab.data.regions import REGIONS as NAMES  # the classes of each, and colours, stand there too
from facelab.errors import UserError, nearest

README_NAMES: tuple[str, ...] = ("background", "face", "eye", "brow", "mouth", "nose", "ear", "hair", "neck_cloth")
ALIASES: dict[str, str] = {
    "skin": "face",
    "eyes": "eye",
    "lips": "mouth",
    "brows": "brow",
    "eyebrow": "brow",
    "ears": "ear",
    "neck": "neck_cloth",
    "cloth": "neck_cloth",
    "neck+cloth": "neck_cloth",
}


class RegionNumberWarning(UserWarning):
    """Regions were given by number."""


def region_names(count: int = len(NAMES)) -> tuple[str, ...]:
    """Names of ``count`` regions: those above for nine, else ``region_0`` ...

    >>> region_names()[3:5], region_names(2)
    (('mouth', 'brow'), ('region_0', 'region_1'))
    """
    return NAMES if count == len(NAMES) else tuple(f"region_{i}" for i in range(count))


def region_palette(count: int = len(NAMES)) -> tuple[tuple[int, int, int], ...]:
    """Colours of ``count`` regions: the original's nine, after which they begin again, half as bright each time.

    >>> region_palette(2)
    ((0, 0, 0), (239, 234, 90))
    """
    rounds = range(-(-count // len(REGION_PALETTE)))
    colors = [(r >> turn, g >> turn, b >> turn) for turn in rounds for r, g, b in REGION_PALETTE]
    return tuple(colors[:count])


def region_index(region: str | int, names: Sequence[str] = NAMES) -> int:
    """Channel of one region, by name, alias or number. UserError with the nearest name for an unknown one.

    >>> region_index("mouth"), region_index("Eyes"), region_index("7")
    (3, 2, 7)
    """
    text = str(region).strip().lower()
    number = int(text) if text.isascii() and text.isdigit() else None
    if number is not None:
        if number >= len(names):
            raise UserError(f"region {number} does not exist, expected 0 to {len(names) - 1} or {', '.join(names)}")
        return number
    name = ALIASES.get(text, text)
    if name not in names:
        raise UserError(f"unknown region {region!r}, expected {', '.join(names)}.{nearest(text, [*names, *ALIASES])}")
    return list(names).index(name)


def parse_regions(regions: str | Iterable[str | int], names: Sequence[str] = NAMES) -> tuple[int, ...]:
    """Regions (``"eye,nose"``, or a list) -> channels, ascending, each once.

    Numbers are understood as channels, with a :class:`RegionNumberWarning` that names them.

    Raises:
        UserError: none at all, or an unknown one, with the nearest name.

    >>> parse_regions("nose, eye")
    (2, 5)
    """
    parts = regions.split(",") if isinstance(regions, str) else list(regions)
    wanted = [part for part in (str(p).strip() for p in parts) if part]
    if not wanted:
        raise UserError(f"no region given, expected some of {', '.join(names)}, separated by commas")
    numbers = [part for part in wanted if part.isascii() and part.isdigit()]
    channels = tuple(sorted({region_index(part, names) for part in wanted}))
    if numbers:
        warnings.warn(_about_numbers(numbers, names), RegionNumberWarning, stacklevel=2)
    return channels


def _about_numbers(numbers: Sequence[str], names: Sequence[str]) -> str:
    meaning = ", ".join(f"{n} = {names[int(n)]}" for n in numbers)
    text = f"regions by number: {meaning}"
    others = [n for n in numbers if tuple(names) == NAMES and README_NAMES[int(n)] != NAMES[int(n)]]
    if others:
        text += f" (CNeRF's README calls {', '.join(f'{n} {README_NAMES[int(n)]}' for n in others)})"
    return f"{text}; names cannot be mistaken"


def exchange_table(names: Sequence[str] = NAMES, other: Sequence[str] = README_NAMES) -> tuple[int, ...]:
    """Channel i of a model whose channels are called ``names`` is ``table[i]`` of one that calls them ``other``.

    >>> exchange_table()
    (0, 1, 2, 4, 3, 5, 6, 7, 8)
    """
    return tuple(list(other).index(name) for name in names)
