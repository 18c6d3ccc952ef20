# SPDX-License-Identifier: Apache-2.0
"""From one command to the processes of a run: torchrun is recognised, ``--gpus N`` and ``--processes N`` spawn.

What was asked for is what runs, or one line says why not; nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from facelab.data.processes import deaf_to_interrupts
from facelab.errors import UserError
from facelab.training.distributed import RelayedError, from_torchrun, is_consequence, join, leave, under_torchrun

Worker = Callable[..., int | None]  # worker(distributed, *args) -> exit code
GRACE = 5.0  # seconds in which the other processes may fail or finish after the first failure


class WorkerError(UserError):
    """A process of the run failed; ``trace`` is its traceback, if it left one."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def launch(
    worker: Worker,
    args: Sequence[Any] = (),
    *,
    device: str | None = None,
    gpus: int | None = None,
    processes: int | None = None,
) -> int:
    """Run ``worker(distributed, *args)`` in every process of the run and return the exit code.

    Args:
        worker: a function of a module, with arguments that can be pickled; returns an exit code or None.
        device: ``"cuda"``, ``"cpu"`` or None: cuda if there is one.
        gpus: processes on the GPUs of this machine, one each; None = one.
        processes: processes on the CPU.

    Raises:
        UserError: the machine has not what was asked for, options contradict each other, or a process failed.
    """
    if under_torchrun():
        if gpus is not None or processes is not None:
            raise UserError(
                "torchrun sets the number of processes: leave out --gpus and --processes, use --nproc-per-node"
            )
        return _under_torchrun(worker, args, device)
    kind, count = plan(device, gpus, processes, torch.cuda.device_count() if device != "cpu" else 0)
    if count > 1:
        return _spawn(worker, args, kind, count)
    return worker(join(0, 1, 0, kind, ""), *args) or 0


def plan(device: str | None, gpus: int | None, processes: int | None, available: int) -> tuple[str, int]:
    """Check what was asked for against the GPUs there are -> (``"cuda"`` or ``"cpu"``, number of processes).

    >>> plan(None, None, None, available=0), plan("cpu", None, 2, available=8), plan(None, 4, None, available=8)
    (('cpu', 1), ('cpu', 2), ('cuda', 4))
    """
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device must be cuda or cpu, got {device!r}")
    for name, number in (("--gpus", gpus), ("--processes", processes)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")
    if gpus is not None and (device == "cpu" or processes is not None):
        raise UserError("--gpus contradicts --device cpu and --processes; use --gpus N, or --device cpu --processes N")
    if processes is not None and device != "cpu":
        raise UserError("--processes needs --device cpu; on GPUs use --gpus N")
    if gpus is not None and gpus > available:
        raise UserError(
            f"--gpus {gpus}: this machine has {available} usable CUDA GPUs; "
            + (f"use --gpus {available}" if available else "use --device cpu --processes N")
        )
    if device == "cuda" and not available:
        raise UserError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    if processes is not None:
        return "cpu", processes
    return ("cuda", gpus or 1) if available and device != "cpu" else ("cpu", 1)


def _under_torchrun(worker: Worker, args: Sequence[Any], device: str | None) -> int:
    """One worker of torchrun, which prints what went wrong in one line and ends with a status that torchrun sees."""
    rank = os.environ["RANK"]
    try:
        distributed = from_torchrun(device)
        code = worker(distributed, *args) or 0
    except RelayedError:
        return 2
    except UserError as error:
        print(f"error: {error}" if rank == "0" else f"error [process {rank}]: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_consequence(error):
            raise
        print(f"process {rank} ends: it lost the connection to another process", file=sys.stderr, flush=True)
        os._exit(1)  # tearing down communicators could wait for processes that are gone
    leave()
    return code


# --- spawning


def _spawn(worker: Worker, args: Sequence[Any], kind: str, count: int) -> int:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="facelab-") as folder:
        common = (count, kind, folder, os.getpid(), worker, tuple(args))
        children = [context.Process(target=_child, args=(rank, *common)) for rank in range(count)]
        with _forward_signals(children, Path(folder)) as stop:
            with deaf_to_interrupts():  # until they are in their own process groups
                for child in children:
                    if not stop.early:
                        child.start()
            started = [child for child in children if child.pid is not None]
            if stop.early:  # perhaps while one of them was being started
                for child in started:
                    child.kill()
            codes = _wait(started)
        if stop.early:
            return 128 + stop.number
        failures = _failures(codes, Path(folder), stop.number)
    if failures:
        raise failures[0]
    return max(_status(code, stop.number) for code in codes)


@dataclass
class _Stop:
    """What the parent was asked by signals: the latest one, 0 while there was none; early: before all had joined."""

    number: int = 0
    early: bool = False


def _status(code: int | None, asked: int) -> int:
    """A child's exit status; dying of the signal that all were sent counts as shells count it."""
    return 128 + asked if asked and code == -asked else code or 0


def _wait(children: list[BaseProcess]) -> list[int | None]:
    """Wait for all; after the first failure give the others a moment to fail themselves, then kill them."""
    deadline = None
    while any(child.exitcode is None for child in children):
        connection.wait([child.sentinel for child in children if child.exitcode is None], timeout=0.2)
        failed = any(child.exitcode not in (None, 0, 130, 143) for child in children)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child.exitcode is None:
                    child.kill()
                    child.join()
                    child.late = True  # type: ignore[attr-defined]
    return [None if getattr(child, "late", False) else child.exitcode for child in children]


def _failures(codes: list[int | None], folder: Path, asked: int = 0) -> list[WorkerError]:
    """One error per failed process: causes before consequences (a lost connection), then by time.

    ``asked``: the signal that all were sent, if there was one; of a process that it ended nobody needs to hear, nor of
    the connections that others lost by that.
    """
    found: list[tuple[bool, float, WorkerError]] = []
    ended = bool(asked) and any(_status(code, asked) == 128 + asked for code in codes)
    for rank, code in enumerate(codes):
        where = f"process {rank} of {len(codes)}"
        file = folder / f"error_{rank}.json"
        if file.exists():
            report = json.loads(file.read_text())
            if ended and report["secondary"]:
                continue
            text = report["text"] if report["user"] else f"{where} failed: {report['text']}"
            found.append((report["secondary"], report["time"], WorkerError(text, report["trace"])))
        elif _status(code, asked) == 128 + asked:
            continue
        elif code is not None and code < 0:
            name = signal.Signals(-code).name
            text = f"{where} was killed by {name}; the run goes on from its last checkpoint with --resume auto"
            found.append((False, 0.0, WorkerError(text)))
        elif code not in (None, 0, 130, 143):
            found.append((True, 0.0, WorkerError(f"{where} ended with status {code}")))
    return [error for _, _, error in sorted(found, key=lambda item: item[:2])]


@contextlib.contextmanager
def _forward_signals(children: list[BaseProcess], folder: Path) -> Iterator[_Stop]:
    """Pass SIGINT and SIGTERM on to the children, which decide; they sit in process groups of their own.

    Before all have joined there is nothing to decide or save: they are ended.
    """
    stop = _Stop()

    def forward(number: int, frame: Any) -> None:
        stop.number = number
        stop.early = stop.early or not all(_joined(folder, rank).exists() for rank in range(len(children)))
        for child in children:
            if child.pid is not None and child.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL if stop.early else number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joined(folder: Path, rank: int) -> Path:
    """The file that says that a process has joined the run."""
    return folder / f"joined_{rank}"


def _child(rank: int, world: int, kind: str, folder: str, parent: int, worker: Worker, args: tuple) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C reaches the parent only, which passes it on once
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if sys.platform == "linux":  # gloo serves runs on GPUs too, for Python objects
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no need to resolve its host name
    code = 1
    try:
        distributed = join(rank, world, rank, kind, (Path(folder) / "rendezvous").as_uri())
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored until now, see deaf_to_interrupts
        _joined(Path(folder), rank).touch()
        code = worker(distributed, *args) or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # noqa: BLE001  whatever it is, the parent must tell
        _report(error, Path(folder) / f"error_{rank}.json")
    else:
        leave()
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after a failure, tearing down communicators could wait for processes that are gone


def _follow(parent: int) -> None:
    """End with the parent: ask for a save as soon as it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _report(error: BaseException, file: Path) -> None:
    """Leave the error for the parent: one line, the traceback, and whether it looks like a consequence of another."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    user = isinstance(error, UserError)
    report = {
        "text": lines[0] if user else f"{type(error).__name__}: {lines[0]}{place}",
        "user": user,
        "secondary": is_consequence(error),
        "time": time.time(),
        "trace": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }
    with contextlib.suppress(OSError):
        file.with_suffix(".tmp").write_text(json.dumps(report))
        os.replace(file.with_suffix(".tmp"), file)
