# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: who we are, sums over all, agreement on the host."""

from __future__ import annotations

import datetime
import importlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from facelab.errors import UserError

Result = TypeVar("Result")
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective; rank 0 may be busy with sample grids or a save meanwhile


class RelayedError(UserError):
    """An error of rank 0, raised again on another process, which need not print it."""


@dataclass
class Distributed:
    """One process of a run. With one process every method is the identity and needs no process group.

    Attributes:
        rank: number of this process, 0 writes files.
        world: number of processes.
        local_rank: number on this machine.
        device: where this process computes.
        restarts: how often torchrun has restarted the run.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A small Python object of each process, on every process, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's Python object on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensors_(self, tensors: list[Tensor]) -> None:
        """Rank 0's values in place, so that all start from the same numbers."""
        if self.world > 1:
            for tensor in tensors:
                plain = tensor.contiguous()  # NCCL refuses most other layouts, and sends memory, whatever its order
                dist.broadcast(plain, src=0)
                if plain is not tensor:
                    tensor.copy_(plain)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run on rank 0, wait, return its result everywhere; its UserError is raised on every process."""
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except UserError as caught:
                error = caught
        outcome = self.broadcast((result, None if error is None else str(error)))
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise RelayedError(outcome[1])
        return outcome[0]

    def barrier(self) -> None:
        self.gather(None)


class DelayedFlag:
    """An agreed stop: each process raises its flag when it likes, all learn of it at the same later step.

    The exchange of one step runs in the background and is read at the next, so nobody waits for it.
    """

    def __init__(self, distributed: Distributed) -> None:
        self._distributed = distributed
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def exchange(self, value: int) -> int:
        """Send this step's value; return the largest value that any process sent at the step before."""
        if self._distributed.world == 1:
            return value
        agreed = self._finish()
        self._flag = torch.tensor([value], dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def close(self) -> None:
        """Complete an exchange under way; every process must call it at the same step."""
        self._finish()

    def _finish(self) -> int:
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._flag.item())


def under_torchrun() -> bool:
    """True in a worker that torchrun (or a compatible launcher) has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def from_torchrun(device: str | None) -> Distributed:
    """Join the processes that torchrun started. UserError if this machine has too few GPUs for them."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started worker {local} on this machine, which has {torch.cuda.device_count()} GPUs; "
            "lower --nproc-per-node or pass --device cpu"
        )
    joined = join(rank, world, local, kind, "env://")
    # a node whose workers were restarted for the failure of another one does not count it
    joined.restarts = max(joined.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    return joined


def join(rank: int, world: int, local_rank: int, kind: str, url: str) -> Distributed:
    """Open the process group: gloo for CPU tensors and Python objects, NCCL for CUDA tensors.

    Args:
        rank, world, local_rank: see :class:`Distributed`.
        kind: ``"cuda"`` or ``"cpu"``.
        url: where the processes meet: ``env://``, ``file:///...``; unused for one process.
    """
    device = torch.device("cuda", local_rank) if kind.startswith("cuda") else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # The default arguments of this module are the group of the moment of its import. Imported later (the first
        # step of an optimizer does), it would keep the group alive past leave(), and gloo's threads into the end of
        # the interpreter, where they abort.
        importlib.import_module("torch.distributed.nn.functional")

        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, world = next(rendezvous(url, rank, world, timeout=TIMEOUT))
        store = dist.PrefixStore(_agree_on_token(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return Distributed(rank, world, local_rank, device)


def _agree_on_token(store: dist.Store, rank: int, world: int) -> str:
    """A word that the live processes share, and no earlier ones.

    torchrun keeps one store for all attempts of a run, with the addresses of dead processes in it. Rank 0 invents the
    word and gives it to whoever asks under a name that was never used before; each process that has it confirms.
    """
    end = time.monotonic() + TIMEOUT.total_seconds()
    if rank != 0:
        own = uuid.uuid4().hex
        store.set(f"hello/{rank}", own)
        token = store.get(f"answer/{own}").decode()
        store.set(f"{token}/{rank}", "here")
        return token
    token, answered = uuid.uuid4().hex, set()
    missing = set(range(1, world))
    while missing and time.monotonic() < end:
        for other in sorted(missing):
            if store.check([f"{token}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]) and (name := store.get(f"hello/{other}")) not in answered:
                answered.add(name)
                store.set(f"answer/{name.decode()}", token)
        time.sleep(0.01)
    if missing:
        minutes = TIMEOUT.total_seconds() / 60
        raise UserError(
            f"processes {sorted(missing)} of {world} did not join within {minutes:.0f} minutes; check their logs"
        )
    return token


def is_consequence(error: BaseException) -> bool:
    """True for errors that only say that another process has failed."""
    lost = ("Connection closed", "Connection reset", "NCCL", "gloo", "Broken pipe")
    connection = isinstance(error, (dist.DistError, RuntimeError)) and any(word in str(error) for word in lost)
    return isinstance(error, RelayedError) or (connection and not isinstance(error, UserError))


def leave() -> None:
    """Close the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
