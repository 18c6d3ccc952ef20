# SPDX-License-Identifier: Apache-2.0
"""Phases as CUDA graphs: the thousands of small kernels of a chunk are queued once and played back at every step.

A step of a small network spends most of its time on the CPU, which queues kernels one by one. A graph queues them all at
once, but repeats exactly what was recorded: the same Python branches, the same memory. So whatever differs from step to
step comes in through few doors, each of which can be refilled:

- random numbers, :class:`RecordingDraws`: drawn into the recorded memory, the same numbers as without a graph;
- tensors made on the CPU, ``ctx.host`` and ``ctx.schedule``: made anew and copied;
- what Python branches on, ``ctx.decide``: decided anew; another answer is another recording;
- the real batch and what phases share: copied.

A phase that reaches for anything else (``ctx.progress``, draws on the CPU outside of ``ctx.host``) runs without a graph,
and the log says why. Gradients are added to the trainer's flat buffer as ever; reduction, clipping, optimisers and
averages stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from facelab.draws import Draws
from facelab.tensors import map_tensors, moved, tensors_of
from facelab.training.phases import PhaseContext, SharedResults, Sums
from facelab.training.schedule import Progress

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
WARM = 3  # runs without a graph before one is recorded: libraries choose their kernels, allocators their blocks
RECORDINGS = 6  # of a phase and chunk that are kept, with different decisions
Work = Callable[[PhaseContext], None]


class Ungraphable(Exception):
    """A phase needs something that a recording cannot refill; the text says what."""


@dataclass(frozen=True)
class Place:
    """Where draws stand in relation to those of the context: what is refilled at another step."""

    phase: str
    chunk: int | None

    @classmethod
    def of(cls, draws: Draws, origin: Draws) -> Place:
        return cls(draws.phase, None if draws.chunk == origin.chunk else draws.chunk)

    def at(self, origin: Draws) -> Draws:
        """The same place of another step."""
        return origin.at(phase=self.phase, chunk=self.chunk)


@dataclass
class Recording:
    """What one run of a phase asked for, in order, with the memory that it got.

    Attributes:
        inputs: (what is asked for, how it is made, the tensors that it was given).
        decisions: how each is decided, and the answer.
        borrowed: results of other phases by name, and the tensors that stand for them.
        made: results for other phases that this one makes.
        logged, counted: what was logged: (name, tensor, weight).
        problem: why this phase cannot be a graph.
    """

    inputs: list[tuple[Hashable, Callable[[PhaseContext], Any], Any]] = field(default_factory=list)
    decisions: list[tuple[Callable[[PhaseContext], Hashable], Hashable]] = field(default_factory=list)
    borrowed: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    logged: list[tuple[str, Tensor, float]] = field(default_factory=list)
    counted: list[tuple[str, Tensor, float]] = field(default_factory=list)
    problem: str | None = None
    real: Any = None

    def fits(self, context: PhaseContext) -> bool:
        """Whether Python would take the same branches now."""
        present = {name for name, first in context._shared.values if first == context.first}
        if not self.borrowed.keys() <= present or self.made.keys() & present:
            return False
        return all(make(context) == answer for make, answer in self.decisions)

    def refill(self, context: PhaseContext) -> None:
        """The numbers of this step into the recorded memory."""
        if self.real is not None:
            copy_tensors(self.real, context.real)
        for name, stored in self.borrowed.items():
            copy_tensors(stored, context._shared.values[name, context.first][1])
        for _, make, stored in self.inputs:
            copy_tensors(stored, make(context))

    def forget_results(self) -> None:
        """Before the phase runs once more: what was logged and made is that of the new run."""
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


@torch.no_grad()
def copy_tensors(target: Any, source: Any) -> None:
    """The tensors of one value into those of another that was made in the same way."""
    into, come = tensors_of(target), tensors_of(source)
    if [t.shape for t in into] != [t.shape for t in come]:
        raise Ungraphable(f"shapes change: {[tuple(t.shape) for t in into]} to {[tuple(t.shape) for t in come]}")
    for old, new in zip(into, come, strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new if new.device == old.device else moved(new, old.device))


# ---------------------------------------------------------------- the doors


class Tape:
    """Records what a run asks for, or plays it back from recorded memory."""

    def __init__(self, recording: Recording, context: PhaseContext, playing: bool) -> None:
        self.recording, self.origin, self.playing = recording, context, playing
        self._place = self._decided = 0

    def problem(self, text: str) -> None:
        """Note why there can be no graph; in a recording that is played it is an error."""
        if self.playing:
            raise Ungraphable(text)
        self.recording.problem = self.recording.problem or text

    def value(self, what: Hashable, make: Callable[[PhaseContext], T]) -> T:
        """The next input."""
        if not self.playing:
            result = make(self.origin)
            self.recording.inputs.append((what, make, result))
            return result
        if self._place == len(self.recording.inputs) or self.recording.inputs[self._place][0] != what:
            raise Ungraphable(f"asked for {what} out of order")
        self._place += 1
        return self.recording.inputs[self._place - 1][2]

    def decision(self, make: Callable[[PhaseContext], H]) -> H:
        """The next answer."""
        if not self.playing:
            self.recording.decisions.append((make, make(self.origin)))
            return self.recording.decisions[-1][1]  # type: ignore[return-value]
        if self._decided == len(self.recording.decisions):
            raise Ungraphable("decides more than before")
        self._decided += 1
        return self.recording.decisions[self._decided - 1][1]  # type: ignore[return-value]


@dataclass(frozen=True)
class RecordingDraws(Draws):
    """The draws of a run that is recorded or played."""

    tape: Tape | None = None

    def _real(self) -> Draws:
        return Draws(self.seed, self.step, self.phase, self.chunk)

    def _door(self, kind: str, name: str, shape: Sequence[int], device: torch.device | str, dtype: Any) -> Tensor:
        tape = self.tape
        assert tape is not None
        origin = tape.origin.draws
        if torch.device(device).type != tape.origin.device.type:
            tape.problem(f"draws {name!r} on {device}; use draws.host or ctx.host")
            return getattr(self._real(), kind)(name, shape, device, dtype)
        place, size = Place.of(self, origin), tuple(shape)

        def make(context: PhaseContext) -> Tensor:
            return getattr(place.at(context.draws), kind)(name, size, device, dtype)

        return tape.value((kind, place, name, size), make)

    def normal(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._door("normal", name, shape, device, dtype)

    def uniform(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._door("uniform", name, shape, device, dtype)

    def host(self, make: Callable[[Draws], T], device: torch.device | str) -> T:
        tape = self.tape
        assert tape is not None
        place = Place.of(self, tape.origin.draws)
        return tape.value(("host", place), lambda context: place.at(context.draws).host(make, device))

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        assert self.tape is not None
        self.tape.problem(f"asks for the generator {name!r}; use draws.normal, draws.uniform or draws.host")
        return self._real().generator(name, device)


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
        recording, outer = self._tape.recording, self._tape.origin._shared
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
    d = context.draws
    return TapedContext(
        HiddenProgress(tape), context.config, context.models, context.device, context.count, context.chunk,
        context.first, RecordingDraws(d.seed, d.step, d.phase, d.chunk, tape), recording.real, TapedShared(tape),
        TapedSums(tape, recording.logged), TapedSums(tape, recording.counted), context._scale, context._autocast, tape,
    )  # type: ignore[arg-type]  # fmt: skip


# ---------------------------------------------------------------- the runs


@dataclass
class Entry:
    """A phase's chunk with one set of decisions.

    Attributes:
        recording: of the latest run without a graph.
        runs: how many there were.
        graph: what is played; None before.
    """

    recording: Recording
    runs: int = 1
    graph: Any = None


class PhaseGraphs:
    """Runs phases, as graphs where they can be.

    Args:
        capture: False plays recordings back by running the phase again on the recorded memory: what a CPU can do, and
            how tests see that nothing comes in beside the doors.
        say: where a phase that cannot be a graph is reported, once.
    """

    def __init__(self, capture: bool, say: Callable[[str], None]) -> None:
        self._capture, self._say = capture, say
        self._entries: dict[Hashable, list[Entry]] = {}
        self._refused: set[Hashable] = set()
        self._pool: Any = None
        self.played = 0  # chunks so far

    def run(self, key: Hashable, context: PhaseContext, work: Work) -> None:
        """One chunk of a phase.

        Args:
            key: what the work depends on besides the context.
            work: computes the losses and adds their gradients; it changes nothing else but through the context.
        """
        if key in self._refused:
            work(context)
            return
        entries = self._entries.setdefault(key, [])
        entry = next((e for e in entries if e.recording.fits(context)), None)
        if entry is None or (entry.graph is None and entry.runs < WARM):
            self._record(key, entries, entry, context, work)
        elif entry.graph is None:
            self._make(key, entry, context, work)
        else:
            self._play(key, entry, context, work)

    def _record(self, key: Hashable, entries: list[Entry], entry: Entry | None, context: Any, work: Work) -> None:
        recording = Recording(real=context.real if context.real is None else map_tensors(torch.clone, context.real))
        work(taped(context, recording, playing=False))
        recording.deliver(context)
        if recording.problem is not None:
            self._refuse(key, recording.problem)
        elif entry is not None:
            entry.recording, entry.runs = recording, entry.runs + 1
        else:
            entries.append(Entry(recording))
            if len(entries) > RECORDINGS:  # the oldest that never became a graph, or the oldest
                entries.remove(next((e for e in entries[:-1] if e.graph is None), entries[0]))

    def _make(self, key: Hashable, entry: Entry, context: PhaseContext, work: Work) -> None:
        """Turn the latest recording into a graph, and play it."""
        recording = entry.recording
        recording.forget_results()
        try:
            entry.graph = (
                self._captured(taped(context, recording, True), work) if self._capture else Again(recording, work)
            )
        except (Ungraphable, RuntimeError) as problem:
            self._pool = None  # a capture that broke off leaves its pool unusable
            self._refuse(key, f"met: {problem}".splitlines()[0])
            work(context)
            return
        self._play(key, entry, context, work)

    def _captured(self, playing: PhaseContext, work: Work) -> Any:
        torch.cuda.synchronize(playing.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work(playing)
        return graph

    def _play(self, key: Hashable, entry: Entry, context: PhaseContext, work: Work) -> None:
        try:
            entry.recording.refill(context)
        except Ungraphable as problem:  # nothing has run yet
            self._refuse(key, f"met: {problem}")
            work(context)
            return
        if isinstance(entry.graph, Again):
            entry.graph.replay(context)
        else:
            entry.graph.replay()
        entry.recording.deliver(context)
        self.played += 1

    def _refuse(self, key: Hashable, problem: str) -> None:
        self._refused.add(key)
        self._entries.pop(key, None)
        name = key[0] if isinstance(key, tuple) else key
        self._say(f"phase {name} runs without a CUDA graph: it {problem}")


@dataclass
class Again:
    """A graph's double: runs the phase once more on recorded memory, blind to anything that did not come by a door."""

    recording: Recording
    work: Work

    def replay(self, context: PhaseContext) -> None:
        """Run it; ``context`` is only where the phase finds its networks."""
        self.recording.forget_results()
        with NoTraffic():
            self.work(taped(replace(context), self.recording, playing=True))


class NoTraffic(TorchFunctionMode):
    """Refuses what a CUDA graph cannot hold and a CPU would not mind: tensors made of Python's numbers."""

    COMING = frozenset((torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.COMING and not (args and isinstance(args[0], Tensor)):
            raise Ungraphable(f"makes a tensor of numbers in {func.__name__}; use facelab.tensors.constant")
        return func(*args, **(kwargs or {}))
