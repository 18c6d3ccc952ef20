# SPDX-License-Identifier: Apache-2.0
"""Progress bars that suit a terminal and a log file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

LOG_FILE_PAUSE = 30.0  # seconds between two lines where the output is not a terminal


def progress_bar(items: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr around ``items``, or one to be updated by hand.

    Args:
        items: what to iterate over; None with ``total=`` for a bar that is moved by ``update``.
        show: False draws nothing.
        options: of tqdm: ``total``, ``unit``, ``desc``, ``initial``, ``leave`` ...
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # one process writes; tqdm's own lock would leave a semaphore behind
    pause = 0.1 if sys.stderr.isatty() else LOG_FILE_PAUSE
    settings = {"dynamic_ncols": True, "file": sys.stderr, "mininterval": pause, "disable": not show}
    return tqdm(items, **{**settings, **options})
