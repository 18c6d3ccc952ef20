# SPDX-License-Identifier: Apache-2.0
"""train_stylesdf on the debug curricula: one stage after the other, the original's flags, data, refusals."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import facelab
from facelab.bases.stylesdf.config import StyleSdfConfig
from facelab.bases.stylesdf.training import METHOD
from facelab.checkpoints.format import load_checkpoint
from facelab.config import from_dict, list_curricula
from tests.commands.running import DEBUG, QUIET, invoke, succeed, train

FULL = (*QUIET, "--curriculum", "debug_full")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first stage."""
    return train(tmp_path_factory.mktemp("stylesdf") / "volume", "--stage", "volume", method="stylesdf")


@pytest.fixture(scope="module")
def full(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the second stage on it."""
    out = tmp_path_factory.mktemp("stylesdf") / "full"
    result = succeed("train_stylesdf", *FULL, "--stage", "full", "--init-from", volume, "--out", out)
    assert f"the renderer is that of {volume} and stays as it is" in result.stdout
    return out


def resolved(*arguments: Any, curriculum: str = "debug") -> tuple[StyleSdfConfig, str]:
    """The configuration that ``--dry-run`` prints, and the lines above it."""
    output = succeed("train_stylesdf", *QUIET, "--curriculum", curriculum, "--dry-run", *arguments).stdout
    above, _, text = output.partition("stage: ")
    return from_dict(StyleSdfConfig, yaml.safe_load("stage: " + text)).at(0), above


def refused(*arguments: Any) -> str:
    result = invoke("train_stylesdf", *arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# --- runs


def test_both_stages_and_what_they_write(volume: Path, full: Path) -> None:
    first, second = load_checkpoint(volume), load_checkpoint(full)
    assert (first.meta["stage"], second.meta["stage"], first.step, second.step) == ("volume", "full", 2, 2)
    assert set(second.weights) == {"generator", "discriminator", "path", "ema"}
    assert second.meta["config"]["init_from"] == str(volume)  # type: ignore[index]
    switches = {d["switch"] for d in second.meta["deviations"]}  # type: ignore[union-attr]
    assert {"reference.sum_chunks", "reference.strided_groups"} <= switches
    key = "field_net.layers.0.weight"
    assert torch.equal(second.weights["generator"][key], first.weights["ema"][key])
    for run, side in ((volume, 8), (full, 16)):
        model = facelab.load(run)
        assert model.render(model.codes(1)).rgb.shape == (1, 3, side, side)


def test_a_second_stage_goes_on_without_its_first(volume: Path, full: Path, tmp_path: Path) -> None:
    """Bit for bit, and the file that it started from need not be named again."""
    succeed("train_stylesdf", *FULL, "--init-from", volume, "--out", tmp_path / "run", "--max-steps", 1)
    succeed("train_stylesdf", *FULL, "--resume", "auto", "--out", tmp_path / "run")
    parts, whole = load_checkpoint(tmp_path / "run"), load_checkpoint(full)
    assert parts.step == whole.step == 2
    for group, tensors in whole.weights.items():
        assert all(torch.equal(parts.weights[group][key], value) for key, value in tensors.items()), group
    assert parts.meta["config"]["init_from"] == str(volume)  # type: ignore[index]


def test_a_script_may_name_the_first_stage_again(volume: Path, tmp_path: Path) -> None:
    """The same command with --resume auto, also when the first stage is gone; another one is a change."""
    moved = tmp_path / "first"
    shutil.copytree(volume, moved)
    options = (*FULL, "--init-from", moved, "--resume", "auto", "--out", tmp_path / "run")
    succeed("train_stylesdf", *options, "--max-steps", 1)
    shutil.rmtree(moved)
    succeed("train_stylesdf", *options)
    assert load_checkpoint(tmp_path / "run").step == 2
    line = refused(*FULL, "--init-from", volume, "--resume", "auto", "--out", tmp_path / "run")
    assert f"init_from was '{moved}', now '{volume}'" in line


def test_places_of_the_original(tmp_path: Path) -> None:
    """An experiment has a folder for each stage; the second finds the first, and goes on at a step."""
    place = ("--expname", "mine", "--checkpoints_dir", tmp_path / "all")
    succeed("train_stylesdf", *DEBUG, *place)
    options = (*FULL, *place, "--set", "checkpoint.every=1")
    result = succeed("train_stylesdf", *options)
    folder = tmp_path / "all" / "mine"
    assert f"the renderer is that of {folder / 'volume_renderer'}" in result.stdout
    succeed("train_stylesdf", *options, "--continue_training", "--ckpt", 1, "--max-steps", 3)
    assert load_checkpoint(folder / "full_pipeline").step == 3
    for extra, words in {
        ("--out", "here"): "both name the run folder",
        ("--ckpt", "1"): "with --continue_training",
        ("--continue_training", "--resume", "auto"): "say the same",
    }.items():
        assert words in refused(*options, *extra)
    assert "--checkpoints_dir needs --expname" in refused(*DEBUG, "--checkpoints_dir", tmp_path)
    assert "--size 16: the volume stage is trained on pictures of the rendering's size, 8" in refused(
        *DEBUG, "--size", 16
    )


def test_rows_cannot_change_the_stage(tmp_path: Path) -> None:
    rows = "base: {}\nstages: [{{from_step: 0}}, {{from_step: 1, {}}}]\n"
    debug = next(c.path for c in list_curricula("stylesdf") if c.name == "debug")
    for change, words in {"stage: full": "stage from volume to full", "render.resolution: 16": "from 8 to 16"}.items():
        (tmp_path / "mine.yaml").write_text(rows.format(debug, change))
        line = refused(*QUIET, "--curriculum", tmp_path / "mine.yaml", "--out", tmp_path / "run")
        assert "stages[1] changes" in line and words in line


def test_fine_tuning_starts_from_everything(volume: Path, full: Path, tmp_path: Path) -> None:
    """A volume model for a volume stage is not taught the sphere again; a whole one for a full stage."""
    still = ("--max-steps", 1, "--set", "optim.volume_generator_lr=0", "--set", "optim.full_lr=0")
    for name, source, options in (("volume", volume, DEBUG), ("full", full, FULL)):
        succeed("train_stylesdf", *options, "--init-from", source, "--out", tmp_path / name, *still)
        run, origin = load_checkpoint(tmp_path / name), load_checkpoint(source)
        assert run.meta["config"]["sphere"]["steps"] == (0 if name == "volume" else 2)  # type: ignore[index]
        for key, value in origin.weights["ema"].items():
            assert torch.equal(run.weights["generator"][key], value), key
        judge = "discriminator"
        assert name == "volume" or all(torch.equal(run.weights[judge][k], v) for k, v in origin.weights[judge].items())
    assert "cannot start a run of stage volume" in refused(*DEBUG, "--init-from", full, "--out", tmp_path / "x")


def test_curricula_are_listed_with_their_original_names() -> None:
    lines = succeed("train_stylesdf", "--list-curricula").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [c.name for c in list_curricula("stylesdf")]
    assert next(line for line in lines if line.startswith("ffhq_full_1024")).endswith(
        "(original: ffhq_full, ffhq1024x1024)"
    )


# --- flags


def test_flags_of_the_original_are_settings(volume: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    config, _ = resolved(
        "--batch", 8, "--chunk", 4, "--iter", 7, "--r1", 50, "--view_lambda", 3, "--eikonal-lambda", 0.2,
        "--min_surf_lambda", 0.01, "--min_surf_beta", 10, "--azim", 0.15, "--elev", 0.1, "--fov", 5, "--uniform",
        "--no_sphere_init", "--no_offset_sampling", "--N_samples", 6, "--perturb", 0, "--static_viewdirs",
        "--force_background", "--no_z_normalize", "--depth", 3, "--width", 12, "--style_dim", 10,
        "--dist_radius", 0.2, "--val_n_sample", 5, "--dataset_path", tmp_path,
    )  # fmt: skip
    assert (config.train.batch_per_gpu, config.train.batch_size, config.train.batch_chunk) == (8, None, 4)
    loss = config.loss
    assert (loss.r1, loss.view, loss.eikonal, loss.surface, loss.surface_sharpness) == (50, 3, 0.2, 0.01, 10)
    view = config.view
    assert (view.azimuth, view.elevation, view.fov, view.distribution, view.dist_radius) == (
        0.15, 0.1, 10, "uniform", 0.2,
    )  # fmt: skip
    r, m = config.render, config.model
    assert (r.sampling, r.samples, r.jitter, r.static_views, r.background) == ("stratified", 6, False, True, "last")
    assert (m.normalize_points, m.layers, m.width, m.style_dim, m.latent_dim) == (False, 3, 12, 10, 10)
    assert (config.train.max_steps, config.sphere.steps, config.log.sample_heads) == (7, 0, 5)
    assert config.data.path == str(tmp_path)
    config, _ = resolved(
        "--init-from", volume, "--size", 32, "--lr", 0.001, "--mixing", 0.5, "--d_reg_every", 8, "--g_reg_every", 2,
        "--path_regularize", 1, "--path_batch_shrink", 4, "--lr_mapping", 0.1, "--channel_multiplier", 1, "--wandb",
        curriculum="debug_full",
    )  # fmt: skip
    assert (config.model.resolution, config.model.decoder_lr_mul, config.model.channel_multiplier) == (32, 0.1, 1)
    loss = config.loss
    assert (loss.mixing, loss.r1_every, loss.path_every, loss.path, loss.path_shrink) == (0.5, 8, 2, 1, 4)
    assert config.optim.full_lr == 0.001 and config.log.wandb
    assert resolved("--no_sdf", "--raw_noise_std", 0.5)[0].render.density_noise == 0.5


def test_numbers_that_are_none_are_refused_by_the_name_of_the_flag() -> None:
    for flag, value in (("--r1", "nan"), ("--fov", "inf"), ("--azim", "nan"), ("--mixing", "nan")):
        assert f"'{flag}': expected a finite number, got {value}" in refused(*FULL, flag, value)
    assert refused("--identities", 3).startswith("error: --identities is a flag of the original; here: scripts/render")


def test_the_default_curriculum_follows_the_stage(volume: Path) -> None:
    words = ("--data", "", "--dry-run", "--set", "render.resolution=8")
    small = [x for key in ("width", "style_dim", "latent_dim") for x in ("--set", f"model.{key}=16")]
    options = (*QUIET, *words, *small, "--set", "model.layers=2", "--init-from", volume)
    text = succeed("train_stylesdf", *options, "--stage", "full").stdout
    assert "stage: full" in text and "resolution: 1024" in text and "max_steps: 300000" in text
    assert "stage: volume" in succeed("train_stylesdf", *QUIET, *words, "--stage", "volume").stdout


BAD: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "flag misspelt": ((*DEBUG, "--view_lamda", 1), ("--view_lamda", "--view_lambda", "see --help")),
    "no number": ((*DEBUG, "--batch", "many"), ("--batch", "'many'", "integer")),
    "stage": ((*DEBUG, "--stage", "both"), ("--stage", "'both'", "'volume', 'full'")),
    "another stage": ((*DEBUG, "--stage", "full"), ("curriculum debug is one of stage volume", "debug_full")),
    "no first stage": (FULL, ("stage full starts from a trained stage volume", "--init-from")),
    "first stage not there": ((*FULL, "--init-from", "nowhere"), ("nowhere",)),
    "old launcher": ((*DEBUG, "--local_rank=0"), ("--local_rank 0 is a flag of old launchers", "torchrun", "--gpus")),
    "its newer flag": ((*DEBUG, "--local-rank", 3), ("--local_rank 3 is a flag of old launchers",)),
    "unused flag": ((*DEBUG, "--n_mlp", 8), ("--n_mlp",)),
    "side": ((*DEBUG, "--renderer_spatial_output_dim", 48), ("render.resolution", "got 48")),
    "no data": ((*DEBUG, "--data", "nowhere"), ("nowhere",)),
    "chunks": ((*DEBUG, "--chunk", 3), ("batch of 4 in chunks of 3",)),
    "precision": ((*DEBUG, "--set", "train.precision=fp16"), ("train.precision is fp16", "tf32")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    arguments, words = BAD[name]
    line = refused(*arguments, "--out", tmp_path / "run")
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_first_stages_of_another_kind(volume: Path, fenerf_run: Path, tmp_path: Path) -> None:
    wide = train(tmp_path / "wide", "--width", 8, "--max-steps", 1, "--no_sphere_init", method="stylesdf")
    line = refused(*FULL, "--init-from", wide, "--out", tmp_path / "run")
    assert (
        f"{wide} does not fit: its model.width is 8, this run has 16; take another file or --set model.width=8" in line
    )
    config, _ = resolved("--init-from", wide, "--set", "model.width=8", curriculum="debug_full")
    assert config.init_from == str(wide)
    assert "is a fenerf model, expected one of stylesdf" in refused(
        *FULL, "--init-from", fenerf_run, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_a_launchers_flag_that_agrees_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    _, above = resolved("--local_rank=0")
    assert "--local_rank is not needed" in above
    assert "--local_rank 1 contradicts the launcher's LOCAL_RANK 0" in refused(*DEBUG, "--local-rank=1", "--dry-run")


# --- data


def test_trains_from_a_folder_and_from_an_lmdb(volume: Path, tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="needs the lmdb package: pip install facelab[lmdb]")
    rows = np.random.default_rng(0)
    pictures = [Image.fromarray(rows.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    with lmdb.open(str(tmp_path / "set"), map_size=1 << 22) as store, store.begin(write=True) as transaction:
        for index, picture in enumerate(pictures):
            picture.save(folder / f"{index}.png")
            data = io.BytesIO()
            picture.save(data, "png")
            transaction.put(f"16-{index:05d}".encode(), data.getvalue())
        transaction.put(b"length", b"5")
    for path in (folder.parent, tmp_path / "set"):
        out = tmp_path / f"run_{path.name}"
        result = succeed("train_stylesdf", *FULL, "--init-from", volume, "--data", path, "--out", out, "--max-steps", 1)
        assert "data: 5 samples" in result.stdout
        assert METHOD.pictures(load_staged_of(out)).image_size == 16
    line = refused(*DEBUG, "--data", tmp_path / "set", "--out", tmp_path / "none")
    assert "8" in line and "16" in line and "set" in line, "sizes asked for and there"
    assert not (tmp_path / "none").exists()


def load_staged_of(run: Path) -> StyleSdfConfig:
    """Configuration of a run."""
    return from_dict(StyleSdfConfig, load_checkpoint(run).meta["config"]).at(0)  # type: ignore[arg-type]
