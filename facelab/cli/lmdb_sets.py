# SPDX-License-Identifier: Apache-2.0
"""LMDB sets (StyleSDF, CNeRF) in prepare_data."""

from __future__ import annotations

from pathlib import Path

import click

from facelab.cli.common import OneLineCommand, friendly
from facelab.errors import UserError

PATH = click.Path(path_type=Path)
INSTEAD = {  # flags of the original's prepare_data that are not here -> what to do
    "--out_path": "the second argument: SRC DST",
    "--n_worker": "--workers",
}


@click.command("lmdb", cls=OneLineCommand, instead=INSTEAD)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--size", default="512,64", show_default=True, help="Sides in pixels, separated by commas.")
@click.option("--masks", type=PATH, help="Folder of masks (PNG or .npy), matched by name.  [default: those in SRC]")
@click.option("--parser", help="File of a face parser that makes the masks, or its name (fenerf_parser).")
@click.option(
    "--resample",
    type=click.Choice(["lanczos", "bilinear"]),
    default="lanczos",
    show_default=True,
    help="Filter of the pictures.",
)
@click.option(
    "--compression", type=click.IntRange(0, 9), default=6, show_default=True, help="Of PNG; 0 is large and fast."
)
@click.option("--workers", type=click.IntRange(1), help="Threads.  [default: the CPUs at hand]")
@click.option("--device", default="auto", show_default=True, help="Of the parser: auto, cpu, cuda, cuda:1 ...")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def lmdb(
    src: Path,
    dst: Path,
    size: str,
    masks: Path | None,
    parser: str | None,
    resample: str,
    compression: int,
    workers: int | None,
    device: str,
    quiet: bool,
) -> None:
    """Pictures in SRC and its subfolders to an LMDB in the folder DST, as StyleSDF and CNeRF read it.

    Short sides are brought to each size and the middle square is kept. With masks (CNeRF needs them), label maps go to
    folders beside DST: every 'lmdb' in DST's name becomes 'mask_SIZE'; a name without 'lmdb' gets DST/mask_SIZE.

    Give the same command again after an interruption: what is done is kept, and DST is no complete set before the end.
    """
    from facelab.cli.common import pick_device
    from facelab.cli.parser import find_parser
    from facelab.data.lmdb_prepare import prepare_lmdb

    report = prepare_lmdb(
        src,
        dst,
        _sizes(size),
        masks=masks,
        parser=None if parser is None else find_parser(parser),
        resample=resample,
        compression=compression,
        workers=workers,
        device="cpu" if parser is None else pick_device(device),
        progress=not quiet,
    )
    click.echo("\n".join([f"{dst}: {report.lines()[0]}", *report.lines()[1:]]))


def check_lmdb(folder: Path, masks: Path | None, fast: bool) -> int:
    """Check an LMDB and the label maps beside it, say what was found, and return the number of problems."""
    from facelab.data.lmdb_dataset import AUTO, inspect_lmdb
    from facelab.data.prepare import histogram_lines

    problems, lines, report = inspect_lmdb(folder, AUTO if masks is None else masks, fast)
    for line in problems[:20]:
        click.echo(line, err=True)
    lines += [f"note: {note}" for note in report.notes]
    if report.class_pixels is not None and report.class_images is not None:
        lines += histogram_lines(report.class_pixels, report.class_images, report.decoded)
    click.echo("\n".join([f"{folder}: {lines[0]}", *lines[1:]]))
    return len(problems)


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UserError(f"--size must be pixels separated by commas such as 512,64, got {text!r}")
    return [int(part) for part in parts]


COMMANDS = (lmdb,)
