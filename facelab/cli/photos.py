# SPDX-License-Identifier: Apache-2.0
"""prepare_photo and ``prepare_data.py photos``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click

from facelab.cli.common import OneLineCommand, friendly

PATH = click.Path(path_type=Path)


def _finding(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where faces and points come from."""
    options = (
        click.option(
            "--detector",
            type=click.Choice(["mtcnn", "dlib"]),
            default="mtcnn",
            show_default=True,
            help="mtcnn: 5 points (pip install --no-deps facenet-pytorch). dlib: 68 points.",
        ),
        click.option("--landmarks", type=PATH, help="Points from a file or folder instead: txt, npy, json; 5 or 68."),
        click.option("--detector-weights", type=PATH, help="MTCNN's folder or dlib's predictor file."),
        click.option("--size", type=click.IntRange(16), default=512, show_default=True, help="Pixels of the crop."),
        click.option("--standard-points", type=PATH, help="Official standard points of the crop (.mat, .npy, .txt)."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command("prepare_photo", cls=OneLineCommand)
@click.argument("photo", type=PATH)
@click.option("--out", type=PATH, help="Folder of the results.  [default: PHOTO's name + _prepared, beside it]")
@click.option("--face", type=int, help="Which face: 1 is the largest, as numbered in the overlay.")
@_finding
@click.option("--coefficients", type=PATH, help="Deep3DFaceRecon's result for this face: camera from there.")
@click.option("--force", is_flag=True, help="Write crop and camera of a refused photo, too.")
@friendly
def prepare_photo(
    photo: Path,
    out: Path | None,
    face: int | None,
    detector: str,
    landmarks: Path | None,
    detector_weights: Path | None,
    size: int,
    standard_points: Path | None,
    coefficients: Path | None,
    force: bool,
) -> None:
    """Crop PHOTO as EG3D does, estimate its camera, and say whether it is fit for use.

    Writes NAME.png (crop), NAME.npy (25 camera numbers), NAME.json (everything found) and NAME_overlay.png.
    Exit status: 0 fit for use, 1 not, 2 an error.
    """
    from facelab.data.preprocess import doctor
    from facelab.data.preprocess.detectors import make_detector
    from facelab.data.preprocess.head_points import read_standard_points

    found = doctor.prepare_photo(
        photo,
        make_detector(detector, landmarks=landmarks, weights=detector_weights),
        face=face,
        size=size,
        standard=None if standard_points is None else read_standard_points(str(standard_points)),
        coefficients=None if coefficients is None else doctor.read_coefficients(coefficients),
    )
    folder = photo.parent / f"{photo.stem}_prepared" if out is None else out
    files = found.save(folder, force=force)
    click.echo("\n".join(found.lines()))
    click.echo("written: " + ", ".join(str(path) for path in files.values()))
    if not found.go and not force:
        raise SystemExit(1)


@click.command("photos", cls=OneLineCommand)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@_finding
@click.option("--mirror", is_flag=True, help="Also write every crop and camera mirrored.")
@click.option("--force", is_flag=True, help="Take refused photos, too, if there is a face.")
@click.option("--overlays", type=PATH, help="Folder for pictures of what was found (outside OUT).")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def photos(
    source: Path,
    target: Path,
    detector: str,
    landmarks: Path | None,
    detector_weights: Path | None,
    size: int,
    standard_points: Path | None,
    mirror: bool,
    force: bool,
    overlays: Path | None,
    workers: int,
    quiet: bool,
) -> None:
    """Photos in IN (and its subfolders) to aligned crops with cameras in OUT, as EG3D's training reads them.

    Give the same command again after an interruption: photos that are done are kept.
    """
    from facelab.data.preprocess.photos import PhotoSettings, prepare_photos

    paths = (landmarks, detector_weights, standard_points)
    points, weights, standard = ("" if path is None else str(path) for path in paths)
    settings = PhotoSettings(detector, points, weights, size, standard, mirror, force)
    report = prepare_photos(source, target, settings, overlays=overlays, workers=workers, progress=not quiet)
    first, *rest = report.lines()
    click.echo("\n".join([f"{target}: {first}", *rest]))
