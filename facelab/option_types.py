# SPDX-License-Identifier: Apache-2.0
"""Numbers that options of commands take. No torch."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteFloat(click.FloatRange):
    """A number that is neither NaN nor infinite, perhaps within bounds."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


NONNEGATIVE = FiniteFloat(min=0)
ABOVE_ZERO = FiniteFloat(min=0, min_open=True)
PROBABILITY = FiniteFloat(0, 1)
POSITIVE = click.IntRange(min=1)
COUNT = click.IntRange(min=0)
