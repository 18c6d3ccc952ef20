# SPDX-License-Identifier: Apache-2.0
"""Steps of an optimisation as CUDA graphs: scene, renderings, losses and their derivatives (:mod:`facelab.recording`).

The optimiser's step, the guard against NaN and what is kept of a step stay outside. Numbers are those of a step without
a graph, up to the order in which atomic additions on a GPU happen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from facelab.generator import GeneratorOutput
from facelab.inversion.clock import Clock
from facelab.recording import Recorder, Recording, RecordingDraws, Tape, Ungraphable
from facelab.tensors import map_tensors

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Found:
    """What a step computes, detached.

    Attributes:
        total: (N,) the loss; parts: (N,) each term, unweighted.
        seen: what was rendered from the target's cameras, or None; shared: pictures that losses shared, by name.
        largest: the largest entry of loss and derivatives, NaN where one is NaN.
        gradients: of the sum of ``total``, one for each variable; those of a graph are overwritten by its next step.
    """

    total: Tensor
    parts: dict[str, Tensor]
    seen: GeneratorOutput | None
    shared: dict[str, Tensor]
    largest: Tensor
    gradients: list[Tensor]


class TapedClock(Clock):
    """A clock whose doors lead to a tape."""

    def __init__(self, tape: Tape) -> None:
        origin = tape.origin
        values = {"steps": origin.steps, "draws": RecordingDraws.of(tape), "device": origin.device, "tape": tape}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    tape: Tape

    @property
    def step(self) -> int:  # type: ignore[override]
        """What a recording does not know."""
        self.tape.problem("reads the step; use moment.host or moment.decide, whose functions are given it")
        return self.tape.origin.step

    def host(self, make: Callable[[Clock], T]) -> T:
        """In memory that is refilled at each step."""
        return self.tape.value("host", lambda clock: map_tensors(_own, clock.host(make)))

    def decide(self, make: Callable[[Clock], H]) -> H:
        """Another answer is another recording."""
        return self.tape.decision(make)

    def beside(self, value: T, what: str) -> Callable[[], T]:
        """Ends the recording when it is asked."""

        def refuse() -> NoReturn:
            raise Ungraphable(what)

        return refuse


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class StepRecording(Recording):
    """Results leave the recorded memory, but for derivatives."""

    def deliver(self, context: Clock) -> Found:
        """See :class:`Found`."""
        found: Found = self.result
        gradients = found.gradients
        return replace(map_tensors(torch.clone, replace(found, gradients=[])), gradients=gradients)


class StepGraphs(Recorder):
    """Runs steps: see :class:`~facelab.recording.Recorder`."""

    kind = "stage"
    pure = True

    def begin(self, context: Clock) -> StepRecording:
        """Empty."""
        return StepRecording()

    def taped(self, context: Clock, recording: Recording, playing: bool) -> TapedClock:
        """A clock that records, or plays."""
        return TapedClock(Tape(recording, context, playing))


def warn(text: str) -> None:
    """As a Python warning."""
    warnings.warn(text, stacklevel=2)


def step_graphs(wanted: bool, device: torch.device, say: Callable[[str], None]) -> StepGraphs | None:
    """What plays the steps of a stage on a GPU; None: nothing, each step runs by itself."""
    return StepGraphs(True, say) if wanted and device.type == "cuda" else None
