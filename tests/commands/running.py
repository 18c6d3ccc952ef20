# SPDX-License-Identifier: Apache-2.0
"""Commands run in this process, on the smallest models there are."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner, Result

from facelab.cli.convert import convert_checkpoint
from facelab.cli.edit_cnerf import edit_cnerf
from facelab.cli.facednerf import edit_facednerf, generate_facednerf, invert_eg3d, relight_facednerf
from facelab.cli.render import extract_mesh, render_images, render_video
from facelab.cli.train import train_command
from tests.conftest import CHECKOUT

COMMANDS: dict[str, click.Command] = {
    "train_fenerf": train_command("fenerf", "celebamask_hq_128"),
    "train_pigan": train_command("pigan", "celeba"),
    "train_eg3d": train_command("eg3d", "ffhq_512"),
    "train_stylesdf": train_command("stylesdf", "ffhq_volume"),
    "train_cnerf": train_command("cnerf", "ffhq_volume"),
    "render_images": render_images,
    "render_video": render_video,
    "extract_mesh": extract_mesh,
    "edit_cnerf": edit_cnerf,
    "invert_eg3d": invert_eg3d,
    "edit_facednerf": edit_facednerf,
    "relight_facednerf": relight_facednerf,
    "generate_facednerf": generate_facednerf,
    "convert_checkpoint": convert_checkpoint,
}
QUIET = ("--device", "cpu", "--set", "log.progress=false", "--set", "log.samples_every=0")
DEBUG = ("--curriculum", "debug", *QUIET)
ORIGINALS = CHECKOUT / "test_data" / "golden"
GENERATOR = ORIGINALS / "fenerf" / "checkpoint_fixture_generator.pth"


@cache
def command_of(script: str) -> click.Command:
    """The command behind ``scripts/<script>.py``, as the script finds it."""
    if script in COMMANDS:
        return COMMANDS[script]
    module = runpy.run_path(str(CHECKOUT / "scripts" / f"{script}.py"))
    return next(value for value in module.values() if isinstance(value, click.Command))


def invoke(command: str, *arguments: Any) -> Result:
    """Run a command here. Errors that are not meant for users come through."""
    result = CliRunner().invoke(COMMANDS[command], [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(command: str, *arguments: Any) -> Result:
    result = invoke(command, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def train(out: Path, *arguments: Any, method: str = "fenerf") -> Path:
    """A run of the debug curriculum; returns its folder."""
    succeed(f"train_{method}", *DEBUG, "--out", out, *arguments)
    return out


def script(name: str, *arguments: Any, code: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``scripts/<name>.py`` (or ``code``, which may prepare something first) in a process of its own."""
    start = ["-c", code] if code else [str(CHECKOUT / "scripts" / f"{name}.py")]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=CHECKOUT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment() -> dict[str, str]:
    # as many threads as here: sums of several threads round otherwise, and runs are compared bit for bit
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": ""}
