# SPDX-License-Identifier: Apache-2.0
"""Which numbers settings of any method may have. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any


def check_ranges(
    section: str,
    settings: Any,
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    shares: Iterable[str] = (),
    decays: Iterable[str] = (),
    powers_of_two: Iterable[str] = (),
) -> None:
    """Check the numbers of one section; None, where a setting allows it, always fits.

    Args:
        section: what its settings are called by, ``<section>.<name>``.
        settings: a dataclass; none of its numbers, alone, in a sequence or in a mapping, may be infinite or NaN.
        counts: at least 1.
        positive: above 0.
        not_negative: 0 or more.
        shares: between 0 and 1.
        decays: 0 or more and below 1.
        powers_of_two: sides of pictures and planes, 4 or more.

    Raises:
        ValueError: names the setting, what it must be and what it is.
    """

    def check(names: Iterable[str], low: float, high: float, wanted: str, open_end: bool = False) -> None:
        for name, value in _entries(settings, set(names)):
            numbers = _numbers(value)
            if not all(low <= number <= high for number in numbers) or (open_end and low in numbers):
                raise ValueError(f"{section}.{name} must be {wanted}, got {value}")

    for name, value in _entries(settings):
        if not all(math.isfinite(number) for number in _numbers(value)):
            raise ValueError(f"{section}.{name} must be finite, got {value}")
    check(counts, 1, math.inf, "at least 1")
    check(positive, 0, math.inf, "above 0", open_end=True)
    check(not_negative, 0, math.inf, "0 or more")
    check(shares, 0, 1, "between 0 and 1")
    for name, value in _entries(settings, set(decays)):
        if not all(0 <= number < 1 for number in _numbers(value)):
            raise ValueError(f"{section}.{name} must be 0 or more and below 1, got {value}")
    for name, value in _entries(settings, set(powers_of_two)):
        if value < 4 or value & (value - 1):
            raise ValueError(f"{section}.{name} must be a power of two from 4, got {value}")


def _entries(settings: Any, names: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, value) of some or all settings; a mapping gives one for each of its keys."""
    for name, value in vars(settings).items():
        if names is not None and name not in names:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        else:
            yield name, value


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [number for number in values if isinstance(number, (int, float)) and not isinstance(number, bool)]
