# SPDX-License-Identifier: Apache-2.0
"""train_<method>: curricula, processes, resuming, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import OneLineCommand, friendly
from facelab.option_types import FiniteFloat

if TYPE_CHECKING:
    from facelab.training.distributed import Distributed


TICK_KIMG = 4.0  # of EG3D's original: thousand images from one line of the log to the next


@dataclass(frozen=True)
class Job:
    """What every process of a run is told; plain data, so that it can be sent to spawned processes."""

    method: str
    config: dict[str, Any]
    run_dir: str
    stage: str | None = None
    resume: str | None = None
    init_from: str | None = None
    fresh_discriminators: bool = False
    allow_config_change: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


def train_command(method: str, default_curriculum: str) -> click.Command:
    """The click command that trains a method.

    ``options.py`` of its package may add flags (``original_flags`` with ``take_overrides``) and answer those of the
    original that are not here (``INSTEAD``).
    """
    flags = own_flags(method)
    add_flags = getattr(flags, "original_flags", None)

    @click.command(f"train_{method}", cls=OneLineCommand, instead=getattr(flags, "INSTEAD", None))
    @click.option(
        "--curriculum", default=default_curriculum, show_default=True, help="Name (see --list-curricula) or YAML file."
    )
    @click.option("--list-curricula", is_flag=True, help="List the curricula and leave.")
    @click.option("--data", default=None, help="Training pictures (data.path). [default: synthetic heads]")
    @click.option(
        "--out", type=click.Path(path_type=Path), default=None, help="Run folder. [default: runs/METHOD/CURRICULUM]"
    )
    @click.option("--gpus", type=int, default=None, help="Number of GPUs of this machine, one process each.")
    @click.option("--device", type=click.Choice(["cuda", "cpu"]), default=None, help="[default: cuda if there is one]")
    @click.option("--processes", type=int, default=None, help="Processes on the CPU, with --device cpu.")
    @click.option(
        "--resume", default=None, help="'auto' = go on where the run folder stands; or the path of a checkpoint."
    )
    @click.option(
        "--init-from",
        type=click.Path(path_type=Path),
        default=None,
        help="Fine-tune: start from the weights of this model, converted checkpoint or original generator file.",
    )
    @click.option("--fresh-discriminators", is_flag=True, help="With --init-from: take the generator only.")
    @click.option("--max-steps", type=int, default=None, help="Iterations in all (train.max_steps).")
    @click.option(
        "--kimg", type=FiniteFloat(min=0, min_open=True), default=None, help="Length in thousand images instead."
    )
    @click.option("--seed", type=int, default=None, help="Seed of the run (train.seed).")
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a setting, for example --set render.near=0.9; repeatable.",
    )
    @click.option("--reference", is_flag=True, help="Restore everything the original does where we deviate.")
    @click.option("--allow-config-change", is_flag=True, help="Resume although settings differ.")
    @click.option(
        "--dry-run", is_flag=True, help="Check configuration and data, print the resolved configuration, do not train."
    )
    @(add_flags or (lambda function: function))
    @friendly
    def command(**options: Any) -> None:
        if add_flags:
            options["overrides"] = (*flags.take_overrides(options), *options["overrides"])
        raise SystemExit(run(method, **options))

    command.help = f"Train {method}. Interrupt with Ctrl-C: the step is finished, saved, and --resume auto goes on."
    return command


def own_flags(method: str) -> Any:
    """The module with a method's own flags, or None."""
    import importlib
    import importlib.util

    from facelab.methods import module_of

    name = f"{module_of(method)}.options"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def run(
    method: str,
    curriculum: str,
    list_curricula: bool = False,
    data: str | None = None,
    out: Path | None = None,
    gpus: int | None = None,
    device: str | None = None,
    processes: int | None = None,
    resume: str | None = None,
    init_from: Path | None = None,
    fresh_discriminators: bool = False,
    max_steps: int | None = None,
    kimg: float | None = None,
    seed: int | None = None,
    overrides: tuple[str, ...] = (),
    reference: bool = False,
    allow_config_change: bool = False,
    dry_run: bool = False,
    tick: float | None = None,
    snap: float | None = None,
) -> int:
    """Resolve and check everything, then start the processes. Returns the exit code."""
    from facelab.cli.start import start_from
    from facelab.config import list_curricula as curricula
    from facelab.config import load_staged, resolve_curriculum, to_dict
    from facelab.deviations import active, describe, switched_back
    from facelab.errors import UserError
    from facelab.methods import load_method
    from facelab.training.launch import launch, plan, under_torchrun

    if list_curricula:
        for entry in curricula(method):
            names = f" (original: {', '.join(entry.aliases)})" if entry.aliases else ""
            click.echo(f"{entry.name:32s} {entry.description}{names}")
        return 0
    if not under_torchrun():
        import torch

        plan(device, gpus, processes, torch.cuda.device_count() if device != "cpu" else 0)
    refuse_original(resume)
    if fresh_discriminators and not init_from:
        raise UserError("--fresh-discriminators is for --init-from MODEL, expected both; add it or drop the flag")
    if init_from and resume not in (None, "auto"):
        raise UserError(
            f"--init-from starts a new run and --resume {resume} goes on with one, expected one of them; drop the other "
            "(with --resume auto a run that was started goes on)"
        )
    trainable = load_method(method)
    named = {"data.path": data, "train.max_steps": max_steps, "train.seed": seed}
    changes = [f"{key}={value}" for key, value in named.items() if value is not None]
    path = resolve_curriculum(method, curriculum)
    start = start_from(init_from, trainable, fresh_discriminators) if init_from else None
    above, beneath = (start.above, start.beneath) if start else ([], [])
    restored = switched_back(trainable.deviations) if reference else []
    wanted = [*above, *restored, *changes, *overrides]
    staged = load_staged(trainable.config_type, [path], wanted, beneath)
    counted = in_steps(kimg, tick, snap, staged, gpus or processes or 1)
    if counted:
        staged = load_staged(trainable.config_type, [path], [*wanted, *counted], beneath)
    check(trainable, staged, gpus or processes or 1)
    deviations = active(trainable.deviations, staged.at(0).reference)
    if is_first_process():
        if start:
            for line in start.describe(load_staged(trainable.config_type, [path]).at(0), staged.at(0)):
                click.echo(line)
        for d in deviations:
            click.echo(f"deviates from the original: reference.{d.switch}: {d.what}")
    if dry_run:
        import yaml

        click.echo(yaml.safe_dump(to_dict(staged), sort_keys=False))
        return 0
    job = Job(
        method=method,
        config=to_dict(staged),
        run_dir=str(out or Path("runs") / method / path.stem),
        resume=resume,
        init_from=str(init_from) if init_from else None,
        fresh_discriminators=fresh_discriminators,
        allow_config_change=allow_config_change,
        meta={
            "deviations": describe(deviations),
            "curriculum": path.stem,
            **({"init_from": str(init_from)} if init_from else {}),
        },
    )
    return launch(work, (job,), device=device, gpus=gpus, processes=processes)


def refuse_original(resume: str | None) -> None:
    """UserError where --resume names a file of an original program, which has no position to go on from."""
    from facelab.api import PICKLES
    from facelab.errors import UserError

    if resume is not None and Path(resume).suffix in PICKLES:
        raise UserError(
            f"--resume goes on with a run of this program, got {resume}, a file of an original one; to start from its "
            f"weights say --init-from {resume}"
        )


def in_steps(kimg: float | None, tick: float | None, snap: float | None, staged: Any, processes: int) -> list[str]:
    """Settings that --kimg, --tick and --snap stand for. UserError where the batch changes on the way."""
    found = [] if kimg is None else [f"train.max_steps={steps_of(kimg, '--kimg', staged, processes)}"]
    if tick is not None:
        found.append(f"log.every={steps_of(tick, '--tick', staged, processes)}")
    if snap is not None:
        each = steps_of(snap * (TICK_KIMG if tick is None else tick), "--snap", staged, processes)
        found += [f"checkpoint.every={each}", f"log.samples_every={each}"]
    return found


def steps_of(kimg: float, flag: str, staged: Any, processes: int) -> int:
    """Steps that see ``kimg`` thousand images. UserError where the batch changes on the way."""
    import math

    from facelab.errors import UserError
    from facelab.training.config import global_batch

    if not math.isfinite(kimg):
        raise UserError(f"{flag} expects a finite number, got {kimg}")
    processes = process_count(processes)
    sizes = {global_batch(config.train, processes) for config in staged.stages}
    if len(sizes) > 1:
        raise UserError(f"{flag}: this curriculum has batches of {sorted(sizes)} samples; count in steps instead")
    return max(1, -(-round(kimg * 1000) // sizes.pop()))


def process_count(asked: int) -> int:
    """Processes of this run: torchrun's where it started this one."""
    import os

    return int(os.environ.get("WORLD_SIZE", asked))


def is_first_process() -> bool:
    """False in torchrun's other processes, which should not repeat what the first one prints."""
    import os

    return os.environ.get("RANK", "0") == "0"


def check(method: Any, staged: Any, processes: int) -> None:
    """Find what would stop the run later: unknown variants, resolutions that do not fit, damaged data."""
    import warnings

    from facelab.errors import UserError
    from facelab.training.config import check_shares, global_batch

    processes = process_count(processes)
    for row, config in enumerate(staged.stages):
        check_shares(global_batch(config.train, processes), config.train.batch_chunk, processes)
        if config.model != staged.stages[0].model:
            raise UserError(
                f"stages[{row}] changes settings of model, which hold for a whole run; start a new one from it"
            )
        if chunk := getattr(getattr(config, "discriminator", None), "chunk", None):
            check_shares(global_batch(config.train, processes), chunk, processes, "discriminator.chunk")
        method.check_config(config)
    if staged.at(0).data.path:
        with warnings.catch_warnings():  # the notes below say the same
            warnings.simplefilter("ignore", UserWarning)
            report = method.pictures(staged.at(0)).validate()
        odd = method.data_notes(staged.at(0)) if hasattr(method, "data_notes") else []
        if is_first_process():
            width, height = report.smallest
            click.echo(
                f"data: {report.samples} samples, smallest {width} x {height} px, {report.decoded} decoded as a check"
            )
            for note in [*report.notes, *odd]:
                click.echo(f"data: {note}")


def work(distributed: Distributed, job: Job) -> int:
    """One process of the run."""
    from facelab.cli.samples import SampleGrids
    from facelab.config import from_dict
    from facelab.methods import load_method
    from facelab.training.loop import Trainer

    method = load_method(job.method)
    callbacks = method.callbacks() if hasattr(method, "callbacks") else [SampleGrids(method)]
    if job.init_from:
        from facelab.cli.convert import Initialised

        method = Initialised(method, Path(job.init_from), job.fresh_discriminators)
    trainer = Trainer(
        method,
        from_dict(method.config_type, job.config),
        job.run_dir,
        distributed,
        callbacks,
        stage=job.stage,
        resume=job.resume,
        allow_config_change=job.allow_config_change,
        resume_may_change=("data.path", "data.cache"),
        meta=job.meta,
    )
    return trainer.run().exit_code
