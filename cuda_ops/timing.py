# SPDX-License-Identifier: Apache-2.0
"""How fast memory-bound ops are, in bytes moved per second, on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def event_times(work: Callable[[], Any], repeats: int = 50, warmup: int = 10) -> list[float]:
    """Milliseconds of the GPU for each of ``repeats`` calls, by CUDA events, after a warm-up."""
    for _ in range(warmup):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def milliseconds(work: Callable[[], Any], repeats: int = 50, warmup: int = 10) -> tuple[float, float]:
    """(median, interquartile range) of :func:`event_times`."""
    low, middle, high = statistics.quantiles(event_times(work, repeats, warmup), n=4)
    return middle, high - low


def terabytes_per_second(numbers: int, itemsize: int, ms: float) -> float:
    """Rate of an op that reads and writes so many numbers, each once."""
    return numbers * itemsize / ms / 1e9
