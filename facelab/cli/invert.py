# SPDX-License-Identifier: Apache-2.0
"""invert_cnerf: photos to the codes of a CNeRF model, a session folder for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import (
    Command,
    OneLineCommand,
    device_option,
    friendly,
    model_argument,
    open_model,
    pick_device,
)
from facelab.cli.photo_input import (
    PATH,
    PHOTO_SOURCES,
    batch_option,
    lazy_cameras,
    lazy_detector,
    list_photos,
    matching,
    max_points_option,
    perceptual_option,
    photo_options,
    quiet_option,
    resume_option,
    save_every_option,
    weights_option,
    with_options,
)
from facelab.cli.photos import camera_options
from facelab.option_types import FiniteFloat

if TYPE_CHECKING:
    from facelab.inversion.photos import View

MASK_KINDS = ("_mask.png", ".png", "_mask.npy", ".npy")
CAMERA_KINDS = (".npy", ".json")


def _photo_options(function: Command) -> Command:
    """What the photos are."""
    options = (
        click.option(
            "--out", type=PATH, default=Path("inversions"), show_default=True, help="Gets a folder per photo."
        ),
        click.option(
            "--mask",
            type=PATH,
            default=None,
            help="Label map of the whole photo (19 classes), or a folder: NAME_mask.png.",
        ),
        click.option(
            "--parser",
            "parser_path",
            default=None,
            help="Make label maps with this face parser (file or manifest name).",
        ),
        photo_options(
            "AZIMUTH,ELEVATION in degrees, a camera file (.npy, .json) or a folder of them. [default: from the face]",
            "PHOTOs are upright crops framed as the model's training pictures.",
        ),
        camera_options,
    )
    return with_options(function, options)


def _optimisation_options(function: Command) -> Command:
    """How codes are found."""
    positive = FiniteFloat(0)
    options = (
        click.option("--steps", type=click.IntRange(1), default=500, show_default=True, help="Of the optimisation."),
        click.option(
            "--lr",
            type=FiniteFloat(0, min_open=True),
            default=0.05,
            show_default=True,
            help="Per step, in standard deviations of the codes.",
        ),
        click.option("--refine-camera", is_flag=True, help="Also find azimuth and elevation."),
        click.option(
            "--camera-lr",
            type=FiniteFloat(0, min_open=True),
            default=0.1,
            show_default=True,
            help="Degrees per step, of --refine-camera.",
        ),
        click.option(
            "--noise",
            is_flag=True,
            help="Also find the decoder's noise (noise.safetensors).",
        ),
        click.option(
            "--picture-weight", type=positive, default=1.0, show_default=True, help="Of the squared difference."
        ),
        click.option(
            "--perceptual-weight", type=positive, default=1.0, show_default=True, help="Of the perceptual distance."
        ),
        perceptual_option,
        click.option(
            "--mask-weight",
            type=positive,
            default=1.0,
            show_default=True,
            help="Of the segmentation, where there is a mask.",
        ),
        click.option(
            "--mask-loss",
            type=click.Choice(["mse", "cross_entropy"]),
            default="mse",
            show_default=True,
            help="On the nine channels, or on the region of each pixel.",
        ),
        click.option(
            "--prior-weight",
            type=positive,
            default=0.01,
            show_default=True,
            help="Pulls codes to the average; 1 = one standard deviation costs 1.",
        ),
        click.option(
            "--noise-weight", type=positive, default=1e5, show_default=True, help="Keeps noise maps noise, of --noise."
        ),
        click.option(
            "--tune-steps",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Then tune the generator so many steps (generator.safetensors).",
        ),
        click.option(
            "--tune-lr",
            type=FiniteFloat(0, min_open=True),
            default=3e-4,
            show_default=True,
            help="Learning rate of the tuning.",
        ),
        click.option(
            "--tune-parts",
            default="",
            help="Only these parts: decoder, field_net ...; several with commas. [default: all]",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the average's latents."),
        batch_option,
        save_every_option,
        max_points_option,
        resume_option,
        weights_option,
        quiet_option,
    )
    return with_options(function, options)


@click.command("invert_cnerf", cls=OneLineCommand)
@model_argument
@click.argument("photos", nargs=-1, required=True, type=PATH)
@_photo_options
@_optimisation_options
@device_option
@friendly
def invert_cnerf(
    model: Path, photos: tuple[Path, ...], out: Path, device: str, weights: str | None, quiet: bool, **options: Any
) -> None:
    """Find the codes of a CNeRF model that give PHOTOS; then edit_cnerf.py and render_images.py --latents take them.

    Each photo gets a folder in --out: settings.yaml, target, latents.safetensors, reconstruction, segmentation, views,
    metrics.json, with --tune-steps a tuned generator.safetensors. Ctrl-C saves; the same command with --resume goes on.
    """
    from facelab.cli.invert_run import Run, open_sessions, run_all
    from facelab.errors import UserError, an

    face = open_model(model, device, weights)
    if face.method != "cnerf":
        raise UserError(
            f"{model} is {an(face.method)} model, expected a CNeRF model; this command inverts with CNeRF only"
        )
    batch, save_every, resume, points = (options.pop(name) for name in ("batch", "save_every", "resume", "max_points"))
    paths = list_photos(photos)
    sources = {name: options.pop(name) for name in ("mask", "camera", *PHOTO_SOURCES)}
    taking = {name: options.pop(name) for name in ("aligned", "face", "force", "parser_path")}
    run = Run(face, str(model.resolve() if model.exists() else model), options, save_every, not quiet, points)
    take = photo_taker(sources, taking, run.side, pick_device(device), paths)
    sessions = open_sessions(run, paths, out, take, resume)
    run_all(run, sessions, batch)


def photo_taker(
    sources: dict[str, Any], taking: dict[str, Any], side: int, device: str, photos: Sequence[Path]
) -> Callable[[Path], Any]:
    """A function photo -> :class:`~facelab.inversion.photos.Prepared`. All networks are made when needed."""
    from facelab.cli.parser import find_parser
    from facelab.data.parsing import load_parser
    from facelab.errors import UserError
    from facelab.inversion.photos import PhotoChoices, prepare

    if sources["mask"] is not None and taking["parser_path"] is not None:
        raise UserError("label maps come from --mask or from --parser, expected one of them, got both")
    detector, estimator = lazy_detector(sources, device), lazy_cameras(sources, device)
    masks = {photo: matching(sources["mask"], photo, photos, "--mask", MASK_KINDS) for photo in photos}
    views = {photo: camera_view(sources["camera"], photo, photos) for photo in photos}

    @functools.cache
    def parser() -> Any:
        path = taking["parser_path"]
        return None if path is None else load_parser(find_parser(path), device)

    def take(photo: Path) -> Any:
        choices = PhotoChoices(side, taking["aligned"], views[photo], taking["face"], taking["force"], parser())
        return prepare(photo, choices, detector, masks[photo], estimator)

    return take


def camera_view(given: str | None, photo: Path, photos: Sequence[Path]) -> View | None:
    """The view of ``--camera``: two angles in degrees, a file, or a folder. UserError for anything else."""
    from facelab.errors import UserError
    from facelab.inversion.photos import View, read_view

    if given is None:
        return None
    if not Path(given).exists() and given.count(",") == 1:
        try:
            angles = [math.radians(float(part)) for part in given.split(",")]
        except ValueError:
            angles = [math.nan]
        if not all(abs(angle) < math.pi / 2 for angle in angles):
            raise UserError(f"--camera takes AZIMUTH,ELEVATION in degrees within -90..90, got {given!r}")
        return View(*angles)
    path = matching(Path(given), photo, photos, "--camera", CAMERA_KINDS)
    assert path is not None
    return read_view(path)
