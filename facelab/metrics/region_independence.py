# SPDX-License-Identifier: Apache-2.0
"""Does a change of one region stay in that region? (CNeRF, arXiv 2302.01579: regions are edited one by one.)

Shape legend: N heads, K regions, S side of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from facelab.generator import Codes, GeneratorOutput
from facelab.metrics.evaluate import GeneratedHeads, Tick

PARTS: dict[str, tuple[str, ...]] = {"shape": ("shape",), "texture": ("texture",), "both": ("shape", "texture")}
THRESHOLD = 8.0  # levels of 255

Labels = Callable[[GeneratorOutput], Tensor]  # a render -> (N, S, S) region of each pixel


@dataclass
class Changes:
    """Pixels of a series of edits of one region.

    Attributes:
        inside, outside: in its mask before or after the edit, and in neither.
        changed_inside, changed_outside: those of them that changed.
        unchanged_heads: edits that changed no pixel at all.
        absent_heads: edits of heads that show the region neither before nor after.
    """

    inside: int = 0
    outside: int = 0
    changed_inside: int = 0
    changed_outside: int = 0
    heads: int = 0
    unchanged_heads: int = 0
    absent_heads: int = 0

    def add(self, changed: Tensor, mask: Tensor) -> None:
        """Boolean (N, S, S): which pixels changed, and which are in the region."""
        self.inside += int(mask.sum())
        self.outside += int((~mask).sum())
        self.changed_inside += int((changed & mask).sum())
        self.changed_outside += int((changed & ~mask).sum())
        self.heads += len(mask)
        self.unchanged_heads += int((~changed.flatten(1).any(1)).sum())
        self.absent_heads += int((~mask.flatten(1).any(1)).sum())

    def report(self) -> dict[str, Any]:
        """Counts and shares; None where there is nothing to take a share of.

        ``outside_share``: of the changed pixels, those outside the region; ``leak_share``: of the pixels outside, those
        that changed; ``inside_share``: of the pixels inside, those that changed.
        """
        return {
            "outside_share": _share(self.changed_outside, self.changed_inside + self.changed_outside),
            "leak_share": _share(self.changed_outside, self.outside),
            "inside_share": _share(self.changed_inside, self.inside),
            "changed_pixels": self.changed_inside + self.changed_outside,
            "changed_pixels_outside": self.changed_outside,
            "region_pixels": self.inside,
            "pixels": self.inside + self.outside,
            "heads": self.heads,
            "unchanged_heads": self.unchanged_heads,
            "absent_heads": self.absent_heads,
        }


@dataclass
class _Table:
    names: Sequence[str]
    cells: dict[tuple[str, str], Changes] = field(default_factory=dict)

    def cell(self, name: str, part: str) -> Changes:
        return self.cells.setdefault((name, part), Changes())


@torch.no_grad()
def independence_report(
    heads: GeneratedHeads,
    count: int,
    names: Sequence[str],
    labels: Labels,
    threshold: float = THRESHOLD,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Give one region at a time the codes of another head, and count what changes where.

    Head i gets the code of head i + count; everything else (camera, the other regions, the decoder's code and noise)
    stays.

    Args:
        heads: of a generator whose codes ``shape`` and ``texture`` are (N, K, W), one for every region.
        count: heads that are edited.
        names: of the K regions.
        labels: region of each pixel of a render.
        threshold: a pixel changed if a channel did by more than so many levels of 255.

    Returns:
        ``value``: of all pixels that editing both codes of a region changed, the share outside the region;
        ``by_region``: the same of each; ``edits``: region -> shape, texture, both -> :meth:`Changes.report`;
        ``overall``: the same over all regions.

    Raises:
        ValueError: a generator without such codes.
    """
    table = _Table(names)
    for start in range(0, count, heads.batch):
        indices = list(range(start, min(start + heads.batch, count)))
        _edit(heads, indices, count, table, labels, threshold, tick)
    overall = {part: _summed([c for (_, p), c in table.cells.items() if p == part]).report() for part in PARTS}
    return {
        "value": overall["both"]["outside_share"],
        "threshold_levels": threshold,
        "seed": heads.seed,
        "heads": count,
        "overall": overall,
        "by_region": {name: table.cells[name, "both"].report()["outside_share"] for name in names},
        "edits": {name: {part: table.cells[name, part].report() for part in PARTS} for name in names},
    }


def _edit(
    heads: GeneratedHeads,
    indices: list[int],
    shift: int,
    table: _Table,
    labels: Labels,
    threshold: float,
    tick: Tick | None,
) -> None:
    codes, other = heads.codes(indices), heads.codes([i + shift for i in indices])
    camera = heads.cameras(indices)
    before = heads.picture(codes, camera, indices[0])
    was = labels(before)
    for channel, name in enumerate(table.names):
        for part, parts in PARTS.items():
            after = heads.picture(swap_region(codes, other, channel, parts), camera, indices[0])
            mask = (was == channel) | (labels(after) == channel)
            table.cell(name, part).add(changed_pixels(before.rgb, after.rgb, threshold), mask)
        if tick is not None:
            tick(len(indices))


def swap_region(codes: Codes, other: Codes, channel: int, parts: Sequence[str]) -> Codes:
    """Codes with those of one region from another head. ValueError unless they are (N, K, W)."""
    values = dict(codes.values)
    for part in parts:
        if part not in values or values[part].ndim != 3:
            raise ValueError(f"expected codes {part!r} (N, K, W), one of every region, got {sorted(values)}")
        values[part] = values[part].clone()
        values[part][:, channel] = other.values[part][:, channel]
    return replace(codes, values=values)


def changed_pixels(first: Tensor, second: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """(N, S, S) boolean: pixels of pictures in [-1, 1] that differ by more than ``threshold`` levels of 255 in a channel."""
    return ((first.clamp(-1, 1) - second.clamp(-1, 1)).abs() * 127.5 > threshold).any(dim=1)


def _summed(changes: Sequence[Changes]) -> Changes:
    total = Changes()
    for name in vars(total):
        setattr(total, name, sum(getattr(change, name) for change in changes))
    return total


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
