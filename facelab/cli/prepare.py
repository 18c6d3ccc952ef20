# SPDX-License-Identifier: Apache-2.0
"""prepare_data: make and check the data sets that training reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click

from facelab.cli.common import OneLineGroup, friendly
from facelab.cli.lmdb_sets import COMMANDS as LMDB
from facelab.cli.lmdb_sets import check_lmdb
from facelab.cli.parser import masks
from facelab.cli.photos import photos
from facelab.cli.prepare_eg3d import COMMANDS as EG3D
from facelab.cli.prepare_eg3d import check_cameras_of, has_cameras
from facelab.errors import UserError

FOLDER = click.Path(path_type=Path)


def _making(command: Callable[..., None]) -> Callable[..., None]:
    """Options that the commands which make pairs have in common."""
    options = (
        click.option(
            "--size", default=512, show_default=True, help="Short side of the pictures in pixels; never enlarged."
        ),
        click.option("--workers", type=click.IntRange(1), help="Worker processes.  [default: the CPUs at hand]"),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.group("prepare_data", cls=OneLineGroup)
def prepare_data() -> None:
    """Make and check the data sets that training reads."""


@prepare_data.command("celebamask-hq")
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
@_making
@friendly
def celebamask_hq(src: Path, dst: Path, size: int, workers: int | None, quiet: bool) -> None:
    """CelebAMask-HQ as downloaded (CelebA-HQ-img, CelebAMask-HQ-mask-anno) in SRC to pairs in DST.

    Give the same command again after an interruption: pairs that are done are kept.
    """
    from facelab.data.prepare import prepare_celebamask_hq

    _tell(prepare_celebamask_hq(src, dst, size, workers, not quiet).lines(), dst)


@prepare_data.command()
@click.argument("src_images", type=FOLDER)
@click.argument("src_masks", type=FOLDER)
@click.argument("dst", type=FOLDER)
@click.option(
    "--labels",
    type=click.Choice(["celebamask", "sofgan"]),
    default="celebamask",
    show_default=True,
    help="Class numbers of the masks.",
)
@_making
@friendly
def ffhq(
    src_images: Path, src_masks: Path, dst: Path, labels: str, size: int, workers: int | None, quiet: bool
) -> None:
    """FFHQ or other pictures in SRC_IMAGES with masks in SRC_MASKS (any subfolders) to pairs in DST.

    Masks hold class numbers or the colours of the palette and are matched by relative path or name.
    """
    from facelab.data.prepare import prepare_ffhq

    _tell(prepare_ffhq(src_images, src_masks, dst, size, workers, not quiet, labels).lines(), dst)


@prepare_data.command()
@click.argument("dst", type=FOLDER)
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="Number of heads.")
@click.option("--size", type=click.IntRange(8), default=128, show_default=True, help="Side of the pictures in pixels.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same heads.")
@click.option("--background", default="black", show_default=True, help="Behind the heads: black, grey or white.")
@friendly
def synthetic(dst: Path, count: int, size: int, seed: int, background: str) -> None:
    """Made-up heads with exact masks in DST: nothing to download, free to use.

    Give the same command again after an interruption: heads that are done are kept.
    """
    from facelab.data.synthetic import write_dataset

    write_dataset(dst, count=count, size=size, seed=seed, background=background)
    click.echo(f"{count} heads in {dst}")


@prepare_data.command()
@click.argument("folder", metavar="DATASET", type=FOLDER)
@click.option("--fast", is_flag=True, help="Of large sets, decode a sample of 64 only.")
@click.option("--picture", type=FOLDER, help="Sets with cameras: also draw poses and extreme pictures into this file.")
@click.option("--report", type=FOLDER, help="Sets with cameras: also write everything found into this JSON file.")
@click.option("--masks", type=FOLDER, help="LMDB: folder of the label maps.  [default: beside the LMDB]")
@friendly
def check(folder: Path, fast: bool, picture: Path | None, report: Path | None, masks: Path | None) -> None:
    """Look at every file of a data set; exit status 2 if something is wrong.

    DATASET is a folder of pictures with masks, a folder or zip of pictures with cameras (dataset.json), or an LMDB.
    Of cameras it says convention, radius, histogram of poses with the deviations it implies; of masks whether
    they fit their pictures; of pictures which are damaged or copies; of an LMDB its sizes and what is missing.
    """
    from facelab.data.lmdb_store import is_lmdb

    if is_lmdb(folder):
        if picture or report:
            raise UserError("--picture and --report are for sets with cameras; leave them out for an LMDB")
        problems = check_lmdb(folder, masks, fast)
        if problems:
            raise UserError(f"{folder}: {problems} problems; mend what is named above or convert the pictures again")
        return
    if masks:
        raise UserError(f"--masks is for an LMDB, and {folder} is none; leave it out")
    with_cameras = has_cameras(folder)
    if not with_cameras and (picture or report):
        raise UserError(f"--picture and --report are for sets with cameras, and {folder} states none (dataset.json)")
    if not with_cameras:
        _check_pairs(folder, fast)
    elif check_cameras_of(folder, fast, picture, report):
        raise UserError(f"{folder} cannot be used as it is; mend what is called a problem above")


def _check_pairs(folder: Path, fast: bool) -> None:
    from facelab.data.celebamask_hq import CelebAMaskHQ
    from facelab.data.prepare import histogram_lines

    problems, report = CelebAMaskHQ(folder, 1, cache="none").inspect(fast)
    for line in problems[:20]:
        click.echo(line, err=True)
    width, height = report.smallest
    lines = [f"{report.samples} pairs, {report.decoded} decoded and sound, smallest picture {width}x{height}"]
    lines += [f"note: {note}" for note in report.notes]
    lines += histogram_lines(report.class_pixels or (), report.class_images or (), report.decoded)
    _tell(lines, folder)
    if problems:
        raise UserError(f"{len(problems)} of {report.samples} pairs cannot be used; mend or remove them")


def _tell(lines: list[str], folder: Path) -> None:
    click.echo("\n".join([f"{folder}: {lines[0]}", *lines[1:]]))


for _command in (*EG3D, *LMDB, photos, masks):
    prepare_data.add_command(_command)
