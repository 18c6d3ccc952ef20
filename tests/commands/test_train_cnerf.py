# SPDX-License-Identifier: Apache-2.0
"""train_cnerf on the debug curricula: both stages, the original's flags and places, data with masks, refusals."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import facelab
from facelab.checkpoints.format import load_checkpoint
from facelab.config import from_dict, list_curricula
from facelab.methods.cnerf.config import DEVIATIONS, CnerfConfig
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.originals import generator_to_original
from facelab.methods.cnerf.training import METHOD
from tests.commands.running import DEBUG, QUIET, invoke, succeed

FULL = (*QUIET, "--curriculum", "debug_full")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first stage, where the original puts it."""
    place = tmp_path_factory.mktemp("cnerf")
    succeed("train_cnerf", *DEBUG, "--stage", "volume", "--expname", "mine", "--checkpoints_dir", place)
    return place / "mine" / "volume_renderer"


@pytest.fixture(scope="module")
def full(volume: Path) -> Path:
    """A run of the second stage beside it."""
    place = volume.parent
    result = succeed("train_cnerf", *FULL, "--expname", place.name, "--checkpoints_dir", place.parent)
    assert f"the renderer is that of {volume} and stays as it is" in result.stdout
    return place / "full_pipeline"


def resolved(*arguments: Any, curriculum: str = "debug") -> CnerfConfig:
    """The configuration that ``--dry-run`` prints."""
    output = succeed("train_cnerf", *QUIET, "--curriculum", curriculum, "--dry-run", *arguments).stdout
    return from_dict(CnerfConfig, yaml.safe_load("init_from: " + output.partition("init_from: ")[2])).at(0)


def refused(*arguments: Any) -> str:
    result = invoke("train_cnerf", *arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# --- runs


def test_both_stages_and_what_they_write(volume: Path, full: Path) -> None:
    first, second = load_checkpoint(volume), load_checkpoint(full)
    assert (first.meta["stage"], second.meta["stage"], first.step, second.step) == ("volume", "full", 2, 2)
    assert set(first.weights) == {"generator", "d_global", "d_region", "ema"}
    assert set(second.weights) == {"generator", "d_full", "path", "ema"}
    assert second.meta["config"]["init_from"] == str(volume)  # type: ignore[index]
    switches = {d["switch"] for d in second.meta["deviations"]}  # type: ignore[union-attr]
    assert switches == {f"reference.{d.switch}" for d in DEVIATIONS}
    key = "field_net.regions.layers.0.weight"
    assert torch.equal(second.weights["generator"][key], first.weights["ema"][key])
    for run, side in ((volume, 8), (full, 16)):
        model = facelab.load(run)
        output = model.render(model.codes(1))
        assert output.rgb.shape == (1, 3, side, side) and output.semantics.shape == (1, 9, side, side)


def test_a_run_goes_on_at_a_step(full: Path, volume: Path) -> None:
    place = ("--expname", volume.parent.name, "--checkpoints_dir", volume.parent.parent)
    succeed("train_cnerf", *FULL, *place, "--continue_training", "--ckpt", 2, "--max-steps", 3)
    assert load_checkpoint(full).step == 3


def test_official_weights_are_fine_tuned(volume: Path, tmp_path: Path) -> None:
    """A converted whole file for a full stage, a volume file for a volume stage, which is no sphere again."""
    still = ("--max-steps", 1, "--set", "optim.volume_generator_lr=0", "--set", "optim.full_lr=0")
    for stage, options in (("volume", DEBUG), ("full", FULL)):
        published = resolved("--set", "model.channel_max=null", curriculum=f"debug_{stage}")  # files know no limit
        generator = CNerfGenerator(METHOD.generator_config(published))
        path = tmp_path / f"{stage}.pt"
        torch.save({"g_ema": generator_to_original(generator)}, path)
        result = succeed("train_cnerf", *options, "--init-from", path, "--out", tmp_path / stage, *still)
        assert "the discriminator starts anew, the file has none" in result.stdout
        run = load_checkpoint(tmp_path / stage)
        assert run.meta["config"]["sphere"]["steps"] == (0 if stage == "volume" else 2)  # type: ignore[index]
        wanted = METHOD.stored(path).weights
        for key, value in run.weights["generator"].items():
            assert key.startswith("average") or torch.equal(value, wanted[key]), key
    result = succeed("train_cnerf", *DEBUG, "--init-from", volume, "--out", tmp_path / "again", *still)
    assert "starts anew" not in result.stdout, "its discriminators are taken too"
    line = refused(*DEBUG, "--init-from", tmp_path / "full.pt", "--out", tmp_path / "x")
    assert "full" in line and "cannot start a run" in line


def test_reference_restores_everything(tmp_path: Path) -> None:
    config = resolved("--reference")
    assert all(getattr(config.reference, deviation.switch) for deviation in DEVIATIONS)


# --- flags


def test_flags_of_the_original_are_settings(tmp_path: Path) -> None:
    config = resolved(
        "--batch", 8, "--chunk", 4, "--iter", 7, "--r1_img", 50, "--r1_seg", 200, "--Semantic_D_lambda", 2,
        "--view_lambda", 3, "--eikonal-lambda", 0.2, "--min_surf_lambda", 0.01, "--min_surf_beta", 10,
        "--azim", 0.15, "--elev", 0.1, "--fov", 5, "--uniform", "--no_sphere_init", "--no_offset_sampling",
        "--N_samples", 6, "--perturb", 0, "--static_viewdirs", "--no_z_normalize", "--depth", 3, "--width", 12,
        "--style_dim", 10, "--dist_radius", 0.2, "--val_n_sample", 5, "--n_render", 9, "--n_wcode", 9,
    )  # fmt: skip
    assert (config.train.batch_per_gpu, config.train.batch_size, config.train.batch_chunk) == (8, None, 4)
    loss = config.loss
    assert (loss.r1_image, loss.r1_semantics, loss.semantic, loss.view) == (50, 200, 2, 3)
    assert (loss.eikonal, loss.surface, loss.surface_sharpness) == (0.2, 0.01, 10)
    camera, m, r = config.camera, config.model, config.render
    assert (camera.azimuth, camera.elevation, camera.fov, camera.mode, camera.radius) == (0.15, 0.1, 10, "uniform", 0.2)
    assert (m.normalize, m.depth, m.width, m.style_dim, m.sampling) == (False, 3, 12, 10, "stratified")
    assert (r.samples, r.jitter, r.static_training) == (6, False, True)
    assert config.render.settings(0.1, training=True).lock_view
    assert (config.train.max_steps, config.sphere.steps, config.log.sample_heads) == (7, 0, 5)
    config = resolved(
        "--size", 32, "--lr", 0.001, "--mixing", 0.5, "--d_reg_every", 8, "--g_reg_every", 2, "--path_regularize", 1,
        "--path_batch_shrink", 4, "--lr_mapping", 0.1, "--channel_multiplier", 1, curriculum="debug_full",
    )  # fmt: skip
    assert (config.model.resolution, config.model.lr_mapping, config.model.channel_multiplier) == (32, 0.1, 1)
    loss = config.loss
    assert (loss.mixing, loss.r1_every, loss.path_every, loss.path_weight, loss.path_shrink) == (0.5, 8, 2, 1, 4)
    assert config.optim.full_lr == 0.001


def test_flags_without_effect_say_so(tmp_path: Path) -> None:
    result = succeed("train_cnerf", *DEBUG, "--dry-run", "--force_background", "--raw_noise_std", 0.5)
    assert "without effect on CNeRF, as in the original: --force_background, --raw_noise_std" in result.stdout


def test_the_default_curriculum_follows_the_stage(volume: Path) -> None:
    small = [x for key in ("width", "style_dim") for x in ("--set", f"model.{key}=16")]
    options = (*QUIET, "--data", "", "--dry-run", *small, "--set", "model.depth=2", "--set", "render.resolution=8")
    text = succeed("train_cnerf", *options, "--stage", "full", "--pretrain_render_path", volume).stdout
    assert "stage: full" in text and "resolution: 512" in text and "max_steps: 500001" in text
    assert "stage: volume" in succeed("train_cnerf", *options, "--stage", "volume").stdout
    names = {curriculum.name for curriculum in list_curricula("cnerf")}
    assert {"ffhq_volume", "ffhq_volume_4gpu", "ffhq_full_512", "synthetic_64", "synthetic_128_full"} <= names


BAD: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "flag misspelt": ((*DEBUG, "--r1_sg", 1), ("--r1_sg", "--r1_seg")),
    "another stage": ((*DEBUG, "--stage", "full"), ("one of stage volume", "debug_full", "ffhq_full_512")),
    "no first stage": ((*FULL, "--set", "init_from="), ("stage full starts from", "--pretrain_render_path")),
    "first stage not there": ((*FULL, "--pretrain_render_path", "nowhere.pt"), ("nowhere.pt",)),
    "first stage of a first stage": ((*DEBUG, "--pretrain_render_path", "x"), ("--stage full",)),
    "old launcher": ((*DEBUG, "--local_rank=0"), ("--local_rank 0 is a flag of old launchers", "torchrun", "--gpus")),
    "its newer flag": ((*DEBUG, "--local-rank", 3), ("--local_rank 3 is a flag of old launchers",)),
    "raw density": ((*DEBUG, "--no_sdf"), ("--no_sdf", "leave it out")),
    "regions": ((*DEBUG, "--n_render", 5), ("model.regions is 5", "neck_cloth")),
    "size": ((*DEBUG, "--size", 64), ("--size 64", "8", "--renderer_spatial_output_dim 64")),
    "side": ((*DEBUG, "--renderer_spatial_output_dim", 48), ("render.resolution", "got 48")),
    "groups": ((*DEBUG, "--set", "discriminator.group_size=3"), ("2 samples are judged at once", "group_size 3")),
    "chunks": ((*DEBUG, "--chunk", 3), ("batch of 4 in chunks of 3",)),
    "no data": ((*DEBUG, "--data", "nowhere"), ("nowhere",)),
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
    line = refused(*FULL, "--init-from", volume, "--width", 8, "--out", tmp_path / "run")
    assert f"{volume} does not fit: its model.width is 16, this run has 8" in line
    line = refused(*FULL, "--pretrain_render_path", fenerf_run, "--out", tmp_path / "run")
    assert "is a fenerf model, expected one of cnerf" in line
    assert not (tmp_path / "run").exists()


# --- data


@pytest.fixture
def masked_set(tmp_path: Path) -> Path:
    """An LMDB of five pictures of 8 and 16 px with masks beside it, as the original has them."""
    lmdb = pytest.importorskip("lmdb", reason="needs the lmdb package: pip install facelab[lmdb]")
    source = np.random.default_rng(0)
    root = tmp_path / "faces_lmdb"
    with lmdb.open(str(root), map_size=1 << 22) as store, store.begin(write=True) as transaction:
        for size in (8, 16):
            (tmp_path / f"faces_mask_{size}").mkdir()
            for index in range(5):
                data = io.BytesIO()
                Image.fromarray(source.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(data, "png")
                transaction.put(f"{size}-{index:05d}".encode(), data.getvalue())
                mask = source.integers(0, 19, (size, size), dtype=np.uint8)
                np.save(tmp_path / f"faces_mask_{size}" / f"{index:05d}.npy", mask)
        transaction.put(b"length", b"5")
    return root


def test_trains_from_an_lmdb_with_masks(masked_set: Path, tmp_path: Path) -> None:
    for options, side in ((DEBUG, 8), (FULL, 16)):
        out = tmp_path / f"run_{side}"
        result = succeed("train_cnerf", *options, "--dataset_path", masked_set, "--out", out, "--max-steps", 1)
        assert "data: 5 samples" in result.stdout
        config = from_dict(CnerfConfig, load_checkpoint(out).meta["config"]).at(0)  # type: ignore[arg-type]
        assert METHOD.pictures(config).item(0).label_map.shape == (1, side, side)


def test_masks_that_do_not_fit(masked_set: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "no pictures of 32 px in this LMDB, it has 8, 16" in refused(
        *DEBUG, "--data", masked_set, "--renderer_spatial_output_dim", 32, *out
    )
    masks = tmp_path / "faces_mask_8"
    (masks / "00003.npy").rename(tmp_path / "kept.npy")
    line = refused(*DEBUG, "--data", masked_set, *out)
    assert "4 masks but 5 pictures" in line and "00003.npy" in line
    masks.rename(tmp_path / "elsewhere")
    assert "no masks of 8 px" in refused(*DEBUG, "--data", masked_set, *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("FACELAB_REAL_DATA" not in os.environ, reason="FACELAB_REAL_DATA is not set: no photographs")
def test_a_folder_of_pairs(tmp_path: Path) -> None:
    """Real photographs with their masks, one step of each stage."""
    pairs = Path(os.environ["FACELAB_REAL_DATA"]) / "celebamask_pairs"
    for options, name in ((DEBUG, "volume"), (FULL, "full")):
        train_options = ("--data", pairs, "--out", tmp_path / name, "--max-steps", 1)
        assert "5 samples" in succeed("train_cnerf", *options, *train_options).stdout
    assert load_checkpoint(tmp_path / "full").step == 1
