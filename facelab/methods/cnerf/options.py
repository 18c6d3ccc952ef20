# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training commands as names of settings. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from facelab.bases.stylesdf.options import (
    INSTEAD as OF_STYLESDF,
)
from facelab.bases.stylesdf.options import (
    Flag,
    add_flags,
    common_flags,
    flag_overrides,
)
from facelab.bases.stylesdf.start_options import Program, add_places, check_launcher, first_process, start_overrides
from facelab.errors import UserError
from facelab.option_types import ABOVE_ZERO, NONNEGATIVE, POSITIVE

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
INSTEAD = {  # flags of the original that are not here -> what to do
    **{flag: text for flag, text in OF_STYLESDF.items() if flag != "--n_mlp"},
    **dict.fromkeys(("--trained_ckpt", "--semantics"), OF_STYLESDF["--identities"]),
    "--flag": "nothing, it had no effect; leave it out",
}
WITHOUT_EFFECT = {"force_background": None, "raw_noise_std": float, "n_mlp": int}  # here as in the original
UNTRAINED = "untrained"  # value of init_from: no first stage, for trials


def _method() -> Any:
    from facelab.methods.cnerf.training import METHOD

    return METHOD


PROGRAM = Program("cnerf", _method, "ffhq_full_512", "checkpoints", UNTRAINED)


def original_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a click command; their values arrive under their own names."""
    command = add_flags(command, FLAGS)
    for name, kind in WITHOUT_EFFECT.items():
        kinds: dict[str, Any] = {"is_flag": True, "default": False} if kind is None else {"type": kind, "default": None}
        command = click.option(f"--{name}", name, help="Without effect on CNeRF.", hidden=True, **kinds)(command)
    command = click.option("--no_sdf", is_flag=True, default=False, hidden=True)(command)
    command = click.option(
        "--pretrain_render_path",
        "--pretrain-render-path",
        "pretrain_render_path",
        default=None,
        help="Full stage: file or run of the volume stage. [init_from; default: that of --expname]",
    )(command)
    return add_places(command, PROGRAM)


def take_overrides(options: dict[str, Any]) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> overrides; sort out folders and how the stage starts.

    UserError as :func:`~facelab.bases.stylesdf.start_options.start_overrides`, and for flags that CNeRF does not have.
    """
    check_launcher(options.pop("local_rank", None))
    _refuse_or_tell(options)
    size, first = options.get("size"), options.pop("pretrain_render_path")
    overrides = flag_overrides(options, FLAGS, twice={})
    return [*overrides, *start_overrides(options, overrides, PROGRAM, size, first)]


def describe() -> Mapping[str, str]:
    """Flag -> setting, for the documentation's table."""
    return {f"--{flag.name}": flag.key for flag in FLAGS} | {f"--{name}": "without effect" for name in WITHOUT_EFFECT}


def _refuse_or_tell(options: dict[str, Any]) -> None:
    if options.pop("no_sdf"):
        raise UserError("--no_sdf: CNeRF sums signed distances and has no other density; leave it out")
    said = [name for name in WITHOUT_EFFECT if options.pop(name) not in (None, False)]
    if said and first_process():
        click.echo(f"without effect on CNeRF, as in the original: {', '.join(f'--{name}' for name in said)}")
