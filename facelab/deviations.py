# SPDX-License-Identifier: Apache-2.0
"""Where an original is wrong and facelab is right by default: named, switchable, visible.

A method lists its deviations; each has a boolean switch under ``reference:`` in its config.
Active ones (switch off = we deviate) are printed once at start and stored with every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deviation:
    """One place where the default differs from the original program.

    Attributes:
        method: name of the method, for example ``fenerf``.
        switch: field of the method's ``reference`` config; True restores the original.
        what: one sentence: what the original does, what we do.
    """

    method: str
    switch: str
    what: str


def active(deviations: Sequence[Deviation], reference: Any) -> list[Deviation]:
    """Deviations in force under a ``reference`` config (those whose switch is off)."""
    return [d for d in deviations if not getattr(reference, d.switch)]


def switched_back(deviations: Sequence[Deviation]) -> list[str]:
    """Overrides that restore every original behaviour: what ``--reference`` adds.

    >>> switched_back([Deviation("fenerf", "sum_chunks", "...")])
    ['reference.sum_chunks=true']
    """
    return [f"reference.{d.switch}=true" for d in deviations]


def describe(deviations: Sequence[Deviation]) -> list[dict[str, str]]:
    """For JSON files: method, switch and sentence of each."""
    return [{"method": d.method, "switch": f"reference.{d.switch}", "what": d.what} for d in deviations]
