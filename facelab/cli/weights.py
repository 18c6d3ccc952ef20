# SPDX-License-Identifier: Apache-2.0
"""The commands of scripts/weights.py; the work is in :mod:`facelab.weights`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from facelab.cli.common import OneLineGroup, friendly


@click.group("weights", cls=OneLineGroup)
def weights() -> None:
    """Weight files of other projects: what there is, what is missing, where it belongs."""


@weights.command("list")
@click.option("--method", default=None, help="Only files for this method or base, for example fenerf.")
@click.option("--missing", is_flag=True, help="Only files that are not there.")
@click.argument("name", required=False)
@friendly
def list_weights(method: str | None, missing: bool, name: str | None) -> None:
    """Show the manifest as a table, or all about one NAME."""
    from facelab import weights as logic

    click.echo(logic.details(name) if name else logic.table(method=method, missing_only=missing))


@weights.command()
@click.argument("names", nargs=-1)
@friendly
def verify(names: tuple[str, ...]) -> None:
    """Check the files that are there (or NAMES) by checksum or structure; status 1 if one is damaged."""
    from facelab import weights as logic

    checks = logic.verify(names)
    for check in checks:
        word = {True: "ok", False: "BAD", None: "?"}[check.ok]
        click.echo(f"{word:3}  {check.asset.name}  {check.path}: {check.detail}")
    if not checks:
        click.echo("no file of the manifest is there; 'list' shows what is missing")
    sys.exit(1 if any(check.ok is False for check in checks) else 0)


@weights.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--link", is_flag=True, help="Make symbolic links instead of copies.")
@friendly
def import_weights(folder: Path, link: bool) -> None:
    """Find official files in FOLDER by content, whatever their names, and put them in their places."""
    from facelab import weights as logic

    results = logic.import_folder(
        folder, link, lambda result: click.echo(f"{'+' if result.target else '-'} {result.source}: {result.detail}")
    )
    click.echo(f"{sum(result.target is not None for result in results)} of {len(results)} files recognised")


@weights.command()
@click.argument("name")
@click.option("--url", default=None, help="Address to use instead of the manifest's.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def fetch(name: str, url: str | None, quiet: bool) -> None:
    """Download the file NAME of the manifest; goes on where a broken transfer stopped."""
    from facelab import weights as logic

    click.echo(f"saved {logic.fetch(name, url, progress=not quiet)}")
