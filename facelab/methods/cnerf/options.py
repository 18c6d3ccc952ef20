# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training commands as names of settings, ``--stage``, and where runs lie. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from facelab.bases.stylesdf.options import (
    ABOVE_ZERO,
    NONNEGATIVE,
    POSITIVE,
    Flag,
    add_flags,
    check_launcher,
    common_flags,
    flag_overrides,
    given,
)
from facelab.errors import UserError

FLAGS = (
    Flag("dataset_path", "data.path", str, "The same as --data."),
    *common_flags(view="camera", path="loss.path_weight"),
    Flag("r1_img", "loss.r1_image", NONNEGATIVE, "Weight of R1 on pictures."),
    Flag("r1_seg", "loss.r1_semantics", NONNEGATIVE, "Weight of R1 on masks."),
    Flag("Semantic_D_lambda", "loss.semantic", NONNEGATIVE, "Weight of the discriminator of one region."),
    Flag("style_dim", "model.style_dim", POSITIVE, "Width of the codes."),
    Flag("lr_mapping", "model.lr_mapping", NONNEGATIVE, "Rate multiplier of the decoder's mapping network."),
    Flag("uniform", "camera.mode", None, "Cameras are uniform instead of normal.", value="uniform"),
    Flag("dist_radius", "camera.radius", ABOVE_ZERO, "Half of far - near."),
    Flag("depth", "model.depth", POSITIVE, "Shape layers of a local generator."),
    Flag("n_render", "model.regions", POSITIVE, "Local generators: as many as regions, nine."),
    Flag("n_wcode", "model.regions", POSITIVE, "Channels of the masks: the same number."),
    Flag("no_z_normalize", "model.normalize", None, "Points enter the field in scene units.", value=False),
    Flag("static_viewdirs", "render.static_training", None, "View directions in the camera's own axes.", value=True),
    Flag("no_offset_sampling", "model.sampling", None, "Each sample of a ray moves on its own.", value="stratified"),
)
WITHOUT_EFFECT = {"force_background": None, "raw_noise_std": float, "n_mlp": int}  # here as in the original
FULL_CURRICULUM = "ffhq_full_512"  # of --stage full without --curriculum
FOLDERS = {"volume": "volume_renderer", "full": "full_pipeline"}  # below checkpoints_dir/expname


def original_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a click command; their values arrive under their own names."""
    command = add_flags(command, FLAGS)
    for name, kind in WITHOUT_EFFECT.items():
        kinds: dict[str, Any] = {"is_flag": True, "default": False} if kind is None else {"type": kind, "default": None}
        command = click.option(f"--{name}", name, help="Without effect on CNeRF.", hidden=True, **kinds)(command)
    command = click.option("--no_sdf", is_flag=True, default=False, hidden=True)(command)
    places = (
        ("expname", "Run folder CHECKPOINTS_DIR/EXPNAME/volume_renderer or full_pipeline, in place of --out."),
        ("checkpoints_dir", "See --expname. [default: ./checkpoints]"),
        (
            "pretrain_render_path",
            "Full stage: file or run of the volume stage. [init_from; default: that of --expname]",
        ),
        ("ckpt", "With --continue_training: the step to go on from. [default: the last]"),
    )
    for name, text in reversed(places):
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        command = click.option(*names, name, default=None, help=text)(command)
    return click.option(
        "--continue_training",
        "--continue-training",
        "continue_training",
        is_flag=True,
        help="The same as --resume auto.",
    )(command)


def take_overrides(options: dict[str, Any]) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> overrides; sort out folders and how the stage starts.

    A second stage on ``--init-from`` a first one gets the setting ``init_from`` in its place.

    Raises:
        UserError: a stage that is not the curriculum's, no first stage or one that does not fit, flags that
            contradict each other, a launcher's flag.
    """
    check_launcher(options.pop("local_rank", None))
    _refuse_or_tell(options)
    size = options.get("size")
    overrides = flag_overrides(options, FLAGS)
    places = {name: options.pop(name) for name in ("expname", "checkpoints_dir", "pretrain_render_path", "ckpt")}
    resumes, stage = options.pop("continue_training"), options.pop("stage", None)
    if stage == "full" and not given("curriculum"):
        options["curriculum"] = FULL_CURRICULUM
    if options.get("list_curricula"):
        return overrides
    config = _resolved(options, overrides)
    _check_stage(stage, config.model.stage, options["curriculum"])
    if size is not None and config.model.stage == "volume" and size != config.render.resolution:
        raise UserError(
            f"--size {size}: the volume stage is trained on pictures of the rendering's size, "
            f"{config.render.resolution}; say --renderer_spatial_output_dim {size}"
        )
    _take_places(options, places, config.model.stage, resumes)
    if config.model.stage == "full":
        first = places["pretrain_render_path"] or _beside(places)
        return [*overrides, *_start_full(options, config, first)]
    if places["pretrain_render_path"] is not None:
        raise UserError("--pretrain_render_path is what the full stage starts from; leave it out or say --stage full")
    return [*overrides, *_start_volume(options)]


def describe() -> Mapping[str, str]:
    """Flag -> setting, for the documentation's table."""
    return {f"--{flag.name}": flag.key for flag in FLAGS} | {f"--{name}": "without effect" for name in WITHOUT_EFFECT}


# ---------------------------------------------------------------- pieces


def _refuse_or_tell(options: dict[str, Any]) -> None:
    if options.pop("no_sdf"):
        raise UserError("--no_sdf: CNeRF sums signed distances and has no other density; leave it out")
    said = [name for name in WITHOUT_EFFECT if options.pop(name) not in (None, False)]
    if said and _first_process():
        click.echo(f"without effect on CNeRF, as in the original: {', '.join(f'--{name}' for name in said)}")


def _resolved(options: Mapping[str, Any], overrides: list[str]) -> Any:
    """The configuration that the command line asks for, in its first row."""
    from facelab.config import load_staged, resolve_curriculum
    from facelab.methods.cnerf.config import CnerfConfig

    path = resolve_curriculum("cnerf", options["curriculum"])
    return load_staged(CnerfConfig, [path], [*overrides, *options["overrides"]]).at(0)


def _check_stage(asked: str | None, found: str, curriculum: str) -> None:
    """UserError where ``--stage`` is not the curriculum's stage; names those of the stage."""
    if asked in (None, found):
        return
    from facelab.config import list_curricula

    names = [
        e.name
        for e in list_curricula("cnerf")
        if _resolved({"curriculum": e.name, "overrides": ()}, []).model.stage == asked
    ]
    raise UserError(
        f"--stage {asked}: the curriculum {curriculum} is one of stage {found}; take {', '.join(names)}, or a file that "
        "names the stage (model.stage)"
    )


def _folder(places: Mapping[str, Any], stage: str) -> Path | None:
    """Run folder of an experiment's stage, where one is named."""
    if places["expname"] is None:
        return None
    return Path(places["checkpoints_dir"] or "checkpoints") / places["expname"] / FOLDERS[stage]


def _beside(places: Mapping[str, Any]) -> str | None:
    """The volume stage of the same experiment, if there is one."""
    folder = _folder(places, "volume")
    return str(folder) if folder is not None and folder.is_dir() else None


def _take_places(options: dict[str, Any], places: Mapping[str, Any], stage: str, resumes: bool) -> None:
    """Fill in ``--out`` and ``--resume``."""
    if places["checkpoints_dir"] is not None and places["expname"] is None:
        raise UserError("--checkpoints_dir needs --expname; expected both, or --out")
    folder = _folder(places, stage)
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
        options["resume"] = str(_run_folder(options) / "checkpoints" / f"{int(places['ckpt']):08d}")


def _run_folder(options: Mapping[str, Any]) -> Path:
    from facelab.config import resolve_curriculum

    return options.get("out") or Path("runs") / "cnerf" / resolve_curriculum("cnerf", options["curriculum"]).stem


def _start_volume(options: Mapping[str, Any]) -> list[str]:
    """Overrides for the start of a first stage: fine-tuned weights are not made a sphere again."""
    path = options.get("init_from")
    if path is None:
        return []
    from facelab.methods.cnerf.training import METHOD

    if METHOD.stored(path).config.model.stage != "volume":
        raise UserError(f"{path} is a model of the full stage, which cannot start a run of the volume stage")
    return ["sphere.steps=0"]


def _start_full(options: dict[str, Any], config: Any, first: str | None) -> list[str]:
    """Overrides for the start of a second stage; a resumed one keeps its own.

    Args:
        first: renderer that a flag names.
    """
    from facelab.methods.cnerf.training import METHOD, UNTRAINED

    path: Path | None = options.get("init_from")
    if path is not None and METHOD.stored(path).config.model.stage == "full":
        return []  # fine-tuning: everything comes from the file
    if path is not None:
        options["init_from"], first = None, str(path)
    begun = None if options.get("resume") is None else _begun(options)
    if begun is not None:
        return [f"init_from={json.dumps(begun['init_from'])}"]
    config = config if first is None else replace(config, init_from=str(first))
    if config.init_from != UNTRAINED:
        METHOD.first_stage(config)
    if _first_process():
        click.echo(f"the renderer is that of {config.init_from} and stays as it is")
    return [f"init_from={json.dumps(config.init_from)}"]


def _begun(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run that is resumed, as plain values; None if it has not begun."""
    from facelab.checkpoints.format import list_checkpoints, load_checkpoint

    place = _run_folder(options) if str(options["resume"]) == "auto" else Path(options["resume"])
    if str(options["resume"]) == "auto" and not list_checkpoints(place):
        return None
    meta: Any = load_checkpoint(place, with_state=False, groups=()).meta
    return dict(meta["config"])


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
