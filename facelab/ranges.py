# SPDX-License-Identifier: Apache-2.0
"""Which numbers settings of any method may have. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def check_ranges(
    section: str,
    settings: Any,
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    shares: Iterable[str] = (),
) -> None:
    """Check the numbers of one section; None, where a setting allows it, always fits.

    Args:
        section: what its settings are called by, ``<section>.<name>``.
        settings: a dataclass; none of its numbers may be infinite or NaN.
        counts: at least 1.
        positive: above 0.
        not_negative: 0 or more.
        shares: between 0 and 1.

    Raises:
        ValueError: names the setting, what it must be and what it is.
    """

    def check(names: Iterable[str], low: float, high: float, wanted: str, open_end: bool = False) -> None:
        for name in names:
            value = getattr(settings, name)
            if value is not None and (not low <= value <= high or (open_end and value == low)):
                raise ValueError(f"{section}.{name} must be {wanted}, got {value}")

    for name, value in vars(settings).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{section}.{name} must be finite, got {value}")
    check(counts, 1, math.inf, "at least 1")
    check(positive, 0, math.inf, "above 0", open_end=True)
    check(not_negative, 0, math.inf, "0 or more")
    check(shares, 0, 1, "between 0 and 1")
