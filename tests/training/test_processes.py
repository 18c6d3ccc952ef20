# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same numbers as one, failures in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from facelab.checkpoints.format import load_checkpoint
from facelab.errors import UserError
from facelab.training import launch as launching
from facelab.training.launch import WorkerError, launch, plan
from tests.conftest import CHECKOUT
from tests.training.training_doubles import METHODS, PoisonedOnOneRank, config, fail_on, run, train_several


def assert_close_runs(first: Path, second: Path) -> None:
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.weights.keys() == b.weights.keys() and a.state["position"]["images"] == b.state["position"]["images"]  # type: ignore[index]
    for group, tensors in a.weights.items():
        for key, value in tensors.items():
            torch.testing.assert_close(b.weights[group][key], value, rtol=1e-4, atol=2e-6, msg=f"{group}.{key}")


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One spawn for all doubles: equal weights and logs, agreed NaN policy, a resume on twice the processes."""
    one, two, halves = tmp_path / "one", tmp_path / "two", tmp_path / "halves"
    two.mkdir()
    run("fenerf", config(train={"max_steps": 2}), halves)
    assert launch(train_several, (two, halves), device="cpu", processes=2) == 0
    for name in METHODS:
        run(name, config(train={"max_steps": 5}), one / name)
        assert_close_runs(one / name, two / name)
        for mine, theirs in zip(log_of(one / name), log_of(two / name), strict=True):
            for key in (k for k in mine if k.endswith(("/loss", "/fake", "/real", "/density", "/class"))):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
    assert_close_runs(one / "fenerf", halves)
    run(PoisonedOnOneRank(), config(train={"max_steps": 3}, log={"every": 1}), one / "poisoned")
    assert_close_runs(one / "poisoned", two / "poisoned")
    assert [entry["skipped/g"] for entry in log_of(two / "poisoned")] == [0, 1, 0]
    refusals = {(two / f"refusal_{rank}").read_text() for rank in range(2)}
    assert len(refusals) == 1 and "generator_lr was 0.01, now 1.0" in refusals.pop()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("user", "picture 3.png is damaged"),
        ("bug", "process 1 of 2 failed: KeyError: 'missing thing' (training_doubles.py:"),
        ("kill", "process 1 of 2 was killed by SIGKILL"),
    ],
)
def test_a_failing_process_is_one_line(how: str, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        launch(fail_on, (1, how), device="cpu", processes=2)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert ("Traceback" in caught.value.trace) == (how != "kill")


SLOWLY_IMPORTED = """
import os, sys, time
from pathlib import Path
if __name__ == "__mp_main__":
    Path(sys.argv[1], f"importing_{os.getpid()}").touch()
    time.sleep(60)
from facelab.training.launch import launch
def worker(distributed): return 0
if __name__ == "__main__":
    sys.exit(launch(worker, device="cpu", processes=2))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_processes_import_ends_quietly(number: int, code: int, tmp_path: Path) -> None:
    """The whole foreground group gets it, as from a terminal."""
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY_IMPORTED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("importing_*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    asked = time.monotonic()
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (code, "") and time.monotonic() - asked < 20
    children = [int(path.name.partition("_")[2]) for path in tmp_path.glob("importing_*")]
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)


def test_processes_that_a_signal_ended_are_no_failures(tmp_path: Path) -> None:
    """Nor are those that lost their connection by that; without the signal both are."""
    report = {
        "text": "RuntimeError: Connection closed by peer",
        "user": False,
        "secondary": True,
        "time": 1.0,
        "trace": "",
    }
    (tmp_path / "error_1.json").write_text(json.dumps(report))
    assert launching._failures([-15, 1], tmp_path, 15) == [] and launching._status(-15, 15) == 143
    assert [str(error)[:34] for error in launching._failures([-15, 1], tmp_path)] == [
        "process 0 of 2 was killed by SIGTE",
        "process 1 of 2 failed: RuntimeErro",
    ]
    assert len(launching._failures([0, 1], tmp_path, 15)) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": 3}, "--gpus 3: this machine has 0 usable CUDA GPUs; use --device cpu --processes N"),
        ({"gpus": 3, "available": 2}, "--gpus 3: this machine has 2 usable CUDA GPUs; use --gpus 2"),
        ({"device": "cuda"}, "no usable CUDA GPU; use --device cpu"),
        ({"device": "cpu", "gpus": 1, "available": 1}, "contradicts"),
        ({"processes": 2}, "--processes needs --device cpu"),
        ({"gpus": 0}, "--gpus must be at least 1, got 0"),
        ({"device": "tpu"}, "--device must be cuda or cpu, got 'tpu'"),
    ],
)
def test_what_the_machine_has_not_is_refused(asked: dict, message: str) -> None:
    options = {"device": None, "gpus": None, "processes": None, "available": 0, **asked}
    with pytest.raises(UserError) as caught:
        plan(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_plans_that_fit() -> None:
    assert plan(None, None, None, 4) == ("cuda", 1)
    assert plan("cuda", 2, None, 4) == ("cuda", 2)
    assert plan("cpu", None, None, 4) == ("cpu", 1)


def test_torchrun_sets_the_number_of_processes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun sets the number of processes"):
        launch(fail_on, (0, "user"), processes=2, device="cpu")
    seen = []
    assert launching.launch(lambda distributed, x: seen.append((distributed.world, x)), (3,), device="cpu") == 0
    assert seen == [(1, 3)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert launch(fail_on, (0, "user"), device="cuda") == 2
    assert capsys.readouterr().err.startswith("error: torchrun started worker 2 on this machine, which has")
