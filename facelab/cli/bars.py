# SPDX-License-Identifier: Apache-2.0
"""Bars of measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from facelab.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

BAR_DELAY = 2.0  # seconds before a bar is drawn: an error at once stays one line


class Bar:
    """A bar on stderr where that is a terminal; the context's value is told how many were done."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what

    def __enter__(self) -> Callable[[int], Any]:
        self._bar = progress_bar(total=self._total, desc=self._what, unit="img", leave=False, delay=BAR_DELAY)
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def counted(batches: Iterator[Tensor], tick: Callable[[int], Any]) -> Iterator[Tensor]:
    """Pass batches on and tell how many pictures went by."""
    for batch in batches:
        yield batch
        tick(len(batch))
