# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: a request to stop after the step, not a crash.

A run that is asked to stop finishes its step on all processes, saves and leaves with 128 + the signal's number, as
shells count (130 after Ctrl-C, 143 after SIGTERM), so that a script can tell it from a run that reached its last
step (0). A second Ctrl-C aborts at once, without saving.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into ``requested``; outside the main thread it does nothing.

    Attributes:
        requested: number of the first signal, 0 while there was none.
    """

    def __init__(self, announce: bool = True) -> None:
        self.requested = 0
        self._announce = announce
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, self.requested or number
        if first and self._announce:
            os.write(2, b"\nstopping: finishing this step and saving (Ctrl-C again aborts without saving)\n")


def exit_code(number: int) -> int:
    """Exit status after a graceful stop by a signal.

    >>> exit_code(signal.SIGINT), exit_code(signal.SIGTERM), exit_code(0)
    (130, 143, 0)
    """
    return 128 + number if number else 0
