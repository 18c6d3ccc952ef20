# SPDX-License-Identifier: Apache-2.0
"""Exported models open, keep their curriculum and can be trained on; cards state what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from facelab.api import load
from facelab.assets import find_bundled
from facelab.checkpoints.format import checkpoint_folder, load_checkpoint, save_checkpoint
from facelab.cli.card import card_command, model_card, read_metrics, training_command
from facelab.cli.convert import Initialised
from facelab.cli.export import export, export_command, training_time
from facelab.config import from_dict, load_staged, resolve_curriculum, to_dict
from facelab.errors import UserError
from facelab.methods import load_method


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run_folder, tmp_path_factory.mktemp("networks") / "tiny", with_discriminators=True)


def test_the_export_opens_and_holds_the_averaged_generator(run_folder: Path, exported: Path):
    assert exported.suffix == ".safetensors"
    stored, original = load_checkpoint(exported), load_checkpoint(run_folder)
    assert set(stored.weights) == {"ema", "d_image", "d_semantic"}
    for group, state in stored.weights.items():
        for name, tensor in state.items():
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor, original.weights[group][name].half(), rtol=0, atol=0)
    model, before = load(exported), load(run_folder)
    assert model.config == before.config and model.config.render.resolution == 16
    # not filled: the fill's hard threshold turns a small difference of opacity into a large one of colour
    picture, expected = (m.sample(seed=1, fill=False).rgb for m in (model, before))
    assert picture.shape == (1, 3, 16, 16) and expected.std() > 0.1
    assert (picture - expected).abs().median() < 0.01  # where density is about 0, its sign decides by rounding
    exact = load(export(run_folder, exported.parent / "exact", dtype="fp32"))
    torch.testing.assert_close(exact.sample(seed=1).rgb, before.sample(seed=1).rgb, rtol=0, atol=0)


def test_config_at_the_step_and_the_list_of_stages(run_folder: Path, exported: Path):
    meta = load_checkpoint(exported).meta
    assert meta["config"]["render"]["resolution"] == 16 and "stages" not in meta["config"]
    assert [row["from_step"] for row in meta["staged_config"]["stages"]] == [0, 10, 100]
    kind = load_method("fenerf").config_type
    original = load_checkpoint(run_folder, with_state=False).meta["config"]
    assert from_dict(kind, meta["staged_config"]) == from_dict(kind, original)
    again = export(exported, exported.parent / "again", with_discriminators=True)
    assert load_checkpoint(again).meta["staged_config"] == meta["staged_config"], "an export of an export keeps it"


def test_training_starts_from_the_export_with_its_discriminators(exported: Path):
    method = load_method("fenerf")
    staged = load_staged(method.config_type, [resolve_curriculum("fenerf", "debug")], ["train.seed=7"])
    models = method.build(staged.at(0))
    Initialised(method, exported, fresh_discriminators=False).fill(models)
    stored = load_checkpoint(exported).weights
    for name, group in (("generator", "ema"), ("d_image", "d_image"), ("d_semantic", "d_semantic")):
        for key, tensor in models[name].state_dict().items():
            torch.testing.assert_close(tensor, stored[group][key].float(), rtol=0, atol=0)


def test_which_generator_and_which_type(run_folder: Path, tmp_path: Path):
    original = load_checkpoint(run_folder).weights
    live = load_checkpoint(export(run_folder, tmp_path / "live", dtype="fp32", weights="generator"))
    assert set(live.weights) == {"ema"} and live.meta["exported"] == {"weights": "generator", "dtype": "fp32"}
    for name, tensor in live.weights["ema"].items():
        torch.testing.assert_close(tensor, original["generator"][name], rtol=0, atol=0)
    rounded = load_checkpoint(export(run_folder, tmp_path / "coarse", dtype="bf16")).meta["exported"]
    assert rounded["dtype"] == "bf16" and rounded["picture_change"] > 0, "bf16 keeps 8 bits: it shows"
    with pytest.raises(UserError, match="no weights 'ema_slow' to export, it has ema, generator"):
        export(run_folder, tmp_path / "slow", weights="ema_slow")


def test_size_and_finiteness_are_checked_before_anything_is_written(run_folder: Path, tmp_path: Path):
    whole = export(run_folder, tmp_path / "whole", with_discriminators=True)
    size = whole.stat().st_size / 1e6
    with pytest.raises(UserError, match=r"expected at most .*largest part is ema"):
        export(run_folder, tmp_path / "small", with_discriminators=True, max_mb=0.8 * size)
    assert export(run_folder, tmp_path / "fits", with_discriminators=True, max_mb=1.2 * size).exists()
    stored = load_checkpoint(run_folder)
    stored.weights["ema"][next(iter(stored.weights["ema"]))].fill_(1e6)
    save_checkpoint(checkpoint_folder(tmp_path / "run", 15), stored.weights, None, stored.meta)
    with pytest.raises(UserError, match="finite"):
        export(tmp_path / "run", tmp_path / "huge", dtype="fp16")
    assert not (tmp_path / "small.safetensors").exists() and not (tmp_path / "huge.safetensors").exists()
    result = CliRunner().invoke(export_command, [str(tmp_path / "absent"), str(tmp_path / "x")])
    assert result.exit_code == 2 and "no checkpoint at" in result.output and len(result.output.splitlines()) == 1


def test_time_is_read_from_the_log_up_to_the_checkpoint(run_folder: Path, exported: Path, tmp_path: Path):
    expected = {"seconds": 5 * 0.5 + 10 * 0.25, "steps": 15, "processes": 2}
    assert training_time(checkpoint_folder(run_folder, 15), 15) == expected
    assert load_checkpoint(exported).meta["training"] == expected
    assert training_time(tmp_path, 15) is None and training_time(exported, 15) is None


def metrics_of(exported: Path, **changes: object) -> dict:
    model = {"method": "fenerf", "step": 15, "images": 60, **changes}
    random = {"value": 1.25, "features": "random-conv-v1", "real_count": 4, "fake_count": 4}
    depth = {"unit": "scene units", "rmse": 0.0125, "rmse_share": 0.1, "definition": "Said so."}
    return {"model": model, "settings": {"num_images": 4}, "metrics": {"frechet_random": random, "depth": depth}}


def test_the_card_states_what_the_file_holds(exported: Path):
    text = model_card(exported, metrics_of(exported), name="Tiny", hardware="a CPU", notes=("It was never trained.",))
    assert text.startswith("# Tiny\n") and "for 16 px pictures" in text
    assert "Steps: 15; pictures seen: 60" in text and "Stages: 8 px from step 0, 16 px from step 10\n" in text
    assert "Time: 0.2 device minutes" in text and "2 processes" in text and "Hardware: a CPU" in text
    assert "8 synthetic heads of seed 0" in text and f"{exported.stat().st_size / 1e6:.2f} MB" in text
    generator = load(exported).generator
    assert "Rounding the weights to float16" not in text and "Rounding the weights to fp16 changes colours" in text
    assert f"| ema | {sum(p.numel() for p in generator.parameters()):,} | float16 |" in text
    assert "| frechet_random | 1.25 |" in text and "| depth.rmse | 0.0125 scene units |" in text
    assert "| depth.rmse_share | 0.1 |" in text and "random-conv-v1" in text and "it is no FID" in text
    assert "- It was never trained." in text and "Apache-2.0. Trained on synthetic heads only" in text
    assert str(exported.parent) not in text, "no place of this machine"
    assert "Nothing was measured." in model_card(exported)


@pytest.mark.parametrize(
    ("name", "opening", "data"),
    [
        ("eg3d_synthetic_128", "An eg3d model for 128 px pictures", "0.3 (yaw) and 0.155 (pitch) radians, 13.3738"),
        ("cnerf_synthetic_64", "A cnerf model for 64 px pictures", "0.45 (yaw) and 0.15 (pitch) radians, 12"),
    ],
)
def test_cards_of_the_bundled_models_say_what_their_data_were(name: str, opening: str, data: str):
    text, ground = model_card(Path(name)), {"eg3d": "white", "cnerf": "grey"}[name.split("_")[0]]
    assert opening in text and f"deviations of {data} degrees field of view, {ground} background" in text
    plain = [line for line in text.splitlines() if line.startswith("python scripts/train_")]
    assert len(plain) == 1 and "--set" not in plain[0], "the recipe is the curriculum as it is"
    path = find_bundled(name)
    assert path is not None
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert opening in card and f"{ground} background" in card


def test_numbers_of_another_model_are_refused(exported: Path, tmp_path: Path):
    with pytest.raises(UserError, match="of another model: step 14"):
        model_card(exported, metrics_of(exported, step=14))
    wrong = tmp_path / "m.json"
    wrong.write_text('{"metrics": 3}')
    with pytest.raises(UserError, match="expected a JSON file of compute_metrics"):
        read_metrics(wrong)


def test_the_command_gives_the_configuration_back():
    method = load_method("fenerf")
    path = resolve_curriculum("fenerf", "debug")
    changed = ["data.heads=12", "camera.fov=14.0", "train.seed=3"]
    staged = load_staged(method.config_type, [path], changed)
    command = training_command({"method": "fenerf", "curriculum": "debug", "step": 2}, staged)
    assert command.startswith("python scripts/train_fenerf.py --curriculum debug ")
    assert "--set 'data.heads=12'" in command and "--set 'camera.fov=14.0'" in command and "--seed 3" in command
    assert "--max-steps" not in command
    stopped = training_command({"method": "fenerf", "curriculum": "debug", "step": 1}, staged)
    assert stopped.endswith("--max-steps 1")
    own = training_command({"method": "fenerf", "curriculum": "tiny"}, staged)
    assert "not among facelab's" in own


def test_pictures_or_foreign_weights_take_the_licence_away(exported: Path, tmp_path: Path):
    stored = load_checkpoint(exported)
    kind = load_method("fenerf").config_type
    config = to_dict(from_dict(kind, stored.meta["config"]).at(0))
    config["data"]["path"] = "somewhere"
    meta = {k: v for k, v in stored.meta.items() if k != "staged_config"} | {"curriculum": "debug"}
    for name, changes in (("photos", {"config": config}), ("tuned", {"init_from": "other.pth"})):
        save_checkpoint(checkpoint_folder(tmp_path / name, 15), stored.weights, None, {**meta, **changes})
        text = model_card(tmp_path / name)
        assert "Not stated:" in text and "Apache" not in text
    bundled = {**meta, "init_from": "fenerf_synthetic_64"}
    save_checkpoint(checkpoint_folder(tmp_path / "ours", 15), stored.weights, None, bundled)
    assert "Apache-2.0. Trained on synthetic heads only" in model_card(tmp_path / "ours")
    result = CliRunner().invoke(card_command, [str(tmp_path / "tuned"), "--out", str(tmp_path / "card.md")])
    assert result.exit_code == 0 and "--init-from other.pth" in (tmp_path / "card.md").read_text()


def test_a_card_and_its_model_go_together_from_the_command_line(exported: Path, tmp_path: Path):
    numbers = tmp_path / "m.json"
    numbers.write_text(json.dumps(metrics_of(exported)))
    result = CliRunner().invoke(card_command, [str(exported), "--metrics", str(numbers)])
    assert result.exit_code == 0, result.output
    assert "| frechet_random | 1.25 |" in exported.with_suffix(".md").read_text()


def test_an_eg3d_has_no_depth_to_mirror(tmp_path: Path):
    with pytest.raises(UserError, match="--mirror-depth turns the fields of pi-GAN and FENeRF"):
        export("eg3d_synthetic_128", tmp_path / "out", mirror_depth=True)
    assert list(tmp_path.iterdir()) == []


def test_a_bundled_model_is_exported_by_its_name(tmp_path: Path):
    path = export("eg3d_synthetic_128", tmp_path / "again", "bf16")
    assert load(path).method == "eg3d"
