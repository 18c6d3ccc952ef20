# SPDX-License-Identifier: Apache-2.0
"""The one source of random numbers: named draws that depend on where they stand, not on what came before.

A draw is a pure function of (seed, step, phase, chunk, name), so the same step gives the same
numbers on one process and on eight, and resuming a run needs only the step. Tests and golden
cases replay recorded numbers with :class:`TapeDraws`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A copy of ``value`` with the function applied to every tensor inside tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in fields})
    return value


def moved(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device`` without waiting for the work queued there (a plain ``.to`` would)."""
    target = torch.device(device)
    if target.type != "cuda" or value.device.type == "cuda":
        return value.to(target)
    return value.pin_memory().to(target, non_blocking=True)


@dataclass(frozen=True)
class Draws:
    """Random tensors keyed by (seed, step, phase, chunk, name).

    Attributes:
        seed: seed of the run or picture.
        step: training step.
        phase: name of the training phase (``"d_image"``, ``"g"`` ...).
        chunk: global chunk number; a chunk is ``batch_gpu`` samples, counted across ranks.

    >>> Draws(0).normal("z", (2,)).equal(Draws(0).normal("z", (2,)))
    True
    >>> Draws(0).normal("z", (2,)).equal(Draws(0).at(step=1).normal("z", (2,)))
    False
    """

    seed: int
    step: int = 0
    phase: str = ""
    chunk: int = 0

    def at(self, *, step: int | None = None, phase: str | None = None, chunk: int | None = None) -> Draws:
        """The same source at another place."""
        return replace(
            self,
            step=self.step if step is None else step,
            phase=self.phase if phase is None else phase,
            chunk=self.chunk if chunk is None else chunk,
        )

    def normal(
        self, name: str, shape: Sequence[int], device: torch.device | str = "cpu", dtype=torch.float32
    ) -> Tensor:
        """Standard normal numbers of the given shape, drawn on ``device``."""
        return torch.randn(tuple(shape), generator=self.generator(name, device), device=device, dtype=dtype)

    def uniform(
        self, name: str, shape: Sequence[int], device: torch.device | str = "cpu", dtype=torch.float32
    ) -> Tensor:
        """Uniform numbers in [0, 1) of the given shape, drawn on ``device``."""
        return torch.rand(tuple(shape), generator=self.generator(name, device), device=device, dtype=dtype)

    def host(self, make: Callable[[Draws], T], device: torch.device | str) -> T:
        """What ``make`` computes of these draws on the CPU, with its tensors moved to ``device``.

        Anything made of random numbers on the CPU and used on a GPU goes through here, so that a step that is played
        back (:mod:`facelab.training.graphs`) can make it anew. ``make`` depends on nothing that changes with the step
        but its argument.
        """
        return map_tensors(lambda tensor: moved(tensor, device), make(self))

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh ``torch.Generator`` for this place and name."""
        key = f"{self.seed}/{self.step}/{self.phase}/{self.chunk}/{name}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True)
class TapeDraws(Draws):
    """Recorded numbers by name, wherever they are asked for. KeyError names what is missing."""

    tape: Mapping[str, Tensor] | None = None
    seed: int = 0

    def _replay(self, name: str, shape: Sequence[int], device, dtype) -> Tensor:
        if self.tape is None or name not in self.tape:
            raise KeyError(f"the tape has no draw {name!r}; it holds {sorted(self.tape or ())}")
        return self.tape[name].reshape(tuple(shape)).to(device=device, dtype=dtype)

    def normal(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._replay(name, shape, device, dtype)

    def uniform(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._replay(name, shape, device, dtype)
