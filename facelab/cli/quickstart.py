# SPDX-License-Identifier: Apache-2.0
"""What ``make quickstart`` runs: train on, then pictures, masks, a video and a mesh."""

from __future__ import annotations

import time
from pathlib import Path

import click

from facelab.cli.common import OneLineCommand, friendly

BUNDLED = "fenerf_synthetic_64"
FRAMES = 48
SIZE = 64  # pixels of pictures and video


@click.command("quickstart", cls=OneLineCommand)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True, help="Folder."
)
@click.option("--steps", type=click.IntRange(1), default=36, show_default=True, help="Training steps at 32 px.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the freshly made heads.")
@friendly
def quickstart(out: Path, steps: int, seed: int) -> None:
    """See the whole way in a few minutes, without a GPU or any download.

    The bundled model trains on freshly made synthetic heads, then shows what it knows.
    """
    import shutil

    from facelab import load
    from facelab.cli.render import extract_mesh, render_images, render_video
    from facelab.cli.train import run

    begin = time.monotonic()
    click.echo(f"1/4 training the bundled model for {steps} more steps at 32 px on fresh synthetic heads")
    run_dir = out / "run"
    if (run_dir / "checkpoints").exists():
        shutil.rmtree(run_dir)
    code = run("fenerf", "quickstart", out=run_dir, init_from=Path(BUNDLED), max_steps=steps, seed=seed, device="cpu")
    if code:
        raise SystemExit(code)
    load(run_dir)  # reads back what training wrote
    common = [str(run_dir), "--out", str(out), "--device", "cpu"]
    quality = ["--image-size", str(SIZE)]
    click.echo("2/4 pictures and masks from five views")
    render_images.main([*common, *quality, "--seeds", "0-3"], standalone_mode=False)
    click.echo(f"3/4 a turning video of {FRAMES} frames")
    video = ["--seeds", "0,1", "--num-frames", str(FRAMES), "--trajectory", "front", "--ray-step-multiplier", "1"]
    render_video.main([*common, *quality, *video, "--layers", "image,mask,depth"], standalone_mode=False)
    click.echo("4/4 a mesh")
    mesh = ["--seeds", "0", "--voxel-resolution", "96", "--cube-size", "0.24"]
    extract_mesh.main([*common, *mesh], standalone_mode=False)
    click.echo(f"done in {time.monotonic() - begin:.0f} s; everything lies in {out.resolve()}")
