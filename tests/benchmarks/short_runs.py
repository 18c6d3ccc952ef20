# SPDX-License-Identifier: Apache-2.0
"""Training runs that benchmarks measure: nothing is stored, every line of the log is kept."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facelab.training.distributed import Distributed
from facelab.training.loop import Callback, Trainer


class Unsaved(Trainer):
    """A run that leaves no checkpoint."""

    def save(self) -> Path:
        return self.run_dir


class Readings(Callback):
    """Keeps what each line of the log says."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.rows.append(dict(metrics))


def readings_of(method: Any, config: Any, device: torch.device) -> list[dict[str, float]]:
    """The lines of the log of one run. KeyboardInterrupt if a signal ended it: a benchmark stops there."""
    readings = Readings()
    with tempfile.TemporaryDirectory() as folder:
        result = Unsaved(method, config, folder, Distributed(device=device), [readings]).run()
    if not result.finished:
        raise KeyboardInterrupt(f"stopped after step {result.step}")
    return readings.rows
