# SPDX-License-Identifier: Apache-2.0
"""Whole programs: signals, torchrun on two nodes, a killed worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from facelab.checkpoints.format import list_checkpoints
from tests.training.test_processes import assert_close_runs, log_of
from tests.training.training_doubles import config, run

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": MODULES}

SCRIPT = """
import os
import sys
from pathlib import Path
from facelab.errors import UserError
from facelab.training.launch import launch
from tests.training.training_doubles import config, train

if __name__ == "__main__":
    folder, processes, steps, slow = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    staged = config(train={"max_steps": steps}, log={"every": 1}, checkpoint={"every": 2})
    options = {"device": "cpu"} if processes == 0 else {"device": "cpu", "processes": processes}
    try:
        code = launch(train, ("fenerf", staged, folder, sys.argv[5], slow), **options)
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        (folder / f"threads_{os.environ.get('RANK', 0)}").write_text(" ".join(names))
        sys.exit(code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
"""


def start(
    tmp_path: Path,
    processes: int,
    steps: int,
    slow: float,
    command: list[str] | None = None,
    resume: str = "auto",
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(script), str(tmp_path / "run"), str(processes), str(steps), str(slow), resume]
    return subprocess.Popen(
        [*(command or [sys.executable]), *arguments],
        cwd=CHECKOUT,
        env={**ENVIRONMENT, **(environment or {})},
        text=True,
        stderr=subprocess.PIPE,
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("processes", "number", "code"), [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path: Path, processes: int, number: int, code: int) -> None:
    process = start(tmp_path, processes, steps=1000, slow=0.1)
    wait_for(tmp_path / "run" / f"alive_{processes - 1}", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.count("stopping: finishing this step and saving") == 1 and "Traceback" not in errors
    reached = int(list_checkpoints(tmp_path / "run")[-1].name)
    assert log_of(tmp_path / "run")[-1]["step"] == reached > 0
    assert f"stopped by a signal after step {reached}, saved; go on with --resume auto" in errors
    staged = config(train={"max_steps": reached + 1}, log={"every": 1}, checkpoint={"every": 2})
    assert run("fenerf", staged, tmp_path / "run", resume="auto")[1].finished


def test_a_second_ctrl_c_aborts(tmp_path: Path) -> None:
    process = start(tmp_path, 0, steps=1000, slow=30)
    wait_for(tmp_path / "run" / "alive_0", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode not in (0, 143) and "KeyboardInterrupt" in errors
    assert not list_checkpoints(tmp_path / "run")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def test_two_nodes_train_and_equal_one_process(tmp_path: Path) -> None:
    port = free_port()
    common = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test")
    nodes = [
        start(tmp_path, 0, 3, 0, torchrun(*common, "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"))
        for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=150)
        assert node.returncode == 0, errors
    for rank in range(2):  # the group is really gone: gloo's threads would abort at the end of the interpreter
        assert "gloo" not in (tmp_path / "run" / f"threads_{rank}").read_text()
    staged = config(train={"max_steps": 3}, log={"every": 1}, checkpoint={"every": 2})
    run("fenerf", staged, tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_killed_worker_comes_back_from_the_last_checkpoint(tmp_path: Path) -> None:
    command = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    process = start(tmp_path, 0, steps=12, slow=0.5, command=command, resume="none")
    wait_for(tmp_path / "run" / "checkpoints" / "00000004", process)
    os.kill(int((tmp_path / "run" / "alive_1").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "resumed from" in errors and "process 0 ends: it lost the connection to another process" in errors
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == list(range(1, 13))
    staged = config(train={"max_steps": 12}, log={"every": 1}, checkpoint={"every": 2})
    run("fenerf", staged, tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_processes_of_another_launcher_need_the_usual_variables_only(tmp_path: Path) -> None:
    """As ``srun`` starts them: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    tasks = [
        start(tmp_path, 0, 2, 0, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=100)
        assert task.returncode == 0, errors
    run("fenerf", config(train={"max_steps": 2}, log={"every": 1}, checkpoint={"every": 2}), tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tmp_path: Path) -> None:
    process = start(tmp_path, 0, steps=1000, slow=0.1, command=torchrun("--standalone", "--nproc-per-node", "2"))
    wait_for(tmp_path / "run" / "alive_1", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "saved; go on with --resume auto" in errors
    assert int(list_checkpoints(tmp_path / "run")[-1].name) == log_of(tmp_path / "run")[-1]["step"]
