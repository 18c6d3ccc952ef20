# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: rows that are kept as they come, times with their spread, what the figures depend on."""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cuda_ops.timing import event_times
from facelab.errors import UserError
from facelab.files import atomic_path

Row = dict[str, Any]


class Report:
    """Rows, printed as they come and kept in a file.

    Args:
        path: JSON file, rewritten after every row; None: none.
        about: stands at its head.
    """

    def __init__(self, path: Path | None, about: Row) -> None:
        self.path, self.about = path, about
        self.rows: list[Row] = []
        self.broken = 0  # cases that failed for another reason than memory

    def add(self, row: Row) -> None:
        """Print and write a row; numbers are kept to five digits."""
        row = shorter(row)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        keep({**self.about, "rows": self.rows}, self.path)

    def attempt(self, case: Row, work: Callable[[], Row]) -> None:
        """Add the case with what ``work`` finds, or why it failed; the others shall still be measured."""
        try:
            self.add({**case, **work()})
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.add({**case, "failed": "out of GPU memory"})
        except (RuntimeError, UserError) as error:
            traceback.print_exc()
            self.broken += 1
            lines = str(error).strip().splitlines() or ["no message"]
            self.add({**case, "failed": f"{type(error).__name__}: {lines[0]}"})


def keep(result: Row, path: Path | None) -> None:
    """Write a result as JSON, whole or not at all; None: nowhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def shorter(value: Any) -> Any:
    """Five digits of every float in nested dicts and lists; a number that JSON has not becomes text."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: shorter(part) for key, part in value.items()}
    return [shorter(part) for part in value] if isinstance(value, (list, tuple)) else value


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range of milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"milliseconds": middle, "iqr": high - low}


def timed(work: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> Row:
    """Time of a call, by CUDA events on a GPU, and its peak memory there.

    ``memory_gib`` is the peak from the first warm-up call on, ``extra_gib`` without what was held before;
    ``reserved_gib`` counts memory that CUDA graphs keep for their inner results too.
    """
    if device.type != "cuda":
        times = []
        for _ in range(warmup + repeats):
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
        return {**spread(times[warmup:]), "repeats": repeats}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = event_times(work, repeats, warmup)
    peak = torch.cuda.max_memory_allocated()
    memory = {"memory_gib": peak, "extra_gib": peak - held, "reserved_gib": torch.cuda.max_memory_reserved()}
    return {**spread(times), "repeats": repeats, **{name: size / 2**30 for name, size in memory.items()}}


def versions(device: torch.device) -> Row:
    """What figures depend on; ``commit`` is null outside a checkout."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip() or None
        changed = bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    except OSError:
        commit, changed = None, None
    cuda = device.type == "cuda"
    try:
        import triton

        kernels = triton.__version__
    except ImportError:
        kernels = None
    return {
        "commit": commit,
        "uncommitted_changes": changed,
        "date": time.strftime("%F"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": kernels,
        "python": platform.python_version(),
    }


def chosen(text: str | None, known: Sequence[str], usual: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Names separated by commas, ``usual`` for None; an unknown one ends the program with the known ones."""
    names = list(usual) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"unknown {name!r}, expected some of {', '.join(known)}")
    return names
