# SPDX-License-Identifier: Apache-2.0
"""Photos on a command line: which files they are, where masks and cameras of them lie, how faces are found."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from facelab.cli.common import Command

PATH = click.Path(path_type=Path)
PHOTO_SOURCES = ("detector", "landmarks", "detector_weights", "camera_from", "deep3d_weights")  # options


def photo_options(camera_help: str, aligned_help: str) -> Callable[[Command], Command]:
    """What the photos are: ``--aligned``, ``--camera``, how faces are found, ``--force``."""
    options = (
        click.option("--aligned", is_flag=True, help=aligned_help),
        click.option("--camera", default=None, help=camera_help),
        click.option(
            "--detector",
            type=click.Choice(["mtcnn", "dlib"]),
            default="mtcnn",
            show_default=True,
            help="Finds the face.",
        ),
        click.option(
            "--landmarks",
            type=PATH,
            default=None,
            help="Points from a file or folder instead: txt, npy, json; 5 or 68.",
        ),
        click.option("--detector-weights", type=PATH, default=None, help="MTCNN's folder or dlib's predictor file."),
        click.option("--face", type=int, default=None, help="Which face: 1 is the largest."),
        click.option("--force", is_flag=True, help="Take photos that the doctor refuses, if there is a face."),
    )
    return lambda function: with_options(function, options)


perceptual_option = click.option(
    "--perceptual",
    default="auto",
    show_default=True,
    help="LPIPS (VGG16) file; random: fixed random features; auto: the manifest's file if there.",
)
batch_option = click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Photos side by side."
)
resume_option = click.option("--resume", is_flag=True, help="Go on where the folders stand; the same options, please.")
max_points_option = click.option(
    "--max-points",
    type=click.IntRange(1),
    default=None,
    help="Field evaluations kept for the derivatives at a time; bounds the memory, costs time. [default: all]",
)
save_every_option = click.option(
    "--save-every",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Steps between two states on the disk.",
)
weights_option = click.option("--weights", default=None, help="ema or generator. [default: ema]")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")


def with_options(function: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """Add options; ``--help`` lists them in this order."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def lazy_detector(sources: dict[str, Any], device: str) -> Callable[[], Any]:
    """Gives the detector of ``--detector``, ``--landmarks`` and ``--detector-weights``, whose files are opened when it
    looks at the first picture: a picture that cannot be read is complained of before weights that are missing."""
    from facelab.data.preprocess.detectors import LateDetector, make_detector

    late = LateDetector(
        lambda: make_detector(
            sources["detector"], landmarks=sources["landmarks"], weights=sources["detector_weights"], device=device
        )
    )
    return lambda: late


def list_photos(photos: Sequence[Path]) -> list[Path]:
    """Files, and the pictures of folders. UserError for none, a missing one, or two of a name."""
    from facelab.errors import UserError

    found: list[Path] = []
    for photo in photos:
        if not photo.exists():
            raise UserError(f"no photo at {photo}: expected a picture file or a folder of them; check the path")
        found += pictures_of(photo) if photo.is_dir() else [photo]
    names = [path.stem for path in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two photos are called {twice[0]}, expected one of a name; rename one")
    if not found:
        raise UserError(f"no pictures in {photos[0]}: expected files such as .jpg or .png")
    return found


def pictures_of(folder: Path) -> list[Path]:
    """Pictures of a folder without the masks that lie beside them: NAME_mask.png, NAME_mask_edit.png."""
    from facelab.data import reading

    paths = reading.list_images(folder)
    names = {path.stem for path in paths}
    starts = {p: [p.stem[: m.start()] for m in re.finditer("_mask", p.stem)] for p in paths}
    return [path for path in paths if not names.intersection(starts[path])]


def matching(given: Path | None, photo: Path, photos: Sequence[Path], option: str, kinds: Sequence[str]) -> Path | None:
    """The file that belongs to a photo: the one given, or that of its name in the folder given. UserError for none."""
    from facelab.errors import UserError

    if given is None:
        return None
    if given.is_dir():
        for kind in kinds:
            path = given / f"{photo.stem}{kind}"
            if path.is_file() and path.resolve() != photo.resolve():
                return path
        raise UserError(f"{option}: nothing for {photo.name} in {given}, expected {photo.stem}{kinds[0]}")
    if not given.is_file():
        raise UserError(f"{option}: no file {given}; check the path")
    if len(photos) > 1:
        raise UserError(f"{option} {given} is one file for {len(photos)} photos, expected a folder")
    return given


def lazy_cameras(sources: dict[str, Any], device: str) -> Callable[[], Any]:
    """Makes what ``--camera-from`` and ``--deep3d-weights`` name when it is first needed; a network's file is opened
    when it looks at the first face."""
    from facelab.data.preprocess.cameras import late_camera_estimator

    @functools.cache
    def cameras() -> Any:
        return late_camera_estimator(sources["camera_from"], weights=sources["deep3d_weights"], device=device)

    return cameras
