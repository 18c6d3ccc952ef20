# SPDX-License-Identifier: Apache-2.0
"""The one training loop. A method says what is trained by which losses; everything else happens here.

One iteration: for each phase due, freeze what it does not train, back-propagate its losses chunk by chunk, sum the
gradients over processes, judge, clip, step; then the loss scale, the averages, the log. Samples, chunks and random
numbers are numbered across processes, so one process and several compute the same step, and a resumed run goes on
as if it had never stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.config import StagedConfig, save_resolved
from facelab.data.samplers import rank_chunks
from facelab.draws import Draws
from facelab.errors import UserError, nearest
from facelab.files import make_folder
from facelab.training import checkpointing
from facelab.training.checkpointing import Parts, Position
from facelab.training.config import check_shares, global_batch, sections
from facelab.training.distributed import DelayedFlag, Distributed
from facelab.training.ema import Ema
from facelab.training.feed import Feed, chunk_of
from facelab.training.gradients import FlatGradients, GradientArena, NanWatch
from facelab.training.graphs import PhaseGraphs
from facelab.training.logging import Logger, PhaseTimer, Throughput, peak_memory
from facelab.training.optimizers import PhaseOptimizer
from facelab.training.phases import AfterPhase, Phase, PhaseContext, SharedResults, Sums
from facelab.training.precision import LossScale, autocast, device_switches
from facelab.training.protocol import EmaSpec, Trainable, TrainStage
from facelab.training.schedule import Progress
from facelab.training.signals import StopRequest, exit_code


class TrainingDiverged(UserError):
    """Gradients were not finite for several steps in a row; the last good state has been saved."""


class Callback:
    """Hooks of a run, called on every process; write files only where ``trainer.distributed.is_main``."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first iteration, networks built or resumed."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After a line of the log."""

    def on_samples(self, trainer: Trainer) -> None:
        """Every ``log.samples_every`` steps."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last iteration and its checkpoint."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended: ``finished`` or ``interrupted`` by a signal (0 if none), after ``step`` steps."""

    step: int
    finished: bool
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0, 130 after Ctrl-C, 143 after SIGTERM."""
        return exit_code(self.signal)


class Trainer:
    """Trains one stage of a method.

    Args:
        method: what is trained.
        config: its configuration with all curriculum rows.
        run_dir: where checkpoints, ``log.jsonl`` and ``config.yaml`` go.
        distributed: this process among those of the run.
        callbacks: hooks.
        stage: name of the training stage; None = the method's first.
        resume: None = a fresh run, ``"auto"`` = go on if the folder holds a checkpoint, or a path.
        allow_config_change: resume although settings differ.
        resume_may_change: further settings that may differ (the place of the data).
        meta: stored in every checkpoint (deviations in force, sources).

    Attributes:
        models, averages, optimizers, scale: the state; ``config`` is the curriculum row in force.
        position: steps and images so far.

    Raises:
        UserError: anything the user can mend: batch and processes, another configuration, a damaged checkpoint.
    """

    def __init__(
        self,
        method: Trainable,
        config: StagedConfig,
        run_dir: str | Path,
        distributed: Distributed | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        stage: str | None = None,
        resume: str | Path | None = None,
        allow_config_change: bool = False,
        resume_may_change: tuple[str, ...] = (),
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.method, self.staged, self.run_dir = method, config, Path(run_dir)
        self.distributed = distributed or Distributed()
        self.device = self.distributed.device
        self.callbacks = list(callbacks)
        self.config = config.at(0)
        self.train, self.checkpoint, self.log = sections(self.config)
        self.distributed.on_main(lambda: make_folder(self.run_dir))
        self.stage = _find_stage(method.stages(self.config), stage)
        self.meta = {**(meta or {}), "method": method.name, "stage": self.stage.name}
        found = self.distributed.on_main(
            lambda: checkpointing.find_resume(self.run_dir, resume, self.distributed.restarts)
        )
        self._build(fresh=found is None)
        self.position = Position(processes=self.distributed.world)
        if found is not None:
            self.position = checkpointing.restore_run(
                found, self._parts, config, self.meta, self.distributed, allow_config_change, resume_may_change
            )
        self.resumed_from = found
        self.row = len(self.position.starts) - 1
        self._check_batches()
        self._configure()
        self._sums, self._shared, self._frozen_for = Sums(), SharedResults(), ()
        self._timer, self._speed = PhaseTimer(self.device), Throughput()
        self._nan = NanWatch(1 if self.train.nan == "stop" else self.train.nan_limit, self.device)
        self._feed: Feed | None = None
        self._beside_bar: dict[str, None] = {}  # names of losses, in order

    # --- set-up

    def _build(self, fresh: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            self.models = self.method.build(self.config)
        if fresh and self.stage.init_from is not None:
            self.stage.init_from(self.models)
        for model in self.models.values():
            model.to(self.device).train()
        if fresh:
            tensors = [t.data for m in self.models.values() for t in (*m.parameters(), *m.buffers())]
            self.distributed.broadcast_tensors_(tensors)
        warmup = self.stage.warmup.phases if self.stage.warmup else ()
        self.phases = (*self.stage.phases, *warmup)
        _check_phases(self.phases, self.models)
        specs = self.method.optimizers(self.config)
        by_optimizer: dict[str, list[Phase]] = {}
        for phase in self.phases:
            by_optimizer.setdefault(phase.optimizer, []).append(phase)
        missing = set(by_optimizer) - set(specs)
        if missing:
            raise ValueError(f"phases name the optimizers {sorted(missing)}, the method has {sorted(specs)}")
        self.optimizers = {n: PhaseOptimizer(n, specs[n], self.models, ps) for n, ps in by_optimizer.items()}
        self.scale = LossScale(self.train.precision == "fp16", self.device, self.train.loss_scale)
        self._ema_specs = dict(self.method.emas(self.config))
        clash = set(self._ema_specs) & set(self.models)
        if clash:
            raise ValueError(f"{sorted(clash)} name both a network and an average")
        self.averages = {name: self._average(spec) for name, spec in self._ema_specs.items()}
        self._arena = GradientArena()
        graphs = sections(self.config)[0].cuda_graphs
        self._graphs = PhaseGraphs(self.device.type == "cuda", lambda text: self.logger.say(text)) if graphs else None
        self._gradients: dict[str, FlatGradients] = {}

    def _average(self, spec: EmaSpec) -> Ema:
        decay = spec.decay
        schedule = (lambda n: decay(self.progress())) if callable(decay) else decay
        return Ema(self.models[spec.model], schedule, spec.buffers)

    @property
    def _parts(self) -> Parts:
        averaged = {name: spec.model for name, spec in self._ema_specs.items()}
        return Parts(self.models, self.averages, averaged, self.optimizers, self.scale)

    def _check_batches(self) -> None:
        world = self.distributed.world
        for config in self.staged.stages:
            train = sections(config)[0]
            size = global_batch(train, self.position.processes)
            check_shares(size, train.batch_chunk, world)
            for phase in self.phases:
                if phase.chunk is not None:
                    check_shares(size, phase.chunk(config), world, f"the chunk of phase {phase.name}")

    def _configure(self) -> None:
        """Take over the curriculum row in force."""
        self.config = self.staged.stages[self.row]
        self.train, self.checkpoint, self.log = sections(self.config)
        self.batch_size = global_batch(self.train, self.position.processes)
        for name, spec in self.method.optimizers(self.config).items():
            if name in self.optimizers:
                self.optimizers[name].configure(spec)

    @property
    def warming_up(self) -> bool:
        return self.stage.warmup is not None and self.position.warmup_step < self.stage.warmup.steps

    def progress(self) -> Progress:
        """Where the run stands, for schedules."""
        place, warm = self.position, self.warming_up
        step = place.warmup_step if warm else place.step
        starts, rows = tuple(place.starts), self.staged.stages
        return Progress(step, place.images, self.batch_size, self.row, starts, rows, warm)

    # --- the run

    def run(self) -> RunResult:
        """Train to ``train.max_steps``, or until a signal.

        Raises:
            TrainingDiverged: not finite for ``nan_limit`` steps in a row.
            UserError: a file cannot be written, a data file is damaged.
        """
        first = sections(self.staged.at(0))[0]
        self._last_step, main = first.max_steps, self.distributed.is_main
        place = self.position
        self._stop = 0
        with ExitStack() as stack:
            stack.enter_context(device_switches(first.precision, self.device))
            request = stack.enter_context(StopRequest(announce=main))
            logger = Logger(self.run_dir, self.log, main, self._last_step, place.step, place.warmup_step)
            self.logger = stack.enter_context(logger)
            stack.callback(self._close_feed)
            self.distributed.on_main(lambda: save_resolved(self.staged, self.run_dir / "config.yaml"))
            self._announce()
            self._call("on_start")
            agreed = DelayedFlag(self.distributed)
            while place.step < self._last_step and not self._stop:
                self._iterate()
                self._stop = agreed.exchange(request.requested)
                self._housekeep()
            agreed.close()
            self._call("on_end")
        return RunResult(place.step, place.step >= self._last_step, self._stop)

    def _iterate(self) -> None:
        place = self.position
        warm = self.warming_up
        if not warm and (row := self.staged.stage_index(place.step, place.images)) > self.row:
            place.starts += [(place.step, place.images)] * (row - self.row)
            self.row = row
            self._configure()
            self._close_feed()
            self.logger.say(f"step {place.step}: curriculum row {row} of {len(self.staged.stages) - 1}")
        phases = self.stage.warmup.phases if warm and self.stage.warmup else self.stage.phases
        progress = self.progress()
        real = self._real(phases, progress)
        for phase in phases:
            if progress.step % phase.every == 0:
                begin = self._timer.start()
                self._run_phase(phase, progress, real if phase.real else None)
                self._timer.stop(phase.name, begin)
        self._shared.clear()
        self._nan.end_step(self.scale)
        self.scale.update()
        if warm:
            self._end_warmup_step()
        else:
            for name, average in self.averages.items():
                average.update(self.models[self._ema_specs[name].model])
            place.step += 1
            place.images += self.batch_size
        self._speed.count(self.batch_size)

    def _end_warmup_step(self) -> None:
        self.position.warmup_step += 1
        if not self.warming_up:
            self._close_feed()  # the data start at their first image again
            self.averages = {name: self._average(spec) for name, spec in self._ema_specs.items()}

    def _real(self, phases: Iterable[Phase], progress: Progress) -> Any:
        """This process's real samples of the step; None if no phase wants any."""
        if not any(phase.real for phase in phases):
            return None
        if self._feed is None:
            source = self.method.dataset(self.config)
            if source is None:
                raise ValueError("a phase has real=True, but the method's dataset is None")
            start = progress.step * self.batch_size if progress.warmup else progress.images
            world, rank = self.distributed.world, self.distributed.rank
            self._feed = Feed(source, start, self.batch_size, rank, world, self.train.workers, self.device)
        return self._feed.next()

    def _close_feed(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._feed = None

    # --- one phase

    def _run_phase(self, phase: Phase, progress: Progress, real: Any) -> None:
        gradients = self._prepare(phase)
        size = phase.chunk(self.config) if phase.chunk else self.train.batch_chunk
        chunks = rank_chunks(self.batch_size, size, self.distributed.rank, self.distributed.world)
        # a mean over the batch, or the sum of the chunk means of each process of the original's kind of run
        weight = size / self.batch_size if phase.reduction == "mean" else 1.0 / self.position.processes
        statistics = Sums()
        for place, chunk in enumerate(chunks):
            part = real
            if real is not None and len(chunks) > 1:
                part = chunk_of(real, place * size, size)
            context = self._context(phase, progress, chunk, size, part, statistics)
            work = functools.partial(self._backward, phase, weight=weight * phase.every)
            with device_switches(phase.precision(self.train.precision), self.device):
                if self._graphs is None:
                    work(context)
                else:
                    key = (phase.name, chunk, size, self.row, gradients.flat.data_ptr())
                    self._graphs.run(key, context, work)
        self.distributed.sum_(gradients.flat)
        replace = self.train.nan == "reference" and not self.scale.enabled
        norm, bad = gradients.finish(self.scale.scale, self.train.grad_clip, replace)
        self.optimizers[phase.optimizer].step(bad)
        gradients.detach()
        self.scale.record(bad)
        self._nan.record(phase.name, bad)
        self._sums.add(f"grad_norm/{phase.name}", norm, size * len(chunks))
        self._sums.add(f"skipped/{phase.name}", bad, size * len(chunks))
        if phase.after is not None:
            self._after(phase, progress, statistics, 1.0 - bad)

    def _prepare(self, phase: Phase) -> FlatGradients:
        """Freeze what the phase does not train, zero the gradients of what it trains."""
        if phase.name not in self._gradients:
            trained = self.optimizers[phase.optimizer].parameters
            mine = [p for _, p in self.models.named_parameters(phase.trains) if id(p) in trained]
            if not mine:
                raise ValueError(f"phase {phase.name!r} trains no parameter of optimizer {phase.optimizer!r}")
            self._gradients[phase.name] = FlatGradients(mine, self._arena)
        gradients = self._gradients[phase.name]
        if self._frozen_for != (phase.trains, phase.optimizer):
            wanted = {id(p) for p in gradients.parameters}
            for _, parameter in self.models.named_parameters():
                parameter.requires_grad_(id(parameter) in wanted)
            self._frozen_for = (phase.trains, phase.optimizer)
        gradients.attach()
        return gradients

    def _context(
        self, phase: Phase, progress: Progress, chunk: int, size: int, real: Any, statistics: Sums
    ) -> PhaseContext:
        name = f"warmup/{phase.name}" if progress.warmup else phase.name
        draws = Draws(self.train.seed, progress.step, name, chunk)
        logged = _Prefixed(self._sums, phase.name)
        cast = functools.partial(autocast, phase.precision(self.train.precision), self.device)
        return PhaseContext(
            progress, self.config, self.models, self.device, size, chunk, chunk * size, draws, real,
            self._shared, logged, statistics, self.scale.scale, cast,
        )  # fmt: skip

    def _backward(self, phase: Phase, context: PhaseContext, weight: float) -> None:
        losses = iter(phase.losses(context))
        while True:
            with autocast(phase.precision(self.train.precision), self.device):
                item = next(losses, None)
            if item is None:
                return
            name, loss = item
            del item
            if loss.ndim:
                raise ValueError(f"phase {phase.name!r}: loss {name!r} must be a scalar, got {tuple(loss.shape)}")
            context.log(name, loss)
            self._beside_bar[f"{phase.name}/{name}"] = None
            if loss.requires_grad:
                (loss.float() * (weight * self.scale.scale)).backward()
            del loss

    def _after(self, phase: Phase, progress: Progress, statistics: Sums, accepted: Tensor) -> None:
        means = {}
        for name in sorted(statistics.totals):
            means[name] = self.distributed.sum_(statistics.totals[name]) / self.batch_size
            accepted = accepted * torch.isfinite(means[name]).all()
        assert phase.after is not None
        phase.after(AfterPhase(progress, self.config, self.models, means, accepted))

    # --- between iterations

    def _housekeep(self) -> None:
        place = self.position
        self.logger.tick(place.step)
        bad = self._nan.exceeded()
        counter = place.warmup_step if self.warming_up else place.step
        end = bool(bad or self._stop or place.step >= self._last_step)
        if counter % self.log.every == 0 or end:
            self._write_log()
        if not self.warming_up and self.log.samples_every and (place.step % self.log.samples_every == 0 or end):
            self._call("on_samples")
        if counter % self.checkpoint.every == 0 or end:
            self.save()
        if bad:
            raise TrainingDiverged(
                f"stopped after step {place.step}: gradients of {', '.join(bad)} were not finite for {self._nan.limit} "
                f"steps in a row; the state before them is saved in {self.run_dir}, lower the learning rate or use "
                "train.precision=fp32"
            )
        if self._stop:
            self.logger.say(f"stopped by a signal after step {place.step}, saved; go on with --resume auto")

    def save(self) -> Path:
        """Write a checkpoint now; all processes must call it."""
        folder = checkpointing.save_run(
            self.run_dir, self._parts, self.position, self.staged, self.checkpoint, self.distributed, self.meta
        )
        self._call("on_checkpoint", folder)
        return folder

    def _write_log(self) -> None:
        place = self.position
        means = self._means()
        speed = self._speed.read(self._last_step - place.step)
        metrics: dict[str, float] = {"step": place.step, "images": place.images, **means, **speed}
        if self.stage.warmup is not None:
            metrics["warmup_step"] = place.warmup_step
        metrics |= {f"seconds/{name}": seconds for name, seconds in self._timer.read().items()}
        metrics |= {f"lr/{n}": o.adam.param_groups[0]["lr"] for n, o in self.optimizers.items()}
        metrics |= {"row": self.row, **peak_memory(self.device)}
        if self.scale.enabled:
            metrics["loss_scale"] = float(self.scale.scale)
        shown = {"img/s": speed["images_per_second"], **{k: means[k] for k in self._beside_bar if k in means}}
        self.logger.write(place.step, metrics, shown)
        self._call("on_log", metrics)

    def _means(self) -> dict[str, float]:
        """What was logged since the last line, over all processes; the one wait for the device."""
        names = list(self._sums.totals)
        values = torch.stack([self._sums.totals[n].to(self.device) for n in names]).tolist() if names else []
        mine = {n: (v, self._sums.weights[n]) for n, v in zip(names, values, strict=True)}
        self._sums.clear()
        totals: dict[str, tuple[float, float]] = {}
        for part in self.distributed.gather(mine):
            for name, (value, weight) in part.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + weight)
        return {name: value / weight for name, (value, weight) in totals.items()}

    def _announce(self) -> None:
        size = sum(p.numel() for _, p in self.models.named_parameters())
        came = f"resumed from {self.resumed_from} at step {self.position.step}" if self.resumed_from else "from step 0"
        left = "" if self._last_step > self.position.step else ": nothing left to do; a larger train.max_steps goes on"
        self.logger.say(
            f"{self.method.name}, stage {self.stage.name}: {size / 1e6:.2f} M parameters, batch {self.batch_size} on "
            f"{self.distributed.world} x {self.device.type}, {self.train.precision}, {came}, to step {self._last_step}{left}"
        )

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            {
                "on_start": callback.on_start,
                "on_log": callback.on_log,
                "on_samples": callback.on_samples,
                "on_checkpoint": callback.on_checkpoint,
                "on_end": callback.on_end,
            }[hook](self, *args)


class _Prefixed(Sums):
    """Sums of a run, with the phase's name before names that have no slash."""

    def __init__(self, sums: Sums, phase: str) -> None:
        self._sums, self._phase = sums, phase

    def add(self, name: str, value: Tensor | float, weight: float) -> None:
        self._sums.add(name if "/" in name else f"{self._phase}/{name}", value, weight)


def _find_stage(stages: Sequence[TrainStage], name: str | None) -> TrainStage:
    names = {stage.name: stage for stage in stages}
    if name is None:
        return stages[0]
    if name not in names:
        raise UserError(f"no training stage {name!r}.{nearest(name, names)} Stages: {', '.join(names)}")
    return names[name]


def _check_phases(phases: Sequence[Phase], models: Iterable[str]) -> None:
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"phases need different names, got {names}")
    known = set(models)
    for phase in phases:
        if set(phase.trains) - known:
            raise ValueError(
                f"phase {phase.name!r} trains {sorted(set(phase.trains) - known)}, models: {sorted(known)}"
            )
