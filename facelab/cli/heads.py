# SPDX-License-Identifier: Apache-2.0
"""make_synthetic_heads."""

from __future__ import annotations

from pathlib import Path

import click

from facelab.cli.common import OneLineCommand, friendly
from facelab.errors import UserError


@click.command("make_synthetic_heads", cls=OneLineCommand)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the data set (FENeRF's layout).")
@click.option("--count", default=1000, show_default=True, help="Number of heads.")
@click.option("--size", default=128, show_default=True, help="Side of the pictures in pixels.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same heads.")
@click.option("--workers", type=int, help="Processes; more than 1 pays for thousands of heads.  [default: 1]")
@click.option("--format", "picture_format", default="jpg", show_default=True, help="Picture format: jpg or png.")
@click.option("--background", default="black", show_default=True, help="Behind the heads: black, grey or white.")
@click.option("--overwrite", is_flag=True, help="Replace a data set that is already there.")
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="Also draw the first heads (at most 32) into this picture."
)
@click.option("--sheet-masks", is_flag=True, help="Segmentation masks below each row of the sheet.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def make_synthetic_heads(
    out: Path | None,
    count: int,
    size: int,
    seed: int,
    workers: int | None,
    picture_format: str,
    background: str,
    overwrite: bool,
    sheet: Path | None,
    sheet_masks: bool,
    quiet: bool,
) -> None:
    """Made-up heads with exact masks, cameras, lights and landmarks: nothing to download, free to use."""
    if out is None and sheet is None:
        raise UserError("nothing to do: give --out FOLDER, --sheet PICTURE or both")
    from facelab.data.synthetic_files import write_dataset, write_sheet

    if out is not None:
        write_dataset(
            out, count, size, seed, workers=workers, picture_format=picture_format, background=background,
            overwrite=overwrite, progress=not quiet,
        )  # fmt: skip
        click.echo(f"{count} heads of {size} px in {out}")
    if sheet is not None:
        shown = min(max(count, 1), 32)
        made = write_sheet(sheet, shown, size, seed, masks=sheet_masks, background=background)
        click.echo(f"contact sheet in {made}")
