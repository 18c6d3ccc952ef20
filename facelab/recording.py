# SPDX-License-Identifier: Apache-2.0
"""Work that is repeated with other numbers, recorded once as a CUDA graph and played back.

A step of a small network spends most of its time on the CPU, which queues kernels one by one. A graph queues them all at
once, but repeats exactly what was recorded: the same Python branches, the same memory. So whatever differs from step to
step comes in through few doors of the context that the work is given, each of which leads to a :class:`Tape`:

- random numbers, :class:`RecordingDraws`: drawn into the recorded memory, the same numbers as without a graph;
- tensors made on the CPU (``host``): made anew and copied;
- what Python branches on (``decide``): decided anew; another answer is another recording.

Work that reaches for anything else runs without a graph, and one line says why. :mod:`facelab.training.graphs` records
phases of training with it, :mod:`facelab.inversion.recorded` steps of inversions.
"""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from facelab.draws import Draws
from facelab.tensors import moved, tensors_of

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
WARM = 3  # runs without a graph before one is recorded: libraries choose their kernels, allocators their blocks
RECORDINGS = 6  # of one key that are kept, with different decisions


class Ungraphable(Exception):
    """The work needs something that a recording cannot refill; the text says what."""


class Context(Protocol):
    """What work is given: random numbers, where it runs, and doors of its own."""

    @property
    def draws(self) -> Draws: ...

    @property
    def device(self) -> torch.device: ...


Work = Callable[[Any], Any]  # context -> result


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
    """What one run asked for, in order, with the memory that it got.

    Attributes:
        inputs: (what is asked for, how it is made, the tensors that it was given).
        decisions: how each is decided, and the answer.
        problem: why this cannot be a graph.
        result: what the work returned.
    """

    inputs: list[tuple[Hashable, Callable[[Any], Any], Any]] = field(default_factory=list)
    decisions: list[tuple[Callable[[Any], Hashable], Hashable]] = field(default_factory=list)
    problem: str | None = None
    result: Any = None

    def fits(self, context: Any) -> bool:
        """Whether Python would take the same branches now."""
        return all(make(context) == answer for make, answer in self.decisions)

    def refill(self, context: Any) -> None:
        """The numbers of this step into the recorded memory."""
        for _, make, stored in self.inputs:
            copy_tensors(stored, make(context))

    def forget_results(self) -> None:
        """Before the work runs once more: the results are those of the new run."""
        self.result = None

    def deliver(self, context: Any) -> Any:
        """What the caller gets of a run, in memory of its own."""
        return self.result


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

    def __init__(self, recording: Recording, context: Any, playing: bool) -> None:
        self.recording, self.origin, self.playing = recording, context, playing
        self.over = False  # the run has ended
        self._place = self._decided = 0

    def problem(self, text: str) -> None:
        """Note why there can be no graph; in a recording that is played it is an error."""
        if self.playing or self.over:
            raise Ungraphable(text)
        self.recording.problem = self.recording.problem or text

    def value(self, what: Hashable, make: Callable[[Any], T]) -> T:
        """The next input."""
        if self.over:
            raise Ungraphable(
                "asks draws of a run that has ended; functions given to host() are given draws of their own"
            )
        if not self.playing:
            result = make(self.origin)
            self.recording.inputs.append((what, make, result))
            return result
        if self._place == len(self.recording.inputs) or self.recording.inputs[self._place][0] != what:
            raise Ungraphable(f"asked for {what} out of order")
        self._place += 1
        return self.recording.inputs[self._place - 1][2]

    def decision(self, make: Callable[[Any], H]) -> H:
        """The next answer."""
        if not self.playing:
            self.recording.decisions.append((make, make(self.origin)))
            return self.recording.decisions[-1][1]  # type: ignore[return-value]
        if self._decided == len(self.recording.decisions):
            raise Ungraphable("decides more than before")
        self._decided += 1
        return self.recording.decisions[self._decided - 1][1]  # type: ignore[return-value]


class RecordingDraws(Draws):
    """The draws of a run that is recorded or played."""

    tape: Tape

    def __init__(self, seed: int, phase: str, chunk: int, tape: Tape) -> None:
        for name, value in (("seed", seed), ("phase", phase), ("chunk", chunk), ("tape", tape)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, tape: Tape) -> RecordingDraws:
        """Those of the tape's context."""
        draws = tape.origin.draws
        return cls(draws.seed, draws.phase, draws.chunk, tape)

    @property
    def step(self) -> int:  # type: ignore[override]
        """What a recording does not know."""
        self.tape.problem("reads draws.step; use draws.host, whose function is given the draws of each step")
        return self.tape.origin.draws.step

    def at(self, *, step: int | None = None, phase: str | None = None, chunk: int | None = None) -> RecordingDraws:
        """The same source at another place of the step."""
        if step is not None:
            self.tape.problem("asks for draws of another step")
        phase, chunk = self.phase if phase is None else phase, self.chunk if chunk is None else chunk
        return RecordingDraws(self.seed, phase, chunk, self.tape)

    def _real(self) -> Draws:
        origin = self.tape.origin.draws
        return Place.of(self, origin).at(origin)

    def _elsewhere(self, device: torch.device | str) -> bool:
        there, here = torch.device(device), self.tape.origin.device
        return there.type != here.type or (None not in (there.index, here.index) and there.index != here.index)

    def _door(self, kind: str, name: str, shape: Sequence[int], device: torch.device | str, dtype: Any) -> Tensor:
        tape = self.tape
        if self._elsewhere(device):
            tape.problem(f"draws {name!r} on {device}; use draws.host")
            return getattr(self._real(), kind)(name, shape, device, dtype)
        place, size = Place.of(self, tape.origin.draws), tuple(shape)

        def make(context: Context) -> Tensor:
            return getattr(place.at(context.draws), kind)(name, size, device, dtype)

        return tape.value((kind, place, name, size), make)

    def normal(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._door("normal", name, shape, device, dtype)

    def uniform(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return self._door("uniform", name, shape, device, dtype)

    def host(self, make: Callable[[Draws], T], device: torch.device | str) -> T:
        if self._elsewhere(device):
            self.tape.problem(f"works on {device}, beside {self.tape.origin.device}")
        place = Place.of(self, self.tape.origin.draws)
        return self.tape.value(("host", place), lambda context: place.at(context.draws).host(make, device))

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        self.tape.problem(f"asks for the generator {name!r}; use draws.normal, draws.uniform or draws.host")
        return self._real().generator(name, device)

    def unrepeatable(self, why: str) -> None:
        self.tape.problem(why)


# ---------------------------------------------------------------- the runs


@dataclass
class Entry:
    """Work with one set of decisions.

    Attributes:
        recording: of the latest run without a graph.
        runs: how many there were.
        graph: what is played; None before.
    """

    recording: Recording
    runs: int = 1
    graph: Any = None


class Recorder:
    """Runs work, as graphs where it can be. Subclasses say how a context is recorded, and what a recording holds.

    Args:
        capture: False plays recordings back by running the work again on the recorded memory: what a CPU can do, and
            how tests see that nothing comes in beside the doors.
        say: where work that cannot be a graph is reported, once.
    """

    kind = "step"  # what the line calls the work
    pure = False  # whether work that broke off has changed nothing, and may run anew

    def __init__(self, capture: bool, say: Callable[[str], None]) -> None:
        self._capture, self._say = capture, say
        self._entries: dict[Hashable, list[Entry]] = {}
        self._refused: set[Hashable] = set()
        self._told: set[str] = set()
        self._pool: Any = None
        self.played = 0  # runs so far

    def begin(self, context: Any) -> Recording:
        """An empty recording."""
        return Recording()

    def taped(self, context: Any, recording: Recording, playing: bool) -> Any:
        """A context that records, or plays; its ``tape`` is a :class:`Tape`."""
        raise NotImplementedError

    def run(self, key: Hashable, context: Any, work: Work) -> Any:
        """The work's result.

        Args:
            key: what the work depends on besides the context.
            work: changes nothing but through the context.
        """
        if key in self._refused:
            return work(context)
        entries = self._entries.setdefault(key, [])
        entry = next((e for e in entries if e.recording.fits(context)), None)
        if entry is None or (entry.graph is None and entry.runs < WARM):
            return self._record(key, entries, entry, context, work)
        if entry.graph is None:
            return self._make(key, entry, context, work)
        return self._play(key, entry, context, work)

    def _record(self, key: Hashable, entries: list[Entry], entry: Entry | None, context: Any, work: Work) -> Any:
        recording = self.begin(context)
        taped = self.taped(context, recording, False)
        try:
            recording.result = work(taped)
        except Ungraphable as problem:
            if not self.pure:
                raise
            self._refuse(key, str(problem))
            return work(context)
        taped.tape.over = True
        result, recording.result = recording.deliver(context), None
        if recording.problem is not None:
            self._refuse(key, recording.problem)
        elif entry is not None:
            entry.recording, entry.runs = recording, entry.runs + 1
        else:
            entries.append(Entry(recording))
            if len(entries) > RECORDINGS:  # the oldest that never became a graph, or the oldest
                entries.remove(next((e for e in entries[:-1] if e.graph is None), entries[0]))
        return result

    def _make(self, key: Hashable, entry: Entry, context: Any, work: Work) -> Any:
        """Turn the latest recording into a graph, and play it."""
        entry.recording.forget_results()
        problem = None
        try:
            entry.graph = self._captured(context, entry.recording, work) if self._capture else Again(self, entry, work)
        except (Ungraphable, RuntimeError) as found:
            problem = reason(found)
        if problem is not None:  # outside of the handler, which holds on to the memory of what broke off
            self._pool = None  # a capture that broke off leaves its pool unusable
            self._refuse(key, f"met: {problem}")
            return work(context)
        return self._play(key, entry, context, work)

    def _captured(self, context: Any, recording: Recording, work: Work) -> Any:
        playing = self.taped(context, recording, True)
        gc.collect()  # derivatives of earlier runs that cycles keep alive belong to another stream
        with torch.cuda.device(context.device):
            torch.cuda.synchronize()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = _capture_stream(torch.cuda.current_device())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                recording.result = work(playing)
        return graph

    def _play(self, key: Hashable, entry: Entry, context: Any, work: Work) -> Any:
        running = False
        try:
            entry.recording.refill(context)
            running = True
            if isinstance(entry.graph, Again):
                entry.graph.replay(context)
            else:
                with torch.cuda.device(context.device):
                    entry.graph.replay()
        except Ungraphable as problem:
            if running and not self.pure:
                raise
            self._refuse(key, f"met: {problem}")
            return work(context)
        self.played += 1
        return entry.recording.deliver(context)

    def _refuse(self, key: Hashable, problem: str) -> None:
        self._refused.add(key)
        self._entries.pop(key, None)
        name = key[0] if isinstance(key, tuple) else key
        line = f"{self.kind} {name} runs without a CUDA graph: it {problem}"
        if line not in self._told:  # other chunks of a phase have the same problem
            self._told.add(line)
            self._say(line)


@functools.lru_cache
def _capture_stream(device: int) -> Any:
    """One for all captures on a device: libraries keep a workspace for each stream that they ever saw."""
    return torch.cuda.Stream(device)


@dataclass
class Again:
    """A graph's double: runs the work once more on recorded memory, blind to anything that did not come by a door."""

    owner: Recorder
    entry: Entry
    work: Work

    def replay(self, context: Any) -> None:
        """Run it; ``context`` is only where the work finds what stays."""
        self.entry.recording.forget_results()
        with NoTraffic():
            self.entry.recording.result = self.work(self.owner.taped(context, self.entry.recording, True))


class NoTraffic(TorchFunctionMode):
    """Refuses what a CUDA graph cannot hold and a CPU would not mind: tensors made of Python's numbers."""

    COMING = frozenset((torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = args[1:] if func is Tensor.new_tensor else args
        if func in self.COMING and not (numbers and isinstance(numbers[0], Tensor)):
            raise Ungraphable(f"makes a tensor of numbers in {func.__name__}; use facelab.tensors.constant")
        return func(*args, **(kwargs or {}))


def reason(problem: BaseException) -> str:
    """One line: the first error of a chain (the end of a capture that broke off raises another), and where it arose."""
    while problem.__context__ is not None:
        problem = problem.__context__
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if "/torch/" not in f.filename]
    return f"{lines[0]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else lines[0]
