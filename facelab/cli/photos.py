# SPDX-License-Identifier: Apache-2.0
"""prepare_photo and ``prepare_data.py photos``, and the options by which every command finds faces and cameras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from facelab.cli.common import Command, OneLineCommand, friendly
from facelab.cli.photo_input import PATH, with_options
from facelab.errors import UserError


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options in the order in which the help shows them."""
    return lambda command: with_options(command, options)


def _camera_options(default: str | None, help_text: str) -> Callable[[Command], Command]:
    return _options(
        click.option(
            "--camera-from",
            type=click.Choice(["points", "deep3d"]),
            default=default,
            show_default=True,
            help=f"{help_text}points: the head fitted to the points. deep3d: Deep3DFaceRecon's network.",
        ),
        click.option(
            "--deep3d-weights", type=PATH, help="Its epoch_20.pth.  [default: the imported one, see weights.py list]"
        ),
    )


def _finding_options(camera: Callable[[Command], Command], detector: str | None) -> Callable[[Command], Command]:
    return _options(
        click.option(
            "--detector",
            type=click.Choice(["mtcnn", "dlib"]),
            default=detector,
            show_default=True,
            help="mtcnn: 5 points (pip install --no-deps facenet-pytorch). dlib: 68 points.",
        ),
        click.option("--landmarks", type=PATH, help="Points from a file or folder instead: txt, npy, json; 5 or 68."),
        click.option("--detector-weights", type=PATH, help="MTCNN's folder or dlib's predictor file."),
        click.option("--standard-points", type=PATH, help="Official standard points of the crop (.mat, .npy, .txt)."),
        camera,
    )


camera_options = _camera_options("points", "")  # for every command that takes photos
finding_options = _finding_options(camera_options, "mtcnn")
optional_finding_options = _finding_options(  # for a command that takes photos among other things
    _camera_options(None, "SRC holds photographs as they come: find faces, crop, and estimate cameras. "), None
)
FINDING = ("detector", "landmarks", "detector_weights", "standard_points", "camera_from", "deep3d_weights")
SIZE = click.option("--size", type=click.IntRange(16, 8192), default=512, show_default=True, help="Pixels of the crop.")


@click.command("prepare_photo", cls=OneLineCommand)
@click.argument("photo", type=PATH)
@click.option("--out", type=PATH, help="Folder of the results.  [default: PHOTO's name + _prepared, beside it]")
@click.option("--face", type=int, help="Which face: 1 is the largest, as numbered in the overlay.")
@SIZE
@finding_options
@click.option("--coefficients", type=PATH, help="Deep3DFaceRecon's result for this face: camera from there.")
@click.option("--force", is_flag=True, help="Write crop and camera of a refused photo, too.")
@friendly
def prepare_photo(
    photo: Path,
    out: Path | None,
    face: int | None,
    size: int,
    detector: str,
    landmarks: Path | None,
    detector_weights: Path | None,
    standard_points: Path | None,
    camera_from: str,
    deep3d_weights: Path | None,
    coefficients: Path | None,
    force: bool,
) -> None:
    """Crop PHOTO as EG3D does, estimate its camera, and say whether it is fit for use.

    Writes NAME.png (crop), NAME.npy (25 camera numbers), NAME.json (everything found) and NAME_overlay.png.
    Exit status: 0 fit for use (or --force), 1 not, 2 an error.
    """
    from facelab.cli.photo_input import lazy_detector
    from facelab.data.preprocess import doctor
    from facelab.data.preprocess.cameras import GivenCoefficients, late_camera_estimator, read_coefficients
    from facelab.data.preprocess.head_points import read_standard_points

    if coefficients is not None and camera_from != "points":
        raise UserError(
            "the camera comes from --coefficients or from --camera-from deep3d, expected one of them, got both"
        )
    standard = None if standard_points is None else read_standard_points(str(standard_points))
    estimator = late_camera_estimator(camera_from, weights=deep3d_weights, standard=standard)
    sources = {"detector": detector, "landmarks": landmarks, "detector_weights": detector_weights}
    found = doctor.prepare_photo(
        photo,
        lazy_detector(sources, "cpu")(),
        face=face,
        size=size,
        standard=standard,
        camera=estimator if coefficients is None else GivenCoefficients(*read_coefficients(coefficients)),
    )
    folder = photo.parent / f"{photo.stem}_prepared" if out is None else out
    outdated = found.outdated(folder, force=force)
    files = found.save(folder, force=force)
    click.echo("\n".join(found.lines()))
    click.echo("written: " + ", ".join(str(path) for path in files.values()))
    if outdated:
        click.echo("removed, from an earlier run: " + ", ".join(str(path) for path in outdated))
    if "crop" not in files:
        raise SystemExit(1)


@click.command("photos", cls=OneLineCommand)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@SIZE
@finding_options
@click.option("--mirror", is_flag=True, help="Also write every crop and camera mirrored.")
@click.option("--force", is_flag=True, help="Take refused photos, too, if there is a face.")
@click.option("--overlays", type=PATH, help="Folder for pictures of what was found (outside OUT).")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def photos(source: Path, target: Path, overlays: Path | None, workers: int, quiet: bool, **options: Any) -> None:
    """Photos in IN (and its subfolders) to aligned crops with cameras in OUT, as EG3D's training reads them.

    Give the same command again after an interruption: photos that are done are kept.
    """
    prepare_folder(source, target, overlays=overlays, workers=workers, quiet=quiet, **options)


def prepare_folder(
    source: Path,
    target: Path,
    *,
    overlays: Path | None,
    workers: int,
    quiet: bool,
    standard_points: Path | None,
    detector_weights: Path | None,
    landmarks: Path | None,
    deep3d_weights: Path | None,
    **same: Any,
) -> None:
    """Prepare a folder of photos and say what came of it; ``same`` are options named as in PhotoSettings."""
    from facelab.data.preprocess.photos import PhotoSettings, prepare_photos

    files = {
        "landmarks": landmarks,
        "weights": detector_weights,
        "standard": standard_points,
        "deep3d_weights": deep3d_weights,
    }
    settings = PhotoSettings(**same, **{name: "" if path is None else str(path) for name, path in files.items()})
    report = prepare_photos(source, target, settings, overlays=overlays, workers=workers, progress=not quiet)
    first, *rest = report.lines()
    click.echo("\n".join([f"{target}: {first}", *rest]))
