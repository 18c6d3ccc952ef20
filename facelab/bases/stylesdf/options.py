# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training commands that say the same here, as names of settings. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from facelab.bases.stylesdf.start_options import Program, add_places, check_launcher, start_overrides
from facelab.option_types import ABOVE_ZERO, COUNT, NONNEGATIVE, POSITIVE, PROBABILITY


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
_PICTURES = "scripts/render_images.py and scripts/render_video.py on any checkpoint make pictures; leave it out"
INSTEAD = {  # flags of the original that are not here -> what to do
    "--config": "--curriculum NAME or FILE.yaml",
    "--n_mlp": "nothing, it had no effect; leave it out",
    **dict.fromkeys(("--return_xyz", "--return_sdf"), "nothing, code asks for what a rendering gives; leave it out"),
    "--project_noise": "nothing, it does not run in the original; noise is fixed here; leave it out",
    **dict.fromkeys(
        (
            "--results_dir", "--truncation_ratio", "--truncation_mean", "--identities", "--num_views_per_id",
            "--no_surface_renderings", "--fixed_camera_angles", "--azim_video",
        ),
        _PICTURES,
    ),
}  # fmt: skip
TWICE = {"model.style_dim": ("model.latent_dim",)}  # settings that a flag sets beside its own


# ---------------------------------------------------------------- flags on a command


def add_flags(command: Callable[..., Any], flags: Iterable[Flag]) -> Callable[..., Any]:
    """Add flags to a click command."""
    for flag in reversed(tuple(flags)):
        text = f"{flag.help} [{flag.key}]"
        names = dict.fromkeys((f"--{flag.name}", f"--{flag.name.replace('_', '-')}"))  # theirs, and as ours are spelled
        if flag.kind is None:
            command = click.option(*names, flag.parameter, is_flag=True, default=False, help=text)(command)
        else:
            command = click.option(*names, flag.parameter, type=flag.kind, default=None, help=text)(command)
    return command


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


# ---------------------------------------------------------------- StyleSDF


def _method() -> Any:
    from facelab.bases.stylesdf.training import METHOD

    return METHOD


PROGRAM = Program("stylesdf", _method, "ffhq_full_1024")


def original_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a click command; their values arrive under their own names."""
    return add_places(add_flags(command, FLAGS), PROGRAM)


def take_overrides(options: dict[str, Any]) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> overrides; sort out folders and how the stage starts.

    UserError as :func:`~facelab.bases.stylesdf.start_options.start_overrides`, and for a launcher's flag.
    """
    check_launcher(options.pop("local_rank", None))
    size = options.get("size")
    overrides = flag_overrides(options, FLAGS)
    return [*overrides, *start_overrides(options, overrides, PROGRAM, size)]


def describe() -> Mapping[str, str]:
    """Flag -> setting, for the documentation's table."""
    return {f"--{flag.name}": " and ".join((flag.key, *TWICE.get(flag.key, ()))) for flag in FLAGS}
