# SPDX-License-Identifier: Apache-2.0
"""How fast memory-bound ops are, in bytes moved per second, on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

LEAD_CYCLES = 2_000_000  # about a millisecond: the queue is this far ahead of the GPU for every five calls
CALLS_AHEAD = 5


def event_times(work: Callable[[], Any], repeats: int = 50, warmup: int = 10, *, ahead: bool = False) -> list[float]:
    """Milliseconds for each of ``repeats`` calls, by CUDA events, after a warm-up.

    ``ahead``: the GPU is kept waiting while calls are queued, so that these are its times alone; without, a call
    whose launches take the CPU longer than the GPU its work counts what the CPU needs (:func:`host_times`).
    """
    for _ in range(warmup):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for i, (start, stop) in enumerate(events):
        if ahead and i % CALLS_AHEAD == 0:
            torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def host_times(work: Callable[[], Any], repeats: int = 50) -> list[float]:
    """Milliseconds of the CPU for each of ``repeats`` calls of a warm ``work``: what a launch costs."""
    times = []
    for i in range(repeats):
        if i % CALLS_AHEAD == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return times


def milliseconds(work: Callable[[], Any], repeats: int = 50, warmup: int = 10) -> tuple[float, float]:
    """(median, interquartile range) of the GPU's time for a call."""
    low, middle, high = statistics.quantiles(event_times(work, repeats, warmup, ahead=True), n=4)
    return middle, high - low


def terabytes_per_second(numbers: int, itemsize: int, ms: float) -> float:
    """Rate of an op that reads and writes so many numbers, each once."""
    return numbers * itemsize / ms / 1e9
