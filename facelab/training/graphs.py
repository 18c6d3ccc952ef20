# SPDX-License-Identifier: Apache-2.0
"""Phases as CUDA graphs: the thousands of small kernels of a chunk are queued once and played back at every step.

:mod:`facelab.recording` says how. The doors of a phase:

- random numbers, ``ctx.draws``: drawn into the recorded memory, the same numbers as without a graph;
- tensors made on the CPU, ``ctx.host`` and ``ctx.schedule``: made anew and copied;
- what Python branches on, ``ctx.decide``: decided anew; another answer is another recording;
- the real batch and what phases share: copied.

A phase that reaches for anything else (``ctx.progress``, draws on the CPU outside of ``ctx.host``) runs without a graph,
and the log says why. Gradients are added to the trainer's flat buffer as ever; reduction, clipping, optimisers and
averages stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from facelab import recording as core
from facelab.draws import Draws
from facelab.recording import Place, Recorder, RecordingDraws, Tape, copy_tensors
from facelab.tensors import map_tensors
from facelab.training.phases import PhaseContext, SharedResults, Sums
from facelab.training.schedule import Progress

H = TypeVar("H", bound=Hashable)


@dataclass
class Recording(core.Recording):
    """What one run of a phase asked for, in order, with the memory that it got.

    Attributes:
        borrowed: results of other phases by name, and the tensors that stand for them.
        made: results for other phases that this one makes.
        logged, counted: what was logged: (name, tensor, weight).
        real: the real batch.
    """

    borrowed: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    logged: list[tuple[str, Tensor, float]] = field(default_factory=list)
    counted: list[tuple[str, Tensor, float]] = field(default_factory=list)
    real: Any = None

    def fits(self, context: PhaseContext) -> bool:
        """Whether Python would take the same branches now."""
        present = {name for name, first in context._shared.values if first == context.first}
        if not self.borrowed.keys() <= present or self.made.keys() & present:
            return False
        return super().fits(context)

    def refill(self, context: PhaseContext) -> None:
        """The numbers of this step into the recorded memory."""
        if self.real is not None:
            copy_tensors(self.real, context.real)
        for name, stored in self.borrowed.items():
            copy_tensors(stored, context._shared.values[name, context.first][1])
        super().refill(context)

    def forget_results(self) -> None:
        """Before the phase runs once more: what was logged and made is that of the new run."""
        super().forget_results()
        self.logged.clear()
        self.counted.clear()
        self.made.clear()

    def deliver(self, context: PhaseContext) -> None:
        """What was logged and made, after the run."""
        for name, value, weight in self.logged:
            context._log.add(name, value, weight)
        for name, value, weight in self.counted:
            context._statistics.add(name, value, weight)
        for name, value in self.made.items():
            context._shared.values[name, context.first] = (context.count, map_tensors(torch.clone, value))


class HiddenProgress:
    """Stands for the progress inside a recorded run: the batch size is constant, all else changes."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __getattr__(self, name: str) -> Any:
        if name != "batch_size":
            self._tape.problem(f"reads progress.{name}; use ctx.schedule or ctx.decide")
        return getattr(self._tape.origin.progress, name)


class TapedShared(SharedResults):
    """Shared results of a recorded run: those of other phases are borrowed, new ones delivered afterwards."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def get(self, name: str, first: int, count: int, make: Callable[[], Any]) -> Any:
        recording: Any = self._tape.recording
        outer = self._tape.origin._shared
        if name in recording.made:
            return recording.made[name]
        if self._tape.playing and name in recording.borrowed:
            return recording.borrowed[name]
        if (name, first) in outer.values and not self._tape.playing:
            value = outer.get(name, first, count, make)
            return recording.borrowed.setdefault(name, map_tensors(torch.clone, value))
        value = super().get(name, first, count, make)
        recording.made[name] = value
        return value


class TapedSums(Sums):
    """Keeps what is logged, in order."""

    def __init__(self, tape: Tape, kept: list[tuple[str, Tensor, float]]) -> None:
        super().__init__()
        self._tape, self._kept = tape, kept

    def add(self, name: str, value: Tensor | float, weight: float) -> None:
        if isinstance(value, (int, float)):
            self._tape.problem(f"logs {name!r} as a number of Python's")
            tensor = torch.tensor(float(value))
        else:
            tensor = value.detach()
        self._kept.append((name, tensor, weight))


@dataclass
class TapedContext(PhaseContext):
    """A context whose doors lead to a tape."""

    tape: Any = None

    def schedule(self, make: Callable[[Progress], float]) -> Tensor:
        def door(context: PhaseContext) -> Tensor:
            return PhaseContext.schedule(context, make)

        return self.tape.value("schedule", door)

    def decide(self, make: Callable[[Draws, Progress], H], draws: Draws | None = None) -> H:
        place = Place.of(self.draws if draws is None else draws, self.tape.origin.draws)
        return self.tape.decision(lambda context: make(place.at(context.draws), context.progress))


def taped(context: PhaseContext, recording: Recording, playing: bool) -> PhaseContext:
    """A context that records, or plays."""
    tape = Tape(recording, context, playing)
    return TapedContext(
        HiddenProgress(tape), context.config, context.models, context.device, context.count, context.chunk,
        context.first, RecordingDraws.of(tape), recording.real, TapedShared(tape),
        TapedSums(tape, recording.logged), TapedSums(tape, recording.counted), context._scale, context._autocast, tape,
    )  # type: ignore[arg-type]  # fmt: skip


class PhaseGraphs(Recorder):
    """Runs phases: see :class:`~facelab.recording.Recorder`."""

    kind = "phase"

    def begin(self, context: PhaseContext) -> Recording:
        """With the real batch in memory of its own."""
        return Recording(real=context.real if context.real is None else map_tensors(torch.clone, context.real))

    def taped(self, context: PhaseContext, recording: Any, playing: bool) -> PhaseContext:
        """See :func:`taped`."""
        return taped(context, recording, playing)
