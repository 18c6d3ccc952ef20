# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a bar on the terminal, ``log.jsonl``, TensorBoard and W&B as options. Rank 0 alone writes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from facelab.errors import UserError
from facelab.files import atomic_path, describe_os_error
from facelab.progress import progress_bar
from facelab.training.config import LogConfig

LOG_FILE = "log.jsonl"


class Logger:
    """Writes metrics of one run; a resumed run goes on in the same files.

    Each line of ``log.jsonl`` is one JSON object with ``step`` (finished steps), ``warmup_step``, ``images`` and
    the metrics: means over the samples of the steps since the line before. Numbers that are not finite are null.

    Args:
        run_dir: the run's folder.
        config: what to write.
        active: True on rank 0; elsewhere every method does nothing.
        total: steps of the whole run, for the bar.
        step: finished steps; lines beyond it (of a run that went on after its last checkpoint) are removed.
        warmup_step: finished steps of the warm-up.

    Raises:
        UserError: a file cannot be written, or the package of a chosen logger is missing.
    """

    def __init__(
        self, run_dir: Path, config: LogConfig, active: bool, total: int, step: int = 0, warmup_step: int = 0
    ) -> None:
        self.path, self._active = Path(run_dir) / LOG_FILE, active
        self._bar: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not active:
            return
        truncate(self.path, step, warmup_step)
        if config.tensorboard:
            self._tensorboard = _open_tensorboard(self.path.parent, step)
        if config.wandb:
            self._wandb = _open_wandb(self.path.parent, config)
        if config.progress:
            self._bar = progress_bar(total=total, initial=step, unit="step")

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self._active:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=sys.stderr, flush=True)

    def tick(self, step: int) -> None:
        """Move the bar; it redraws itself at most ten times a second."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: Mapping[str, float], shown: Mapping[str, float]) -> None:
        """Write a line to every place; ``shown`` are the few that stand beside the bar."""
        if not self._active:
            return
        clean = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(describe_os_error(error, self.path)) from error
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
        if self._tensorboard is not None:
            for name, value in clean.items():
                if value is not None and name not in ("step", "warmup_step"):
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(clean, step=step)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def truncate(path: Path, step: int, warmup_step: int = 0) -> None:
    """Keep the lines of ``log.jsonl`` up to a step; half a line at the end (a killed run) goes too."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step, warmup_step)]
    if kept != lines:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _belongs(line: str, step: int, warmup_step: int) -> bool:
    try:
        entry = json.loads(line)
        complete = line.endswith("\n")
        return complete and entry["step"] <= step and (step > 0 or entry.get("warmup_step", 0) <= warmup_step)
    except (ValueError, KeyError, TypeError):
        return False


def _open_tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("log.tensorboard=true needs a package: pip install tensorboard (or facelab[log])") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _open_wandb(run_dir: Path, config: LogConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb=true needs a package: pip install wandb (or facelab[log])") from error
    # an id derived from the folder makes a resumed run continue the same page
    return wandb.init(
        project=config.wandb_project,
        mode=config.wandb_mode,
        dir=str(run_dir),
        id=run_dir.resolve().name,
        resume="allow",
    )


class PhaseTimer:
    """Seconds per phase without waiting: CUDA events are read only when a line is written."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def start(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, name: str, begin: Any) -> None:
        self._marks.append((name, begin, self.start()))

    def read(self) -> dict[str, float]:
        """Mean seconds of each phase's runs since the last call; waits for the device."""
        if self._cuda and self._marks:
            self._marks[-1][2].synchronize()
        seconds: dict[str, list[float]] = {}
        for name, begin, end in self._marks:
            seconds.setdefault(name, []).append(begin.elapsed_time(end) / 1000 if self._cuda else end - begin)
        self._marks.clear()
        return {name: sum(values) / len(values) for name, values in seconds.items()}


class Throughput:
    """Images per second of wall time between two lines, and the time that is left."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._steps = self._images = 0

    def count(self, images: int) -> None:
        self._steps += 1
        self._images += images

    def read(self, steps_left: int) -> dict[str, float]:
        """``images_per_second``, ``seconds_per_step``, ``eta_seconds`` since the last call."""
        now = time.perf_counter()
        seconds, steps, images = now - self._last, max(self._steps, 1), self._images
        self._last, self._steps, self._images = now, 0, 0
        rate = images / seconds if seconds > 0 else 0.0
        return {
            "images_per_second": rate,
            "seconds_per_step": seconds / steps,
            "eta_seconds": seconds / steps * steps_left,
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    """``memory_gib``: largest amount allocated on the GPU since the last call; on the CPU the process's peak.

    ``memory_reserved_gib``: what is held at most, with the memory that recorded phases keep and never hand out again.
    """
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory_gib": peak / 2**30, "memory_reserved_gib": reserved / 2**30}
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_gib": kib / 2**20 if sys.platform != "darwin" else kib / 2**30}
