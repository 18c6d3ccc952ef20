# SPDX-License-Identifier: Apache-2.0
"""Flags of StyleSDF's and CNeRF's training commands that say where runs lie and what a stage starts from. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from facelab.errors import UserError

STAGES = ("volume", "full")
FOLDERS = {"volume": "volume_renderer", "full": "full_pipeline"}  # of an experiment's stages


@dataclass(frozen=True)
class Program:
    """In what the commands differ.

    Attributes:
        method: its name.
        load: the method, which needs torch; called when a command runs.
        full_curriculum: of ``--stage full`` without ``--curriculum``.
        checkpoints_dir: where experiments lie, unless it is said.
        untrained: value of ``init_from`` that asks for no first stage, if there is one.
    """

    method: str
    load: Callable[[], Any]
    full_curriculum: str
    checkpoints_dir: str = "checkpoint"
    untrained: str | None = None


# ---------------------------------------------------------------- flags


def add_places(command: Callable[..., Any], program: Program) -> Callable[..., Any]:
    """Add ``--stage``, the original's places and the launchers' ``--local_rank`` to a click command."""
    command = click.option("--local_rank", "--local-rank", type=str, default=None, hidden=True)(command)
    text = "The same as --resume auto."
    names = ("--continue_training", "--continue-training")
    command = click.option(*names, "continue_training", is_flag=True, default=False, help=text)(command)
    places = {
        "expname": "Run folder CHECKPOINTS_DIR/EXPNAME/volume_renderer or full_pipeline, in place of --out.",
        "checkpoints_dir": f"See --expname. [default: ./{program.checkpoints_dir}]",
        "ckpt": "With --continue_training: the step to go on from. [default: the last]",
    }
    for name, text in reversed(places.items()):
        names = tuple(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
        command = click.option(*names, name, default=None, help=text)(command)
    text = "Which training stage; must be that of the curriculum. [default: the curriculum's]"
    return click.option("--stage", type=click.Choice(STAGES), default=None, help=text)(command)


def check_launcher(local_rank: str | None) -> None:
    """Old launchers append ``--local_rank=N``: without effect where the environment says the same, else refused.

    UserError: nothing else tells that there are several processes.
    """
    if local_rank is None:
        return
    told = os.environ.get("LOCAL_RANK")
    if told is None or "RANK" not in os.environ:
        raise UserError(
            f"--local_rank {local_rank} is a flag of old launchers, which did not start this process; leave it out and "
            "say --gpus N, or start with torchrun --nproc-per-node N"
        )
    if told != local_rank:
        raise UserError(f"--local_rank {local_rank} contradicts the launcher's LOCAL_RANK {told}; leave the flag out")
    if first_process():
        click.echo("--local_rank is not needed: the launcher's environment tells the processes their numbers")


def first_process() -> bool:
    """Whether this process tells the user things."""
    return os.environ.get("RANK", "0") == "0"


def given(parameter: str) -> bool:
    """Whether the user said this option."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(parameter) not in (None, ParameterSource.DEFAULT)


# ---------------------------------------------------------------- what a command line means


def start_overrides(
    options: dict[str, Any],
    overrides: list[str],
    program: Program,
    size: int | None = None,
    first: str | None = None,
) -> list[str]:
    """Take the flags of :func:`add_places` out of ``options`` -> further overrides; fills in ``out`` and ``resume``.

    A second stage on ``--init-from`` a first one gets the setting ``init_from`` in its place.

    Args:
        overrides: those of other flags.
        size: side of the pictures, if a flag says it.
        first: a first stage that another flag names.

    Raises:
        UserError: a stage that is not the curriculum's, no first stage or one that does not fit, flags that
            contradict each other.
    """
    places = {name: options.pop(name, None) for name in ("expname", "checkpoints_dir", "ckpt")}
    resumes, asked = options.pop("continue_training", False), options.pop("stage", None)
    if asked == "full" and not given("curriculum"):
        options["curriculum"] = program.full_curriculum
    if options.get("list_curricula"):
        return []
    config = _resolved(options, overrides, program)
    stage = stage_of(config)
    _check_stage(asked, stage, options["curriculum"], program)
    if size is not None and stage == "volume" and size != config.render.resolution:
        raise UserError(
            f"--size {size}: the volume stage is trained on pictures of the rendering's size, "
            f"{config.render.resolution}; say --renderer_spatial_output_dim {size}"
        )
    _take_places(options, places, stage, bool(resumes), program)
    if stage == "volume":
        if first is not None:
            raise UserError(f"{first} is what the full stage would start from; leave it out or say --stage full")
        return _start_volume(options, program)
    return _start_full(options, config, first, _beside(places, program), program)


def stage_of(config: Any) -> str:
    """The training stage of a configuration of StyleSDF or CNeRF."""
    return config.stage if hasattr(config, "stage") else config.model.stage


def _resolved(options: Mapping[str, Any], overrides: list[str], program: Program) -> Any:
    """The configuration that the command line asks for, in its first row.

    UserError where a later row changes what holds for a whole run.
    """
    from facelab.config import load_staged, resolve_curriculum

    path = resolve_curriculum(program.method, options["curriculum"])
    staged = load_staged(program.load().config_type, [path], [*overrides, *options["overrides"]])
    first = staged.at(0)
    for number, row in enumerate(staged.stages):
        for name, value, before in (
            ("stage", stage_of(row), stage_of(first)),
            ("init_from", row.init_from, first.init_from),
            ("render.resolution", row.render.resolution, first.render.resolution),
        ):
            if value != before:
                raise UserError(
                    f"stages[{number}] changes {name} from {before} to {value}, which holds for a whole run; start a new "
                    "one from it"
                )
    return first


def _check_stage(asked: str | None, found: str, curriculum: str, program: Program) -> None:
    """UserError where ``--stage`` is not the curriculum's stage; names those of the stage."""
    if asked in (None, found):
        return
    from facelab.config import list_curricula

    names = [
        entry.name
        for entry in list_curricula(program.method)
        if stage_of(_resolved({"curriculum": entry.name, "overrides": ()}, [], program)) == asked
    ]
    raise UserError(
        f"--stage {asked}: the curriculum {curriculum} is one of stage {found}; take {', '.join(names)}, or a file that "
        "names the stage"
    )


# ---------------------------------------------------------------- places


def _folder(places: Mapping[str, Any], stage: str, program: Program) -> Path | None:
    """Run folder of an experiment's stage, where one is named."""
    if places["expname"] is None:
        return None
    return Path(places["checkpoints_dir"] or program.checkpoints_dir) / places["expname"] / FOLDERS[stage]


def _beside(places: Mapping[str, Any], program: Program) -> str | None:
    """The volume stage of the same experiment, if there is one."""
    folder = _folder(places, "volume", program)
    return str(folder) if folder is not None and folder.is_dir() else None


def _take_places(
    options: dict[str, Any], places: Mapping[str, Any], stage: str, resumes: bool, program: Program
) -> None:
    """Fill in ``--out`` and ``--resume``."""
    if places["checkpoints_dir"] is not None and places["expname"] is None:
        raise UserError("--checkpoints_dir needs --expname; expected both, or --out")
    folder = _folder(places, stage, program)
    if folder is not None:
        if options.get("out") is not None:
            raise UserError(
                f"--expname {places['expname']} and --out {options['out']} both name the run folder; say one"
            )
        options["out"] = folder
    if places["ckpt"] is not None and not (resumes and str(places["ckpt"]).isdigit()):
        raise UserError(f"--ckpt {places['ckpt']}: expected a number of steps, with --continue_training")
    if not resumes:
        return
    if options.get("resume") is not None:
        raise UserError("--continue_training and --resume say the same; expected one of them")
    options["resume"] = "auto"
    if places["ckpt"] is not None:
        options["resume"] = str(_run_folder(options, program) / "checkpoints" / f"{int(places['ckpt']):08d}")


def _run_folder(options: Mapping[str, Any], program: Program) -> Path:
    from facelab.config import resolve_curriculum

    name = resolve_curriculum(program.method, options["curriculum"]).stem
    return options.get("out") or Path("runs") / program.method / name


# ---------------------------------------------------------------- what a stage starts from


def _start_volume(options: Mapping[str, Any], program: Program) -> list[str]:
    """Overrides for the start of a first stage: fine-tuned weights are not made a sphere again."""
    path = options.get("init_from")
    if path is None:
        return []
    if stage_of(program.load().stored(path).config) != "volume":
        raise UserError(f"{path} is a model of stage full, which cannot start a run of stage volume")
    return ["sphere.steps=0"]


def _start_full(
    options: dict[str, Any], config: Any, first: str | None, beside: str | None, program: Program
) -> list[str]:
    """Overrides for the start of a second stage; a resumed one keeps its own.

    Args:
        first: renderer that another flag names.
        beside: that of the same experiment.
    """
    path: Path | None = options.get("init_from")
    begun = _begun(options, program) if options.get("resume") is not None else None
    if begun is not None and begun.get("init_from"):  # the file itself need not be there any more
        options["init_from"] = None
        named = str(path) if path is not None else first or begun["init_from"]
        return [f"init_from={json.dumps(named)}"]
    if path is not None:
        if stage_of(program.load().stored(path).config) == "full":
            return []  # fine-tuning: everything comes from the file
        options["init_from"], first = None, str(path)
    elif begun is not None:
        return []
    config = replace(config, init_from=first or beside or config.init_from)
    if program.untrained is None or config.init_from != program.untrained:
        program.load().first_stage(config)
    if first_process():
        click.echo(f"the renderer is that of {config.init_from} and stays as it is")
    return [f"init_from={json.dumps(config.init_from)}"]


def _begun(options: Mapping[str, Any], program: Program) -> dict[str, Any] | None:
    """The configuration of the run that is resumed, as plain values; None if it has not begun."""
    from facelab.checkpoints.format import list_checkpoints, load_checkpoint

    place = _run_folder(options, program) if str(options["resume"]) == "auto" else Path(options["resume"])
    if str(options["resume"]) == "auto" and not list_checkpoints(place):
        return None
    meta: Any = load_checkpoint(place, with_state=False, groups=()).meta
    return dict(meta["config"])
