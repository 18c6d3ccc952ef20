# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training commands that say the same here, as names of settings; and ``--stage``. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from facelab.errors import UserError

STAGES = ("volume", "full")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: as the original has it, without the dashes.
        key: our setting.
        kind: what its value is; None: a switch without a value.
        help: one line.
        value: what a switch sets.
        turned: their value -> ours.
        also: further overrides.
    """

    name: str
    key: str
    kind: Any
    help: str
    value: Any = None
    turned: Callable[[Any], Any] | None = None
    also: tuple[str, ...] = ()

    @property
    def parameter(self) -> str:
        return self.name.lower()


NONNEGATIVE = click.FloatRange(min=0)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
PROBABILITY = click.FloatRange(0, 1)
POSITIVE = click.IntRange(min=1)
COUNT = click.IntRange(min=0)


def common_flags(view: str = "view", path: str = "loss.path") -> tuple[Flag, ...]:
    """Flags that StyleSDF and CNeRF share; the arguments are settings that are called otherwise there.

    Args:
        view: section of the cameras, without their distribution.
        path: weight of the path lengths.
    """
    whole = ("train.batch_size=null",)  # which would win
    return (
        Flag("batch", "train.batch_per_gpu", POSITIVE, "Samples per process and step.", also=whole),
        Flag("chunk", "train.batch_chunk", POSITIVE, "Samples per pass; the gradients of the passes are averaged."),
        Flag("iter", "train.max_steps", POSITIVE, "Iterations in all, in both stages."),
        Flag("val_n_sample", "log.sample_heads", COUNT, "Heads in the sample grids."),
        Flag("d_reg_every", "loss.r1_every", POSITIVE, "Full stage: steps from one R1 to the next."),
        Flag("g_reg_every", "loss.path_every", POSITIVE, "Full stage: steps from one path length to the next."),
        Flag("mixing", "loss.mixing", PROBABILITY, "Probability of style mixing."),
        Flag("lr", "optim.full_lr", NONNEGATIVE, "Full stage: learning rate."),
        Flag("view_lambda", "loss.view", NONNEGATIVE, "Weight of the viewpoint."),
        Flag("eikonal_lambda", "loss.eikonal", NONNEGATIVE, "Weight of the eikonal term."),
        Flag("min_surf_lambda", "loss.surface", NONNEGATIVE, "Weight of the minimal surface term."),
        Flag("min_surf_beta", "loss.surface_sharpness", ABOVE_ZERO, "Its sharpness."),
        Flag("path_regularize", path, NONNEGATIVE, "Full stage: weight of the path lengths."),
        Flag("path_batch_shrink", "loss.path_shrink", POSITIVE, "Full stage: by what their batch is smaller."),
        Flag("no_sphere_init", "sphere.steps", None, "Volume stage: do not start as a sphere.", value=0),
        Flag("size", "model.resolution", POSITIVE, "Full stage: side of the pictures."),
        Flag("channel_multiplier", "model.channel_multiplier", POSITIVE, "Full stage: of the channels."),
        Flag("renderer_spatial_output_dim", "render.resolution", POSITIVE, "Side of the rendering."),
        Flag("azim", f"{view}.azimuth", NONNEGATIVE, "Deviation or half range of the azimuth, radians."),
        Flag("elev", f"{view}.elevation", NONNEGATIVE, "The same of the elevation."),
        Flag("fov", f"{view}.fov", ABOVE_ZERO, "HALF the field of view, degrees.", turned=lambda half: 2 * half),
        Flag("width", "model.width", POSITIVE, "Of the field's layers."),
        Flag("N_samples", "render.samples", POSITIVE, "Samples per ray."),
        Flag("perturb", "render.jitter", NONNEGATIVE, "Random depths if above 0.", turned=lambda share: share > 0),
        Flag("wandb", "log.wandb", None, "Log to Weights & Biases.", value=True),
    )


FLAGS = (
    Flag("dataset_path", "data.path", str, "The same as --data."),
    *common_flags(),
    Flag("r1", "loss.r1", NONNEGATIVE, "Weight of R1."),
    Flag("style_dim", "model.style_dim", POSITIVE, "Width of the codes; model.latent_dim too."),
    Flag("lr_mapping", "model.decoder_lr_mul", NONNEGATIVE, "Rate multiplier of the decoder's mapping network."),
    Flag("uniform", "view.distribution", None, "Cameras are uniform instead of normal.", value="uniform"),
    Flag("dist_radius", "view.dist_radius", ABOVE_ZERO, "Half of far - near."),
    Flag("depth", "model.layers", POSITIVE, "Layers before the signed distance."),
    Flag("no_sdf", "model.density", None, "A raw density instead of a signed distance.", value="raw"),
    Flag("no_z_normalize", "model.normalize_points", None, "Points enter the field in scene units.", value=False),
    Flag("static_viewdirs", "render.static_views", None, "View directions in the camera's own axes.", value=True),
    Flag("no_offset_sampling", "render.sampling", None, "Each sample of a ray moves on its own.", value="stratified"),
    Flag("raw_noise_std", "render.density_noise", NONNEGATIVE, "Noise on raw densities (--no_sdf)."),
    Flag("force_background", "render.background", None, "Missing weight goes to the last sample.", value="last"),
)
TWICE = {"model.style_dim": ("model.latent_dim",)}  # settings that a flag sets beside its own
FULL_CURRICULUM = "ffhq_full_1024"  # of --stage full without --curriculum


# ---------------------------------------------------------------- flags on a command


def add_flags(command: Callable[..., Any], flags: Iterable[Flag]) -> Callable[..., Any]:
    """Add flags to a click command, and ``--stage`` and the launchers' ``--local_rank``."""
    for flag in reversed(tuple(flags)):
        text = f"{flag.help} [{flag.key}]"
        names = dict.fromkeys((f"--{flag.name}", f"--{flag.name.replace('_', '-')}"))  # theirs, and as ours are spelled
        if flag.kind is None:
            command = click.option(*names, flag.parameter, is_flag=True, default=False, help=text)(command)
        else:
            command = click.option(*names, flag.parameter, type=flag.kind, default=None, help=text)(command)
    command = click.option("--local_rank", "--local-rank", type=str, default=None, hidden=True)(command)
    text = "Which training stage; must be that of the curriculum. [default: the curriculum's]"
    return click.option("--stage", type=click.Choice(STAGES), default=None, help=text)(command)


def flag_overrides(
    options: dict[str, Any], flags: Iterable[Flag], twice: Mapping[str, tuple[str, ...]] = TWICE
) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> ``key=value`` of those that were given."""
    found = []
    for flag in flags:
        value = options.pop(flag.parameter, None)
        if value is None or (flag.kind is None and not value):
            continue
        value = flag.value if flag.kind is None else flag.turned(value) if flag.turned else value
        found += [f"{key}={json.dumps(value)}" for key in (flag.key, *twice.get(flag.key, ()))]
        found += flag.also
    return found


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
    if os.environ["RANK"] == "0":
        click.echo("--local_rank is not needed: the launcher's environment tells the processes their numbers")


def given(parameter: str) -> bool:
    """Whether the user said this option."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(parameter) not in (None, ParameterSource.DEFAULT)


# ---------------------------------------------------------------- StyleSDF


def original_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a click command; their values arrive under their own names."""
    return add_flags(command, FLAGS)


def take_overrides(options: dict[str, Any]) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> overrides; sort out how the stage starts.

    A second stage on ``--init-from`` a first one gets the setting ``init_from`` in its place.

    Raises:
        UserError: a stage that is not the curriculum's, no first stage or one that does not fit, a launcher's flag.
    """
    check_launcher(options.pop("local_rank", None))
    overrides = flag_overrides(options, FLAGS)
    stage = options.pop("stage", None)
    if stage == "full" and not given("curriculum"):
        options["curriculum"] = FULL_CURRICULUM
    if options.get("list_curricula"):
        return overrides
    config = _resolved("stylesdf", options, overrides)
    check_stage(stage, config.stage, "stylesdf", options["curriculum"])
    if config.stage == "full":
        return [*overrides, *_start_full(options, config)]
    if options.get("init_from") is None:
        return overrides
    from facelab.bases.stylesdf.training import METHOD

    if METHOD.stored(options["init_from"]).config.stage != "volume":
        raise UserError(f"{options['init_from']} is a model of stage full, which cannot start a run of stage volume")
    return [*overrides, "sphere.steps=0"]  # or the sphere would wipe out what the file has learnt


def _start_full(options: dict[str, Any], config: Any) -> list[str]:
    """Overrides for the start of a second stage; a resumed one keeps its own."""
    from dataclasses import replace

    from facelab.bases.stylesdf.training import METHOD

    path: Path | None = options.get("init_from")
    begun = _begun(options) if options.get("resume") is not None else None
    if begun is not None:
        if path is None:
            return [] if config.init_from else [f"init_from={json.dumps(begun.get('init_from', ''))}"]
        if begun.get("init_from"):  # the file itself need not be there any more
            options["init_from"] = None
            return [f"init_from={json.dumps(str(path))}"]
    if path is not None:
        if METHOD.stored(path).config.stage == "full":
            return []  # fine-tuning: everything comes from the file
        config = replace(config, init_from=str(path))
        options["init_from"] = None
    METHOD.first_stage(config)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"the renderer is that of {config.init_from} and stays as it is")
    return [f"init_from={json.dumps(config.init_from)}"]


def _begun(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run that is resumed, as plain values; None if it has not begun."""
    from facelab.checkpoints.format import list_checkpoints, load_checkpoint
    from facelab.config import resolve_curriculum

    place = Path(options["resume"])
    if str(options["resume"]) == "auto":
        name = resolve_curriculum("stylesdf", options["curriculum"]).stem
        place = options.get("out") or Path("runs") / "stylesdf" / name
        if not list_checkpoints(place):
            return None
    meta: Any = load_checkpoint(place, with_state=False, groups=()).meta
    return dict(meta["config"])


def check_stage(asked: str | None, found: str, method: str, curriculum: str) -> None:
    """UserError where ``--stage`` is not the curriculum's stage; names those of the stage."""
    if asked in (None, found):
        return
    from facelab.config import list_curricula, load_staged, resolve_curriculum
    from facelab.methods import load_config_type

    kind = load_config_type(method)
    names = [
        entry.name
        for entry in list_curricula(method)
        if stage_of(load_staged(kind, [resolve_curriculum(method, entry.name)]).at(0)) == asked
    ]
    raise UserError(
        f"--stage {asked}: the curriculum {curriculum} is one of stage {found}; take {', '.join(names)}, or a file that "
        f"names the stage"
    )


def stage_of(config: Any) -> str:
    """The training stage of a configuration of StyleSDF or CNeRF."""
    return config.stage if hasattr(config, "stage") else config.model.stage


def _resolved(method: str, options: Mapping[str, Any], overrides: list[str]) -> Any:
    """The configuration that the command line asks for, in its first row.

    UserError where a later row changes what holds for a whole run.
    """
    from facelab.config import load_staged, resolve_curriculum
    from facelab.methods import load_config_type

    path = resolve_curriculum(method, options["curriculum"])
    staged = load_staged(load_config_type(method), [path], [*overrides, *options["overrides"]])
    first = staged.at(0)
    for number, row in enumerate(staged.stages):
        for name, value, before in (
            ("stage", row.stage, first.stage),
            ("init_from", row.init_from, first.init_from),
            ("render.resolution", row.render.resolution, first.render.resolution),
        ):
            if value != before:
                raise UserError(
                    f"stages[{number}] changes {name} from {before} to {value}, which holds for a whole run; start a new "
                    "one from it"
                )
    return first


def describe() -> Mapping[str, str]:
    """Flag -> setting, for the documentation's table."""
    return {f"--{flag.name}": " and ".join((flag.key, *TWICE.get(flag.key, ()))) for flag in FLAGS}
