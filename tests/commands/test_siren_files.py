# SPDX-License-Identifier: Apache-2.0
"""Files of pi-GAN's and FENeRF's originals that do not fit, files of several heads, cards of converted models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import facelab
from facelab.bases.pigan.originals import read_raw
from facelab.cli.card import model_card
from tests.commands.running import DEBUG, GENERATOR, ORIGINALS, command_of, invoke, succeed

PIGAN = ORIGINALS / "pigan" / "checkpoint_fixture_generator.pth"
BIAS = "siren.network.2.layer.bias"


def refused(command: str, *arguments: Any) -> str:
    """The line with which a command refuses its arguments."""
    result = invoke(command, *arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr.strip()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted miniature of FENeRF's original."""
    path = tmp_path_factory.mktemp("converted") / "fenerf.safetensors"
    succeed("convert_checkpoint", "fenerf", GENERATOR, path)
    return path


FLAWS: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "shape": (lambda bias: bias[:-1], "does not fit its own shapes (size mismatch for field_net.geometry.2.bias"),
    "nan": (lambda bias: bias * float("nan"), "'field_net.geometry.2.bias' holds NaN or infinite numbers"),
    "missing": (lambda bias: None, "does not fit its own shapes: missing ['field_net.geometry.2.bias']"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_originals_whose_tensors_are_wrong_start_nothing(flaw: str, tmp_path: Path) -> None:
    change, words = FLAWS[flaw]
    state = dict(read_raw(PIGAN).states["generator"])
    changed = change(state.pop(BIAS))
    path = tmp_path / "generator.pth"
    torch.save(state if changed is None else {**state, BIAS: changed}, path)
    for line in (
        refused("convert_checkpoint", "pigan", path, tmp_path / "model.safetensors"),
        refused("train_pigan", *DEBUG, "--init-from", path, "--out", tmp_path / "run"),
    ):
        assert words in line and str(path) in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["generator.pth"]


def latents(model: Any, heads: int) -> dict[str, Tensor]:
    """Codes as the original's videos write them."""
    codes = [model.codes(seed, 0.7).values for seed in range(heads)]
    return {
        f"truncated_{kind}_{name}": torch.cat([code[name][:, i] for code in codes])
        for name in ("geo", "app")
        for i, kind in enumerate(("frequencies", "phase_shifts"))
    }


def test_a_file_of_several_heads_gives_a_grid_of_each(converted: Path, tmp_path: Path) -> None:
    several = tmp_path / "freq_phase_offset_0.pth"
    torch.save(latents(facelab.load(converted), 2), several)
    out = tmp_path / "imgs"
    options = ("--image-size", 4, "--yaws", "0", "--layers", "image", "--out", out)
    succeed("render_images", converted, "--latents", several, *options)
    assert sorted(path.name for path in out.iterdir()) == ["grid_latents_0.png", "grid_latents_1.png"]
    shapes = ("--voxel-resolution", 8, "--format", "mrc", "--out", tmp_path / "shapes")
    succeed("extract_mesh", converted, "--latents", several, *shapes)
    assert len(list((tmp_path / "shapes").glob("latents_*.mrc"))) == 2


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict], str]] = {
    "no_phases": (lambda d: {k: v for k, v in d.items() if k != "truncated_phase_shifts_app"}, "is missing"),
    "text": (lambda d: d | {"truncated_phase_shifts_app": "x"}, "expected tensors (N, width)"),
    "width": (
        lambda d: d | {"truncated_phase_shifts_app": d["truncated_phase_shifts_app"][:, 1:]},
        "of the same shape",
    ),
    "vectors": (lambda d: {k: v[0] for k, v in d.items()}, "expected tensors (N, width)"),
    "no_head": (lambda d: {k: v[:0] for k, v in d.items()}, "holds no head"),
}


@pytest.mark.parametrize("flaw", BROKEN)
def test_codes_of_the_original_that_are_incomplete(flaw: str, converted: Path, tmp_path: Path) -> None:
    change, words = BROKEN[flaw]
    path = tmp_path / "codes.pth"
    torch.save(change(latents(facelab.load(converted), 1)), path)
    line = refused("render_images", converted, "--latents", path, "--out", tmp_path / "imgs")
    assert line.startswith(f"error: {path}") and words in line


def test_the_card_of_a_converted_model_claims_no_training_of_ours(converted: Path) -> None:
    """Its configuration would train on synthetic heads; the authors did not."""
    card = model_card(converted)
    assert f"convert_checkpoint.py fenerf {GENERATOR.name} {converted.name} --curriculum celebamask_hq_128" in card
    assert f"Not stated: that of the file it was converted from, {GENERATOR.name}, decides." in card
    for claim in ("synthetic heads", "Apache-2.0", "train_fenerf.py", "deviations of"):
        assert claim not in card


def test_fresh_discriminators_need_a_model_to_start_from(tmp_path: Path) -> None:
    line = refused("train_fenerf", *DEBUG, "--fresh-discriminators", "--out", tmp_path / "run")
    assert "--init-from MODEL" in line and not (tmp_path / "run").exists()


def test_a_start_tells_that_the_discriminators_begin_anew(tmp_path: Path) -> None:
    result = invoke("train_fenerf", *DEBUG, "--dry-run", "--init-from", GENERATOR, "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "the discriminators start anew, the file has none" in result.stdout
    assert f"taken from {GENERATOR.name}: model." in result.stdout


def test_seeds_beyond_what_generators_take() -> None:
    line = refused("train_fenerf", *DEBUG, "--dry-run", "--seed", 10**20)
    assert "train.seed must lie between -2^63 and 2^63" in line


@pytest.mark.parametrize("script", ["export_model", "model_card"])
def test_a_file_of_an_original_is_to_be_converted_first(script: str, tmp_path: Path) -> None:
    out = [str(tmp_path / "model")] if script == "export_model" else []
    result = CliRunner().invoke(command_of(script), [str(GENERATOR), *out])
    assert result.exit_code == 2 and "convert it first: python scripts/convert_checkpoint.py auto" in result.stderr


def test_starting_and_going_on_exclude_each_other(tmp_path: Path) -> None:
    options = ("--init-from", GENERATOR, "--resume", tmp_path / "other", "--out", tmp_path / "run")
    assert "expected one of them" in refused("train_fenerf", *DEBUG, *options)


def test_a_run_that_has_all_its_steps_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--out", tmp_path / "run", "--max-steps", 1)
    succeed("train_fenerf", *DEBUG, *options)
    result = invoke("train_fenerf", *DEBUG, *options, "--resume", "auto")
    assert result.exit_code == 0
    assert "nothing left to do" in result.output + "".join(capfd.readouterr())


@pytest.mark.parametrize("command", ["render_images", "render_video", "extract_mesh"])
def test_heads_are_named_by_seeds_or_by_a_file(command: str, converted: Path, tmp_path: Path) -> None:
    both = ("--seeds", "0", "--latents", tmp_path / "codes.pth", "--out", tmp_path / "out")
    assert "--seeds and --latents both name heads" in refused(command, converted, *both)


def test_averages_are_named_or_left_out(tmp_path: Path) -> None:
    line = refused("convert_checkpoint", "pigan", PIGAN, tmp_path / "model.safetensors", "--ema", PIGAN, "--no-ema")
    assert "expected one of them" in line and not list(tmp_path.iterdir())
