# SPDX-License-Identifier: Apache-2.0
"""The one source of random numbers: named draws that depend on where they stand, not on what came before.

A draw is a pure function of (seed, step, phase, chunk, name), so the same step gives the same
numbers on one process and on eight, and resuming a run needs only the step. Tests and golden
cases replay recorded numbers with :class:`TapeDraws`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from facelab.tensors import map_tensors, moved

T = TypeVar("T")


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
        back (:mod:`facelab.recording`) can make it anew. ``make`` depends on nothing that changes with the step
        but its argument.
        """
        return map_tensors(lambda tensor: moved(tensor, device), make(self))

    def unrepeatable(self, why: str) -> None:
        """Say that the caller uses what was drawn in a way that no playback can repeat.

        Where a step is recorded (:mod:`facelab.recording`) it then runs without a graph, and the line that tells of it
        ends in ``it <why>``; elsewhere nothing happens.
        """

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
