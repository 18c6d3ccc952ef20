# SPDX-License-Identifier: Apache-2.0
"""Training on one, two, four GPUs of a machine: images per second at the same batch per GPU.

    python tests/benchmarks/bench_scaling.py [--out FILE] [--methods eg3d,fenerf,cnerf] [--gpus 1,2,4] [--parallel]

Each row is a run of its own in fresh processes: EG3D's ffhq_512 (rendered at 64 px, batch 4 a GPU, in the fast way of
bench_eg3d.py), the 64 px row of FENeRF's celebamask_hq_128, CNeRF's synthetic_64; synthetic heads, nothing is stored.
Times are what the Trainer logs: wall time per step between two lines, where it waits for the device; ``milliseconds`` is
the median of the windows after warm-up with its interquartile range. ``efficiency`` is images per second over those of
one GPU times the number of GPUs. ``reduction_ms`` is what a step spends in sums over GPUs, on the first one, with
its waiting for the slowest. ``--parallel`` runs rows side by side on GPUs that are free; ``beside`` says with how many
others. ``--tiny`` runs tiny networks on one and two CPU processes, to see that the program works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import Report, Row, chosen, keep, spread, versions
from short_runs import Readings, Unsaved

from facelab.config import StagedConfig, load_staged, resolve_curriculum
from facelab.methods import load_method
from facelab.training.distributed import Distributed
from facelab.training.launch import launch
from facelab.training.logging import PhaseTimer
from facelab.training.loop import Trainer

LIMIT = 180.0  # seconds, after which a row has failed


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long.

    Attributes:
        curriculum: of the method.
        batch, chunk: samples per step and GPU, and in one pass.
        settings: beside those of the curriculum.
        window: steps between two lines of the log; lazy phases run equally often in all windows.
        first: windows that are not counted: kernels are compiled, phases run three times before they are recorded.
        windows: that are.
    """

    curriculum: str
    batch: int
    chunk: int
    settings: tuple[str, ...]
    window: int = 5
    first: int = 2
    windows: int = 6

    def config(self, method: str, gpus: int) -> StagedConfig:
        """The resolved configuration of a run."""
        overrides = [
            f"train.batch_size={self.batch * gpus}",
            f"train.batch_chunk={self.chunk}",
            f"train.max_steps={self.window * (self.first + self.windows)}",
            f"log.every={self.window}",
            "log.samples_every=0",
            "log.progress=false",
            *self.settings,
        ]
        return load_staged(load_method(method).config_type, [resolve_curriculum(method, self.curriculum)], overrides)


CASES = {
    "eg3d": Case(
        "ffhq_512",
        4,
        4,
        (
            "train.precision=tf32",
            "train.half=fp16",
            "train.channels_last=true",
            "train.cuda_graphs=true",
            "train.workers=2",
            "loss.blur_fade_kimg=0",
            "data.heads=64",
        ),
        window=16,
        first=4,
    ),
    "fenerf": Case(
        "celebamask_hq_128",
        48,
        12,
        (
            "train.precision=bf16",
            "render.precision=fp16",
            "render.resolution=64",
            "discriminator.chunk=48",
            "discriminator.channels_last=true",
            "train.cuda_graphs=true",
            "data.heads=64",
        ),
        window=4,
    ),
    "cnerf": Case("synthetic_64", 8, 8, ("sphere.steps=0", "data.heads=64")),
}
GRAPHS = ("train.cuda_graphs=true",)
TINY = {
    "eg3d": Case("debug", 2, 2, ("train.half=none", "loss.r1_every=2", "loss.density_every=2", *GRAPHS), 2, 1, 2),
    "fenerf": Case("debug", 2, 2, GRAPHS, 2, 1, 2),
    "cnerf": Case("debug_volume", 2, 2, ("sphere.steps=0", *GRAPHS), 2, 1, 2),
}


# ---------------------------------------------------------------- one row


@dataclass
class Timed(Distributed):
    """Processes whose sums are timed."""

    timer: PhaseTimer = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.timer = PhaseTimer(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        begin = self.timer.start()
        super().sum_(tensor)
        self.timer.stop("sum", begin)
        self.calls += 1
        return tensor

    def seconds(self) -> float:
        """In sums since the last call."""
        calls, self.calls = self.calls, 0
        return calls * self.timer.read().get("sum", 0.0)


class TimedReadings(Readings):
    """The lines of the log, with the seconds that their steps spent in sums over processes."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        assert isinstance(trainer.distributed, Timed)
        super().on_log(trainer, {**metrics, "seconds_in_sums": trainer.distributed.seconds()})


def work(distributed: Distributed, method: str, tiny: bool, folder: str) -> int:
    """One process of a row; the first leaves the lines of its log in a file."""
    case = (TINY if tiny else CASES)[method]
    timed, readings = Timed(**vars(distributed)), TimedReadings()
    config = case.config(method, distributed.world)
    result = Unsaved(load_method(method), config, Path(folder) / "run", timed, [readings]).run()
    if timed.is_main:
        keep({"lines": readings.rows}, Path(folder) / "lines.json")
    return result.exit_code


def summary(lines: Sequence[dict[str, float]], case: Case, gpus: int) -> Row:
    """Times and memory of a run."""
    counted = lines[case.first :]
    step = spread([1e3 * line["seconds_per_step"] for line in counted])
    reduction = 1e3 * statistics.median(line["seconds_in_sums"] for line in counted) / case.window
    phases = {key: 1e3 * statistics.median(line[key] for line in counted) for key in counted[0] if "seconds/" in key}
    memory = {key: max(line[key] for line in counted) for key in counted[0] if key.startswith("memory")}
    return {
        **step,
        "images_per_second": 1e3 * case.batch * gpus / step["milliseconds"],
        "efficiency": None,
        "reduction_ms": reduction,
        "reduction_share": reduction / step["milliseconds"],
        **memory,
        "phases_ms": {key.removeprefix("seconds/"): value for key, value in phases.items()},
        "windows": len(counted),
        "steps_per_window": case.window,
        "first_step_window_ms": 1e3 * lines[0]["seconds_per_step"] * case.window,
        "skipped_steps": sum(line[key] for line in lines for key in line if key.startswith("skipped/")),
    }


def measure(method: str, gpus: int, tiny: bool, visible: Sequence[str]) -> Row:
    """Run a row in processes of its own, on the visible GPUs.

    Raises:
        RuntimeError: it failed, or did not end.
    """
    case = (TINY if tiny else CASES)[method]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--row", method, str(gpus), folder, *(["--tiny"] if tiny else [])]
        process = subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            raise RuntimeError(f"no end after {LIMIT:.0f} s") from None
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {' | '.join(said.strip().splitlines()[-3:])}")
        lines = json.loads((Path(folder) / "lines.json").read_text(encoding="utf-8"))["lines"]
    notes = [line for line in said.splitlines() if "without a CUDA graph" in line]
    row = {**summary(lines, case, gpus), "wall_seconds": time.monotonic() - begin}
    return {**row, "notes": notes} if notes else row


def run_row(method: str, gpus: int, tiny: bool, folder: str) -> int:
    """What :func:`measure` starts."""
    where = {"device": "cpu", "processes": gpus} if tiny else {"device": "cuda", "gpus": gpus}
    return launch(work, (method, tiny, folder), **where)  # type: ignore[arg-type]


# ---------------------------------------------------------------- all rows


def measure_all(
    report: Report, rows: Sequence[tuple[str, int]], visible: Sequence[str], tiny: bool, parallel: bool
) -> None:
    """The largest first; side by side on GPUs that are free if ``parallel``."""
    waiting = sorted(rows, key=lambda row: -row[1])
    free, running = list(visible), dict[Future[Row], tuple[Row, list[str]]]()
    with ThreadPoolExecutor(max(1, len(rows))) as pool:
        while waiting or running:
            for method, gpus in list(waiting):
                if gpus <= len(free) and (parallel or not running):
                    waiting.remove((method, gpus))
                    mine, free = free[:gpus], free[gpus:]
                    for other, _ in running.values():
                        other["beside"] += 1
                    about = described(method, gpus, tiny, beside=len(running))
                    running[pool.submit(measure, method, gpus, tiny, [] if tiny else mine)] = (about, mine)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                about, mine = running.pop(future)
                free += mine
                report.attempt(about, future.result)
                add_efficiency(report)


def described(method: str, gpus: int, tiny: bool, beside: int) -> Row:
    """What stands at the head of a row."""
    case = (TINY if tiny else CASES)[method]
    about = {"case": "training", "method": method, "gpus": gpus, "beside": beside, "batch_per_gpu": case.batch}
    return {**about, "chunk": case.chunk, "curriculum": case.curriculum, "settings": list(case.settings)}


def add_efficiency(report: Report) -> None:
    """Into all rows whose method has one of a single GPU."""
    alone = {row["method"]: row["images_per_second"] for row in report.rows if row["gpus"] == 1 and "failed" not in row}
    for row in report.rows:
        if "failed" not in row and row["method"] in alone:
            row["efficiency"] = round(row["images_per_second"] / (row["gpus"] * alone[row["method"]]), 4)
    keep({**report.about, "rows": report.rows}, report.path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--methods", help=f"of {', '.join(CASES)} [all]")
    parser.add_argument("--gpus", help="numbers of GPUs [1,2,4, those that there are]")
    parser.add_argument("--parallel", action="store_true", help="rows side by side, on GPUs that are free")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on CPU processes, to test this program")
    parser.add_argument("--row", nargs=3, metavar=("METHOD", "GPUS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        method, gpus, folder = options.row
        return run_row(method, int(gpus), options.tiny, folder)
    methods = chosen(options.methods, list(CASES), list(CASES), parser)
    there = 2 if options.tiny else torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        print("bench_scaling: no CUDA GPU, nothing to measure; --tiny tests the program on the CPU")
        return 0
    numbers = [int(n) for n in options.gpus.split(",")] if options.gpus else [n for n in (1, 2, 4) if n <= there]
    if not all(1 <= n <= there for n in numbers):
        parser.error(f"--gpus {options.gpus}: expected numbers from 1 to {there}, as there are GPUs")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",")[:there] if named and not options.tiny else [str(n) for n in range(there)]
    device = torch.device("cpu" if options.tiny else "cuda")
    about = {"benchmark": "scaling", "tiny": options.tiny, **versions(device), "visible_gpus": there}
    if not options.tiny:
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    report = Report(options.out, about)
    rows = [(method, n) for method in methods for n in numbers]
    measure_all(report, rows, visible, options.tiny, options.parallel)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
