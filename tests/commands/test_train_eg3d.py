# SPDX-License-Identifier: Apache-2.0
"""train_eg3d on the debug curriculum: runs, resuming, listings, refusals, fine-tuning from official and own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from facelab.bases.eg3d.config import Eg3dConfig
from facelab.checkpoints.format import load_checkpoint
from facelab.config import from_dict, list_curricula
from tests.bases.eg3d.official_files import changed, make_networks, original_tensors, pickle_of
from tests.checkpoints.pickle_makers import Call, dump
from tests.commands.running import DEBUG, QUIET, invoke, succeed, train

SMALL = ("--batch", 2, "--max-steps", 1)
STILL = (*SMALL, "--glr", 0, "--dlr", 0)
AVERAGE = "backbone.mapping.w_avg"
# unlike the debug curriculum's in every section that belongs to the weights
OPTIONS = changed(
    ray_start=2.1, ray_end=3.4, white_back=True, disparity_space_sampling=True, avg_camera_radius=2.5,
    avg_camera_pivot=[0, 0.1, 0], gpc_reg_prob=0.7, sr_antialias=False, box_warp=1.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return make_networks()


@pytest.fixture(scope="module")
def official(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of the official files: G, D and G_ema."""
    path = tmp_path_factory.mktemp("official") / "net.pkl"
    path.write_bytes(pickle_of(original_tensors(networks), OPTIONS))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps without a break, of a model unlike the curriculum's."""
    sides = ("model.resolution=8", "render.resolution=8", "neural.initial=8", "render.near=2.0", "model.latent_dim=4")
    settings = [word for side in sides for word in ("--set", side)]
    return train(tmp_path_factory.mktemp("own") / "run", *settings, method="eg3d")


def resolved(*arguments: Any, curriculum: str = "debug") -> tuple[Eg3dConfig, str]:
    """The configuration that ``--dry-run`` prints, and the lines above it."""
    output = succeed("train_eg3d", *QUIET, "--curriculum", curriculum, "--dry-run", *arguments).stdout
    above, _, text = output.partition("model:\n")
    return from_dict(Eg3dConfig, yaml.safe_load("model:\n" + text)).at(0), above


def refused(*arguments: Any) -> str:
    result = invoke("train_eg3d", *arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# --- runs


def test_a_run_and_what_it_writes(tmp_path: Path) -> None:
    train(tmp_path / "run", "--set", "log.samples_every=2", method="eg3d")
    written = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", "log.jsonl", "reals.png", "00000002_image.png", "ema.safetensors"} <= written
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(torch.isfinite(torch.tensor(line["g_main/adversarial"])) for line in lines)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = load_checkpoint(train(tmp_path / "whole", method="eg3d"))
    train(tmp_path / "parts", "--max-steps", 1, method="eg3d")
    parts = load_checkpoint(train(tmp_path / "parts", "--resume", "auto", method="eg3d"))
    assert parts.step == whole.step == 2 and set(parts.weights) == {"generator", "discriminator", "ema"}
    for group, tensors in whole.weights.items():
        assert all(torch.equal(parts.weights[group][key], value) for key, value in tensors.items()), group


def test_curricula_are_listed_with_their_original_names() -> None:
    lines = succeed("train_eg3d", "--list-curricula").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [c.name for c in list_curricula("eg3d")]
    assert next(line for line in lines if line.startswith("afhq_512")).endswith("(original: afhq, afhqcats512-128)")


def test_dry_run_resolves_and_writes_nothing(tmp_path: Path) -> None:
    config, above = resolved("--out", tmp_path / "run", "--gamma", 7, "--cbase", 32, "--aug", "noaug", "--kimg", 0.4)
    assert config.loss.r1_gamma == 7 and config.model.channel_base == config.discriminator.channel_base == 32
    assert config.augment.mode == "none" and config.train.max_steps == 100
    assert "deviates from the original: reference.batch_depth" in above
    assert list(tmp_path.iterdir()) == []
    assert resolved(curriculum="ffhq512-128")[0].neural.final == 128, "by the original's name"


BAD: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "flag misspelt": (("--gama", 1), ("--gama", "--gamma", "see --help")),
    "no number": (("--batch", "many"), ("--batch", "'many'", "integer")),
    "no probability": (("--gpc_reg_prob", 1.5), ("--gpc_reg_prob", "0<=x<=1")),
    "a kind that did nothing": (("--reg_type", "l1-alt"), ("--reg_type", "'l1-alt'", "monotonic-fixed")),
    "a flag without effect": (("--c-noise", 1), ("--c-noise",)),
    "curriculum": (("--curriculum", "ffhq_521"), ("no curriculum 'ffhq_521'", "Did you mean 'ffhq_512'?")),
    "groups and chunk": (("--mbstd-group", 3), ("batch_chunk is 2", "multiple of discriminator.group_size 3")),
    "sides": (("--neural_rendering_resolution_initial", 8), ("neural.initial 8", "model.resolution 16")),
    "super-resolution": (("--set", "model.superresolution=2y"), ("model.superresolution", "Did you mean '2x'?")),
    "no power of two": (("--set", "model.resolution=24"), ("model.resolution 24", "power of two", "got 24")),
    "precision": (("--set", "train.precision=fp16"), ("train.precision is fp16", "see train.half")),
    "no data": (("--data", "nowhere.zip"), ("nowhere.zip",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_one_line(name: str, tmp_path: Path) -> None:
    arguments, words = BAD[name]
    line = refused(*DEBUG, "--out", tmp_path / "run", *arguments)
    for word in words:
        assert word in line, line
    assert list(tmp_path.iterdir()) == []


# --- fine-tuning


def test_settings_that_belong_to_the_weights_come_from_the_file(official: Path) -> None:
    config, above = resolved("--init-from", official)
    m, r, d = config.model, config.render, config.discriminator
    assert (m.resolution, m.superresolution, m.latent_dim, m.mapping_layers, m.axes) == (128, "2x", 6, 3, "xy_xz_zx")
    assert m.box_side == 1.3 and not m.superresolution_antialias
    assert (r.near, r.far, r.samples, r.importance, r.background, r.spacing) == (2.1, 3.4, 5, 4, "white", "disparity")
    assert (d.channel_base, d.channel_max, d.half_blocks, d.clamp) == (256, 4, 4, 256.0)
    assert (config.view.radius, config.view.pivot) == (2.5, (0.0, 0.1, 0.0))
    assert config.conditioning.pose and config.conditioning.swap == 0.7 and config.reference.legacy_raw
    # the recipe stays the curriculum's
    assert (config.neural.initial, r.resolution, d.group_size, d.freeze_layers) == (16, 16, 2, 0)
    assert config.loss.density_weight == 0.25 and config.conditioning.swap_fade_kimg == 1000
    for line in ("G_ema is a TriPlaneGenerator", "taken from net.pkl: model.resolution 128, model.superresolution 2x",
                 "render.near 2.1, render.far 3.4, render.samples 5, render.spacing disparity", "reference.legacy_raw true",
                 "view.radius 2.5", "conditioning.swap 0.7", "discriminator.channel_base 256"):  # fmt: skip
        assert line in above, above
    assert "not taken" not in above and "deviates from the original: reference.legacy_raw" not in above


def test_the_command_line_wins(official: Path) -> None:
    own_words = ("--set", "render.near=2.2", "--set", "view.pivot=[0, 0, 0.05]", "--gen_pose_cond", "false")
    config, above = resolved("--init-from", official, *own_words)
    assert config.render.near == 2.2 and config.view.pivot == (0.0, 0.0, 0.05) and not config.conditioning.pose
    assert config.render.far == 3.4 and config.view.radius == 2.5
    for line in ("not taken from net.pkl: render.near stays 2.2, the file has 2.1",
                 "view.pivot stays [0.0, 0.0, 0.05], the file has [0.0, 0.1, 0.0]", "conditioning.pose stays false"):  # fmt: skip
        assert line in above


def test_a_curriculum_keeps_the_cameras_it_states(official: Path) -> None:
    """From faces to cats: the recipe's cameras and swap probability, everything else of the file."""
    config, above = resolved("--init-from", official, curriculum="afhq_512")
    assert config.view.pivot == (0.0, 0.0, -0.06) and config.conditioning.swap == 0.8
    assert config.view.radius == 2.5 and config.render.far == 3.4 and config.model.resolution == 128
    assert config.neural.final == 128 and config.render.resolution == 128
    assert "not taken from net.pkl: conditioning.swap stays 0.8, the file has 0.7" in above


@pytest.fixture(scope="module")
def tuned(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step with rates of zero from the pickle itself."""
    return train(tmp_path_factory.mktemp("tuned"), "--init-from", official, *STILL, method="eg3d")


def test_a_run_from_an_official_file(networks: dict[str, Any], tuned: Path) -> None:
    """Its averaged generator and its discriminator; the average style code goes on from the stored one."""
    run = load_checkpoint(tuned)
    for group, name in (("generator", "G_ema"), ("discriminator", "D")):
        for key, value in networks[name].state_dict().items():
            if key != AVERAGE:
                assert torch.equal(run.weights[group][key], value), key
    stored, moved = networks["G_ema"].state_dict()[AVERAGE], run.weights["generator"][AVERAGE]
    assert 0 < (moved - stored).abs().max() < 0.1 * stored.abs().max(), "a running average moves slowly"


def test_a_converted_file_starts_the_same_run(official: Path, tuned: Path, tmp_path: Path) -> None:
    succeed("convert_checkpoint", "eg3d", official, tmp_path / "model.safetensors")
    options = ("--init-from", tmp_path / "model.safetensors", *STILL)
    again = load_checkpoint(train(tmp_path / "run", *options, method="eg3d"))
    direct = load_checkpoint(tuned)
    assert again.meta["config"] == direct.meta["config"]
    for group, tensors in direct.weights.items():
        assert all(torch.equal(again.weights[group][key], value) for key, value in tensors.items()), group


def test_a_fine_tuned_run_trains_and_resumes(official: Path, tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--init-from", official, *SMALL)
    train(run, *options, method="eg3d")
    trained = load_checkpoint(train(run, *options, "--resume", "auto", "--max-steps", 2, method="eg3d"))
    config, _ = resolved(curriculum=str(run / "config.yaml"))
    assert from_dict(Eg3dConfig, trained.meta["config"]).at(0) == config, "the run can go on without the file, too"
    still = load_checkpoint(tuned).weights["generator"]
    key = "field_net.decoder.hidden_weight"
    assert trained.step == 2 and not torch.equal(trained.weights["generator"][key], still[key])
    assert all(bool(value.isfinite().all()) for value in trained.weights["generator"].values())


def test_fresh_and_missing_discriminators(networks: dict[str, Any], official: Path, tmp_path: Path) -> None:
    """Without its weights the discriminator is the curriculum's."""
    config, above = resolved("--init-from", official, "--fresh-discriminators")
    assert config.discriminator.channel_base == 64 and "the discriminator starts anew, as asked" in above
    path = tmp_path / "alone.pkl"
    path.write_bytes(pickle_of(original_tensors(networks), OPTIONS, names=("G_ema",)))
    config, above = resolved("--init-from", path)
    assert config.discriminator.channel_base == 64 and "starts anew, the file has none" in above


def test_an_own_run_and_a_bundled_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without super-resolution the sides of rendering and picture belong together, and come from the file too."""
    monkeypatch.setattr("facelab.assets.find_bundled", lambda name: own if name == "eg3d_tiny" else None)
    for source in (own, "eg3d_tiny"):
        config, above = resolved("--init-from", source)
        assert (config.model.resolution, config.render.resolution, config.neural.initial) == (8, 8, 8)
        assert config.model.latent_dim == 4 and config.render.near == 2.0
        assert "render.near 2.0" in above


def test_files_that_cannot_start_a_run(own: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.pkl"
    hostile.write_bytes(dump({"G_ema": Call("os", "system", f"touch {tmp_path / 'PWNED'}")}))
    line = refused(*DEBUG, "--init-from", hostile, "--out", tmp_path / "run")
    assert "hostile.pkl was not read" in line and "os.system" in line and "nothing of it was run" in line
    assert f"no checkpoint at {tmp_path / 'nothing'}: " in refused(
        *DEBUG, "--init-from", tmp_path / "nothing", "--out", tmp_path / "run"
    )
    wider = ("--init-from", own, "--set", "model.latent_dim=5", "--out", tmp_path / "run")
    assert "the weights of 'generator' do not fit this configuration" in refused(*DEBUG, *wider)
    assert not (tmp_path / "PWNED").exists()


# --- numbers that no run can have


OUT_OF_RANGE = {
    "view.focal=0": "view.focal must be above 0, got 0.0",
    "model.box_side=-1": "model.box_side must be above 0, got -1.0",
    "model.latent_dim=0": "model.latent_dim must be at least 1, got 0",
    "model.channel_base=0": "model.channel_base must be at least 1, got 0",
    "model.plane_resolution=15": "model.plane_resolution must be a power of two from 4, got 15",
    "model.features=2": "model.features must be at least 3",
    "discriminator.clamp=-1": "discriminator.clamp must be above 0, got -1.0",
    "augment.p=3": "augment.p must be between 0 and 1, got 3.0",
    "augment.interval=0": "augment.interval must be at least 1, got 0",
    "ema.rampup=-1": "ema.rampup must be 0 or more, got -1.0",
    "data.max_size=0": "data.max_size must be at least 1, got 0",
    "data.heads=0": "data.heads must be at least 1, got 0",
    "log.sample_heads=0": "log.sample_heads must be at least 1, got 0",
    "neural.fade_kimg=-1": "neural.fade_kimg must be 0 or more, got -1.0",
    "render.density_noise=-1": "render.density_noise must be 0 or more, got -1.0",
    "optim.generator_lr=inf": "optim.generator_lr must be finite, got inf",
}


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_settings_out_of_range_are_refused_before_the_run(setting: str) -> None:
    """The line names the setting, and the --set that gave it, whatever stands behind it."""
    line = refused(*DEBUG, "--dry-run", "--set", setting, "--set", "train.workers=0")
    assert line.startswith(f"error: --set {setting}: {OUT_OF_RANGE[setting]}"), line


@pytest.mark.parametrize("flags", [("--kimg", "nan"), ("--kimg", "inf"), ("--snap", "nan"), ("--tick", "inf")])
def test_lengths_that_are_no_numbers(flags: tuple[str, str]) -> None:
    line = refused(*DEBUG, "--dry-run", *flags)
    assert flags[0] in line and "expect" in line and flags[1] in line


def test_a_dry_run_sees_that_the_batch_cannot_be_shared() -> None:
    assert "a batch of 5 in chunks of 2" in refused(*DEBUG, "--dry-run", "--batch", 5)


# --- flags of the original


def test_flags_that_are_not_here_are_answered_with_what_is() -> None:
    for flag, words in (
        ("--cfg", "--curriculum ffhq_512"), ("--outdir", "--out FOLDER"), ("--metrics", "scripts/compute_metrics.py"),
        ("--resume_blur", "loss.blur_fade_kimg"), ("--sr-module", "model.superresolution=2x"),
        ("--c-noise", "it never had an effect"), ("--desc", "--out"),
    ):  # fmt: skip
        line = refused(flag, "1")
        assert line.startswith(f"error: {flag} is a flag of the original; here: ") and words in line


def test_ticks_become_steps() -> None:
    config, _ = resolved("--tick", 0.02, "--snap", 3, "--kimg", 0.4)
    assert (config.log.every, config.checkpoint.every, config.log.samples_every) == (5, 15, 15)
    assert config.train.max_steps == 100, "batches of 4"
    config, _ = resolved("--snap", 0.5)
    assert config.checkpoint.every == 500, "two thousand images"


def test_resuming_a_file_of_the_original_is_answered_with_init_from(official: Path, tmp_path: Path) -> None:
    line = refused(*DEBUG, "--out", tmp_path / "run", "--resume", official)
    assert f"--init-from {official}" in line and list(tmp_path.iterdir()) == []


def test_a_misspelt_bundled_model_to_start_from(tmp_path: Path) -> None:
    line = refused(*DEBUG, "--out", tmp_path / "run", "--init-from", "eg3d_syntetic_128")
    assert "Did you mean 'eg3d_synthetic_128'?" in line


# --- labels that are no cameras


@pytest.mark.parametrize("flaw", ["focal", "mirrored", "opengl"])
def test_labels_that_are_no_cameras_are_refused(flaw: str, tmp_path: Path) -> None:
    data = pictures_with_cameras(tmp_path / "set")
    described = json.loads((data / "dataset.json").read_text())
    for entry in described["labels"] if flaw == "opengl" else described["labels"][:1]:
        matrix = torch.tensor(entry[1][:16]).reshape(4, 4)
        if flaw == "focal":
            entry[1][16] = -4.2
        elif flaw == "mirrored":
            matrix[:3, 0] *= -1
        else:
            matrix[:3, 1:3] *= -1
        entry[1][:16] = matrix.flatten().tolist()
    (data / "dataset.json").write_text(json.dumps(described))
    line = refused(*DEBUG, "--out", tmp_path / "run", "--data", data)
    words = {"focal": "intrinsics are not", "mirrored": "the camera matrix mirrors", "opengl": "are opengl_c2w"}
    assert words[flaw] in line and "prepare_data.py" in line and not (tmp_path / "run").exists()


def pictures_with_cameras(folder: Path) -> Path:
    """Six grey pictures of 16 px under good cameras."""
    from PIL import Image

    from facelab.cameras.orbit import orbit_camera

    folder.mkdir()
    labels = []
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 90, 90)).save(folder / f"{number}.png")
        camera = orbit_camera(1.4 + 0.07 * number, 1.5, 2.7, (0.0, 0.0, 0.0), 4.2647)
        labels.append([f"{number}.png", camera.label()[0].tolist()])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_weights_that_hold_nan_start_no_run(own: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from facelab.cli.export import export

    path = export(own, tmp_path / "model", "fp32")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("output_weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, path, header)
    for line in (
        refused(*DEBUG, "--out", tmp_path / "run", "--init-from", path),
        invoke("render_images", path, "--out", tmp_path / "imgs").stderr,
    ):
        assert "output_weight' holds NaN" in line and line.count("\n") <= 1
    assert not (tmp_path / "imgs").exists()
