# SPDX-License-Identifier: Apache-2.0
"""Runs on several GPUs through the real commands: they equal one GPU, are interrupted, resumed, played back.

The same code runs with gloo processes on the CPU: ``pytest --slow --device cpu tests/training/test_several_gpus.py``.
With pytest-xdist, ``-n 2 --dist loadgroup`` keeps the runs of a method in one worker.

What "equal" means. One process and several add the same fp32 numbers in another order (and, on GPUs, atomics and
cuDNN's search for algorithms reorder sums between any two runs), so the first phase of the first step, which all runs
compute from the same weights, must agree closely in losses and gradient norms; a forgotten or doubled share of a batch
would show in the norm, which Adam's step would hide. Afterwards Adam turns a gradient that is almost zero into a whole
step whose sign rounding decides, so weights are compared as shares: a number is apart if it differs by more than a
tenth of how far its tensor went (root mean square), and few numbers may be. One step more or less must be over that
limit, which :func:`test_one_step_more_is_another_run` checks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from facelab.checkpoints.format import Checkpoint, list_checkpoints, load_checkpoint
from tests.conftest import CHECKOUT

STEPS = 8
AT_ONCE = 4  # runs of one worker; each is up to four processes, which compile kernels
PATIENCE = 240  # seconds
WATCHED = '''
"""train_<method> with pauses before its steps; every process tells how many recorded phases it played back."""
import os
import sys
import time
from facelab.cli.train import train_command
from facelab.training.loop import Trainer

iterate, run = Trainer._iterate, Trainer.run

def slowly(self):
    time.sleep(float(os.environ["PAUSE"]))
    iterate(self)

def told(self):
    result = run(self)
    played = self._graphs.played if self._graphs is not None else 0
    print(f"process {self.distributed.rank} played {played} phases", file=sys.stderr, flush=True)
    return result

Trainer._iterate, Trainer.run = slowly, told
if __name__ == "__main__":
    train_command(os.environ["METHOD"], "debug")()
'''


@dataclass(frozen=True)
class Case:
    """A method's small run.

    Attributes:
        curriculum: the smallest one.
        first: the phase that runs first, on the weights with which all runs begin.
        settings: every phase within the steps, fp32 throughout.
        unplayed: phases that cannot be CUDA graphs.
    """

    curriculum: str
    first: str
    settings: tuple[str, ...] = ()
    unplayed: tuple[str, ...] = ()


CASES = {
    "fenerf": Case("debug", "d_image"),
    "eg3d": Case(
        "debug",
        "g_main",
        (
            "train.half=none",
            "loss.r1_every=2",
            "loss.density_every=1",
            "loss.style_mixing=0.5",
            "augment.mode=ada",
            "augment.interval=2",
            "augment.kimg=0.1",
            "augment.target=-2",
        ),
        ("d_main", "d_reg", "g_main"),  # all that augment
    ),
    "cnerf": Case("debug_volume", "warmup"),
    "stylesdf": Case("debug", "warmup"),
}
COMMON = (
    "train.precision=fp32",
    "train.batch_size=8",
    "checkpoint.every=1",
    "checkpoint.keep_last=100",
    "log.every=1",
    "log.samples_every=0",
    "log.progress=false",
)


@dataclass(frozen=True)
class Limits:
    """How far apart equal runs may be: losses and norms of the first phase, losses of the first steps (relative),
    share of a network's numbers."""

    first: float
    early: float
    share: float


# Noise of 1e-5 in all gradients, as much as fp32 sums on a GPU make, moves the losses of three steps by less than 1e-5
# and puts 6 % of a network's numbers apart at most; a step more puts a third of them apart, or more.
LIMITS = {"cpu": Limits(2e-5, 1e-3, 0.01), "cuda": Limits(1e-3, 1e-2, 0.12)}
EARLY = 2  # steps whose losses are compared, those of a warm-up among them


class Runs:
    """Runs of one method, each made when it is first asked for and at most once.

    On GPUs all are asked for at the start, those of the first tests first; at most :data:`AT_ONCE` run at a time.

    Attributes:
        device: ``cpu`` or ``cuda``.
        limits: of equality there.
    """

    def __init__(self, method: str, device: str, folder: Path) -> None:
        self.method, self.device, self._folder = method, device, folder
        self.case, self.limits = CASES[method], LIMITS[device]
        self._watched = folder / "watched.py"
        self._watched.write_text(WATCHED)
        self._pool, self._said = ThreadPoolExecutor(AT_ONCE), dict[str, Future[str]]()
        self._started: list[subprocess.Popen[str]] = []
        if device == "cuda":
            four = ["four"] if torch.cuda.device_count() >= 4 else []
            for name in ["one", "two", "played", *four, "stopped", "resumed", "alone"]:
                self._ask(name)

    def folder(self, name: str) -> Path:
        """The folder of a run that has ended."""
        self.said(name)
        return self._folder / name

    def said(self, name: str) -> str:
        """What a run wrote to the terminal, at its end."""
        return self._ask(name).result()

    def _ask(self, name: str) -> Future[str]:
        if name not in self._said:
            if name in ("resumed", "alone"):
                self._ask("stopped")
            self._said[name] = self._pool.submit(self._make, name)
        return self._said[name]

    def _make(self, name: str) -> str:
        out = self._folder / name
        if name == "stopped":
            process = self.start(out, 2, pause=1.0)
            wait_for_step(out, 2, process)
            process.send_signal(signal.SIGINT)
            return finished(process, 130)
        if name in ("resumed", "alone"):
            shutil.copytree(self.folder("stopped"), out)
            return finished(self.start(out, 1 if name == "alone" else 2, "--resume", "auto"), 0)
        if name == "played":
            return finished(self.start(out, 2, settings=("train.cuda_graphs=true",), pause=0.0), 0)
        return finished(self.start(out, {"one": 1, "two": 2, "four": 4}[name]), 0)

    def start(
        self,
        out: Path,
        processes: int,
        *arguments: str,
        settings: tuple[str, ...] = (),
        pause: float | None = None,
    ) -> subprocess.Popen[str]:
        """The command in a process of its own; with a pause (seconds before each step), the watched one."""
        script = CHECKOUT / "scripts" / f"train_{self.method}.py" if pause is None else self._watched
        chosen = [x for setting in (*self.case.settings, *COMMON, *settings) for x in ("--set", setting)]
        where = ["--gpus", str(processes)] if self.device == "cuda" else ["--device", "cpu"]
        if self.device == "cpu" and processes > 1:
            where += ["--processes", str(processes)]
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        known = {"PYTHONPATH": path, "METHOD": self.method, "PAUSE": str(pause or 0.0)}
        few = {"OMP_NUM_THREADS": "1" if self.device == "cpu" else "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(script), "--curriculum", self.case.curriculum, "--out", str(out), *where]
            + ["--max-steps", str(STEPS), *chosen, *arguments],
            cwd=CHECKOUT,
            env={**os.environ, **known, **few},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """End what still runs, for tests that were left out or interrupted."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        self._pool.shutdown(wait=True)


def finished(process: subprocess.Popen[str], code: int) -> str:
    """Wait for a process, demand its exit status, return what it wrote."""
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        _, said = process.communicate()
        pytest.fail(f"no end after {PATIENCE} s: {said[-3000:]}")
    assert process.returncode == code, said[-3000:]
    return said


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.multi_gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES])
def runs(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(request.param, device, tmp_path_factory.mktemp(f"{request.param}_{device}"))
    yield made
    made.close()


# ---------------------------------------------------------------- comparing


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def checkpoint_at(run: Path, step: int) -> Checkpoint:
    return load_checkpoint(next(path for path in list_checkpoints(run) if int(path.name) == step))


def shares_apart(one: Checkpoint, other: Checkpoint, start: Checkpoint) -> dict[str, float]:
    """Group of weights -> share of its numbers that differ by more than a tenth of how far their tensor went."""
    assert one.weights.keys() == other.weights.keys()
    shares = {}
    for group, tensors in one.weights.items():
        assert tensors.keys() == other.weights[group].keys()
        apart, total = 0, 0
        for key, value in tensors.items():
            value, second = value.double(), other.weights[group][key].double()
            went = (value - start.weights[group][key].double()).square().mean().sqrt()
            difference = (second - value).abs()
            assert bool(torch.isfinite(difference).all()), f"{group}.{key}"
            apart += int((difference > 0.1 * went + 2e-6 * value.abs()).sum())
            total += value.numel()
        shares[group] = apart / total
    return shares


def losses_of(entry: dict[str, float], phase: str = "") -> dict[str, float]:
    """What the phases of a line of the log (or one of them) say: losses and gradient norms."""
    other = ("seconds", "lr", "skipped")
    named = {key: value for key, value in entry.items() if "/" in key and key.split("/")[0] not in other}
    return {key: value for key, value in named.items() if phase in key.split("/")} if phase else named


def assert_equal_runs(runs: Runs, one: Path, other: Path) -> None:
    """Losses and norms of the first phase closely, those of the first steps, most weights at the end."""
    limits, first, second = runs.limits, log_of(one), log_of(other)
    assert [losses_of(entry).keys() for entry in first] == [losses_of(entry).keys() for entry in second]
    assert [entry["images"] for entry in first] == [entry["images"] for entry in second]
    assert all(entry[key] == 0 for entry in second for key in entry if key.startswith("skipped/"))
    tight = losses_of(first[0], "" if runs.case.first == "warmup" else runs.case.first)
    assert any(key.startswith("grad_norm/") for key in tight) and len(tight) > 1
    found = {key: second[0][key] for key in tight}
    assert found == pytest.approx(tight, rel=limits.first, abs=limits.first / 10)
    for mine, theirs in zip(first, second, strict=True):
        if mine["step"] <= EARLY:
            assert losses_of(theirs) == pytest.approx(losses_of(mine), rel=limits.early, abs=limits.early / 10)
    checkpoints = checkpoint_at(one, STEPS), checkpoint_at(other, STEPS)
    assert checkpoints[0].state["position"]["images"] == checkpoints[1].state["position"]["images"]  # type: ignore[index]
    shares = shares_apart(*checkpoints, checkpoint_at(one, 1))
    print(f"{runs.method} on {runs.device}, {one.name} and {other.name}: {shares}")
    assert max(shares.values()) <= limits.share, shares


def assert_identical(first: Path, second: Path) -> None:
    """The same bits."""
    one, other = checkpoint_at(first, STEPS), checkpoint_at(second, STEPS)
    for group, tensors in one.weights.items():
        for key, value in tensors.items():
            assert torch.equal(value, other.weights[group][key]), f"{group}.{key}"


# ---------------------------------------------------------------- tests


def test_two_equal_one(runs: Runs) -> None:
    assert f"on 1 x {runs.device}" in runs.said("one") and f"on 2 x {runs.device}" in runs.said("two")
    assert_equal_runs(runs, runs.folder("one"), runs.folder("two"))


def test_one_step_more_is_another_run(runs: Runs) -> None:
    """The limit on weights is below what a single step changes."""
    run = runs.folder("one")
    shares = shares_apart(checkpoint_at(run, STEPS), checkpoint_at(run, STEPS - 1), checkpoint_at(run, 1))
    trained = {group: share for group, share in shares.items() if group != "augment"}
    assert min(trained.values()) > 2 * runs.limits.share, shares


def test_two_played_back_equal_two(runs: Runs) -> None:
    said = runs.said("played")
    unplayed = re.findall(r"phase (\S+) runs without a CUDA graph: it", said)
    assert sorted(unplayed) == list(runs.case.unplayed)
    assert min(int(said.split(f"process {rank} played ")[1].split()[0]) for rank in (0, 1)) > 0
    assert_equal_runs(runs, runs.folder("two"), runs.folder("played"))
    if runs.device == "cpu":
        assert_identical(runs.folder("two"), runs.folder("played"))


def test_four_equal_one(runs: Runs) -> None:
    if runs.device == "cuda" and torch.cuda.device_count() < 4:
        pytest.skip(f"needs four CUDA GPUs, {torch.cuda.device_count()} visible")
    assert f"on 4 x {runs.device}" in runs.said("four")
    assert_equal_runs(runs, runs.folder("one"), runs.folder("four"))


def test_interrupted_and_resumed_on_two_and_on_one(runs: Runs) -> None:
    """Ctrl-C after the second step; the rest on two processes, and of a copy of the folder on one."""
    whole, stopped = runs.folder("two"), runs.folder("stopped")
    said = runs.said("stopped")
    assert said.count("stopping: finishing this step and saving") == 1 and "Traceback" not in said
    reached = int(list_checkpoints(stopped)[-1].name)
    assert 2 <= reached < STEPS and f"stopped by a signal after step {reached}, saved" in said
    for name, processes in (("resumed", 2), ("alone", 1)):
        said = runs.said(name)
        assert f"on {processes} x {runs.device}" in said and f"at step {reached}" in said
        assert [entry["step"] for entry in log_of(runs.folder(name))] == [entry["step"] for entry in log_of(whole)]
        assert_equal_runs(runs, whole, runs.folder(name))
    if runs.device == "cpu":
        assert_identical(whole, runs.folder("resumed"))


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the log has a line of this step."""
    end = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or not any(e["step"] >= step for e in complete_lines(run)):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"step {step} was not reached: {process.communicate()[1][-3000:]}")
        time.sleep(0.05)


def complete_lines(run: Path) -> list[dict[str, float]]:
    """The lines of the log that are written to their end."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]
