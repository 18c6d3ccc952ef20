# SPDX-License-Identifier: Apache-2.0
"""pi-GAN's and FENeRF's settings out of range, and flags of their originals: one line that helps, before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from facelab.config import load_config
from facelab.methods import load_method
from tests.commands.running import DEBUG, command_of, invoke

OUT_OF_RANGE = {
    "model.hidden=-1": "model.hidden must be at least 1, got -1",
    "model.hidden=0": "model.hidden must be at least 1, got 0",
    "model.latent_dim=0": "model.latent_dim must be at least 1, got 0",
    "model.mapping_hidden=0": "model.mapping_hidden must be at least 1, got 0",
    "model.mapping_linears=0": "model.mapping_linears must be at least 2, got 0",
    "model.grid_size=[8]": "model.grid_size must be three counts",
    "model.grid_size=[0,8,8]": "model.grid_size must be at least 1, got [0, 8, 8]",
    "discriminator.channels=[8]": "discriminator.channels must be two counts or more",
    "discriminator.channels=[-1,8,8,8]": "discriminator.channels must be at least 1",
    "discriminator.chunk=0": "discriminator.chunk must be at least 1, got 0",
    "data.heads=0": "data.heads must be at least 1, got 0",
    "data.crop=0": "data.crop must be above 0, got 0.0",
    "data.crop=1.5": "data.crop must be between 0 and 1, got 1.5",
    "camera.yaw_mean=inf": "camera.yaw_mean must be finite, got inf",
    "camera.pitch_std=-1": "camera.pitch_std must be 0 or more, got -1.0",
    "camera.fov=0": "camera.fov must be above 0, got 0.0",
    "camera.fov=180": "camera.fov must be below 180 degrees, got 180.0",
    "render.resolution=0": "render.resolution must be at least 1, got 0",
    "render.samples=2": "render.samples must be at least 3, got 2",
    "render.near=0": "render.near must be above 0, got 0.0",
    "render.far=0.5": "render.near and render.far must satisfy 0 < near < far, got near=0.88, far=0.5",
    "render.max_points=0": "render.max_points must be at least 1, got 0",
    "render.noise_steps=-1": "render.noise_steps must be 0 or more, got -1",
    "loss.r1=-1": "loss.r1 must be 0 or more, got -1.0",
    "loss.pose=inf": "loss.pose must be finite, got inf",
    "loss.latent.{code}=-1": "loss.latent.{code} must be 0 or more, got -1.0",
    "loss.latent.{code}=.nan": "loss.latent.{code} must be finite, got nan",
    "loss.topk_interval=0": "loss.topk_interval must be at least 1, got 0",
    "loss.topk_floor=0": "loss.topk_floor must be above 0, got 0.0",
    "loss.fade_steps=-1": "loss.fade_steps must be 0 or more, got -1",
    "optim.generator_lr=-1": "optim.generator_lr must be 0 or more, got -1.0",
    "optim.image_lr=inf": "optim.image_lr must be finite, got inf",
    "optim.betas=[0,1]": "optim.betas must be 0 or more and below 1, got (0.0, 1.0)",
    "ema.decay=1": "ema.decay must be 0 or more and below 1, got 1.0",
    "log.sample_heads=0": "log.sample_heads must be at least 1, got 0",
    "log.sample_size=0": "log.sample_size must be at least 1, got 0",
}
OF_FENERF = {
    "loss.semantic=-1": "loss.semantic must be 0 or more, got -1.0",
    "loss.opacity=-1": "loss.opacity must be 0 or more, got -1.0",
    "loss.opacity_steps=-1": "loss.opacity_steps must be 0 or more, got -1",
    "optim.semantic_lr=-1": "optim.semantic_lr must be 0 or more, got -1.0",
}


def refused(command: str, *arguments: Any) -> str:
    """The line with which a command refuses its arguments."""
    result = invoke(command, *arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr.strip()


@pytest.mark.parametrize("method", ["pigan", "fenerf"])
def test_settings_out_of_range_are_refused_before_the_run(method: str) -> None:
    """The line names the setting, and the --set that gave it, whatever stands behind it."""
    code = {"pigan": "z", "fenerf": "z_app"}[method]
    for setting, words in (OUT_OF_RANGE | (OF_FENERF if method == "fenerf" else {})).items():
        setting, words = setting.format(code=code), words.format(code=code)
        line = refused(f"train_{method}", *DEBUG, "--dry-run", "--set", setting, "--set", "train.workers=0")
        assert line.startswith(f"error: --set {setting}: {words}"), line


def test_a_dry_run_sees_that_the_discriminators_chunks_cannot_be_shared() -> None:
    line = refused("train_fenerf", *DEBUG, "--dry-run", "--set", "discriminator.chunk=3")
    assert "a batch of 4 in chunks of 3" in line and "discriminator.chunk" in line


@pytest.mark.parametrize("method", ["pigan", "fenerf"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--output_dir", "--out FOLDER"),
        ("--load_dir", "--resume auto"),
        ("--load_step", "--resume RUN/checkpoints/STEP"),
        ("--set_step", "--init-from"),
        ("--n_epochs", "--max-steps"),
        ("--sample_interval", "log.samples_every"),
        ("--model_save_interval", "checkpoint.keep_every"),
        ("--eval_freq", "scripts/compute_metrics.py"),
        ("--num_gpus", "--gpus"),
        ("--port", "leave it out"),
    ],
)
def test_training_flags_of_the_original_are_answered_with_ours(method: str, flag: str, words: str) -> None:
    line = refused(f"train_{method}", flag, "1")
    assert line.startswith(f"error: {flag} is a flag of the original; here: ") and words in line


@pytest.mark.parametrize(
    ("command", "flag", "words"),
    [
        ("render_images", "--output_dir", "--out"),
        ("render_images", "--max_batch_size", "--max-points"),
        ("render_images", "--curriculum", "comes with the model"),
        ("render_video", "--interpolation_type", "leave it out"),
        ("render_video", "--save_with_video", "leave it out"),
        ("render_video", "--save_with_latent", "--save-latents"),
        ("render_video", "--num_frames", "--num-frames"),
        ("extract_mesh", "--latent_path", "--latents"),
        ("extract_mesh", "--seed", "--seeds"),
        ("extract_mesh", "--voxel_resolution", "--voxel-resolution"),
    ],
)
def test_other_flags_of_the_original_are_answered_with_ours(command: str, flag: str, words: str) -> None:
    line = refused(command, "fenerf_synthetic_64", flag, "1")
    assert line.startswith(f"error: {flag} is a flag of the original; here: ") and words in line


def test_metrics_flags_of_the_original_are_answered_with_ours() -> None:
    result = CliRunner().invoke(command_of("compute_metrics"), ["model", "--num_imgs", "8000"])
    assert result.exit_code == 2 and "here: --num-images" in result.stderr


@pytest.mark.parametrize("command", ["render_images", "render_video", "extract_mesh"])
def test_seeds_with_blanks_between_them_are_answered_with_commas(command: str) -> None:
    assert "--seeds 0,1,2" in refused(command, "fenerf_synthetic_64", "--seeds", "0", "1", "2")


@pytest.mark.parametrize("seeds", ["99999999999999999999", "0-99999999999"])
def test_seeds_out_of_range(seeds: str, tmp_path: Path) -> None:
    line = refused("render_images", "fenerf_synthetic_64", "--seeds", seeds, "--out", tmp_path / "imgs")
    assert "--seeds" in line and seeds in line and not (tmp_path / "imgs").exists()


def write_pictures(folder: Path) -> Path:
    """Two pictures with a bright middle of a quarter of the side, each with a mask."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(2):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[12:20, 12:20] = 255
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        Image.fromarray(np.ones((32, 32), np.uint8)).save(folder / "masks" / f"{number}.png")
    return folder


def test_settings_without_effect_are_told(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "set")
    dry = ("--dry-run", "--data", data)
    grid = ("--set", "model.grid_size=[4,4,4]")
    assert "has no latent grid" in refused("train_pigan", *DEBUG, "--dry-run", *grid)
    assert "has no latent grid" in refused("train_fenerf", *DEBUG, "--dry-run", *grid)
    assert "train.compile is on" in refused("train_fenerf", *DEBUG, "--dry-run", "--set", "train.compile=true")
    assert "data.chain cats is for pi-GAN" in refused("train_fenerf", *DEBUG, *dry, "--set", "data.chain=cats")
    told = invoke("train_fenerf", *DEBUG, *dry, "--set", "loss.real_pose=3")
    assert told.exit_code == 0 and "loss.real_pose=3 has no effect on them" in told.stdout
    assert "real_pose=" not in invoke("train_fenerf", *DEBUG, *dry).stdout


def test_pigan_crops_as_told(tmp_path: Path) -> None:
    """data.crop had no effect on it."""
    folder = write_pictures(tmp_path / "set") / "images"
    method = load_method("pigan")

    def bright(*settings: str) -> float:
        chosen = [f"data.path={folder}", "render.resolution=8", "data.cache=none", *settings]
        return float(
            (method.pictures(load_config(method.config_type, (), chosen)).item(0).float_image() > 0).float().mean()
        )

    assert bright("data.crop=0.25") == 1.0
    assert bright("data.crop=0.5") == 0.25
    assert bright() < 0.2 and bright("data.chain=cats") == 1 / 16
