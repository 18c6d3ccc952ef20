# SPDX-License-Identifier: Apache-2.0
"""FENeRF trains: gradient routing, chunks, processes, resuming, fine-tuning, curriculum rows, real pairs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import facelab
from facelab.bases.pigan.originals import read_original
from facelab.bases.pigan.training import Fakes
from facelab.checkpoints.format import Checkpoint, load_checkpoint
from facelab.config import load_staged, resolve_curriculum
from facelab.methods.fenerf.config import FenerfConfig
from facelab.methods.fenerf.training import Fenerf
from facelab.training.loop import Trainer
from facelab.training.phases import Losses, PhaseContext
from tests.commands.running import DEBUG, GENERATOR, environment, invoke, script, succeed, train
from tests.conftest import CHECKOUT

NO_RATES = tuple(x for n in ("generator", "image", "semantic") for x in ("--set", f"optim.{n}_lr=0"))
STAGED = """
base: {base}
stages:
  - from_step: 0
  - from_step: 2
    render.resolution: 16
    optim.generator_lr: 1.0e-5
"""


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def run_here(method: Fenerf, folder: Path, *overrides: str) -> Trainer:
    """Train a method object with the debug curriculum in this process."""
    quiet = ["log.progress=false", "log.samples_every=0", "train.max_steps=1"]
    staged = load_staged(FenerfConfig, [resolve_curriculum("fenerf", "debug")], [*quiet, *overrides])
    trainer = Trainer(method, staged, folder)
    trainer.run()
    return trainer


def assert_same(first: Checkpoint, second: Checkpoint, groups: set[str] | None = None, **tolerance: float) -> None:
    """Equal weights, bit for bit unless a tolerance is given."""
    for group in groups or set(first.weights) | set(second.weights):
        assert first.weights[group].keys() == second.weights[group].keys()
        for key, value in first.weights[group].items():
            other = second.weights[group][key]
            if tolerance:
                torch.testing.assert_close(other, value, msg=lambda m, n=f"{group}.{key}": f"{n}: {m}", **tolerance)
            else:
                assert torch.equal(other, value), f"{group}.{key}"


class Routed(Fenerf):
    """Differentiates each discriminator's opinion of the same fakes on its own."""

    def __init__(self) -> None:
        self.gradients: dict[str, dict[str, float]] = {}

    def generator_losses(self, ctx: PhaseContext) -> Losses:
        generator = ctx.models["generator"]
        fakes, alpha = self.generate(ctx, ctx.draws), self.alpha(ctx)
        named = dict(generator.named_parameters())
        for judge in self.judges():
            opinion = ctx.models[judge.model](judge.fake(fakes.output, for_generator=True), alpha)
            loss = opinion.realness.sum() + opinion.pose.sum()
            found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            self.gradients[judge.model] = {
                name: 0.0 if g is None else float(g.abs().sum()) for name, g in zip(named, found, strict=True)
            }
        yield from super().generator_losses(ctx)


def test_colour_learns_from_pictures_alone_and_labels_from_masks_alone(tmp_path: Path) -> None:
    method = Routed()
    run_here(method, tmp_path, "render.noise_steps=0")
    image, semantic = method.gradients["d_image"], method.gradients["d_semantic"]
    colour = ("field_net.rgb.", "field_net.color.", "mapping.app.")
    seen = {"colour": 0, "labels": 0, "shape": 0}
    for name in image:
        if name.startswith(colour):
            assert image[name] > 0 and semantic[name] == 0, name
            seen["colour"] += 1
        elif name.startswith("field_net.labels."):
            assert image[name] == 0 and semantic[name] > 0, name
            seen["labels"] += 1
        else:
            assert image[name] > 0 and semantic[name] > 0, name
            seen["shape"] += 1
    assert seen == {"colour": 2 + 3 * 2 + 5 * 2, "labels": 2 * 2, "shape": 8 * 2 + 2 + 5 * 2}


class Watched(Fenerf):
    """Notes which fakes each network is asked about."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.given: list[Tensor] = []

    def generate(self, ctx: PhaseContext, draws: Any) -> Fakes:
        fakes = super().generate(ctx, draws)
        self.made.append(fakes.output.rgb.detach())
        return fakes

    def discriminator_fakes(self, ctx: PhaseContext) -> Fakes:
        fakes = super().discriminator_fakes(ctx)
        assert not fakes.output.rgb.requires_grad
        self.given.append(fakes.output.rgb)
        return fakes


def test_shared_fakes_are_the_same_for_both_discriminators(tmp_path: Path) -> None:
    own, shared = Watched(), Watched()
    run_here(own, tmp_path / "own", "train.batch_chunk=4")
    run_here(shared, tmp_path / "shared", "train.batch_chunk=4", "share_fakes=true")
    assert len(own.made) == 3 and not torch.equal(own.given[0], own.given[1])
    assert len(shared.made) == 2 and torch.equal(shared.given[0], shared.given[1])
    assert not torch.equal(shared.made[0], shared.made[1])  # the generator is judged on others


def test_reference_sums_the_chunks_of_the_generator_only(tmp_path: Path) -> None:
    """Two chunks: the original's generator gradient is twice the mean; discriminators are not touched."""
    options = ("--max-steps", 1, "--set", "train.grad_clip=null")
    mean = log_of(train(tmp_path / "mean", *options))[0]
    summed = log_of(train(tmp_path / "sum", *options, "--set", "reference.sum_chunks=true"))[0]
    assert summed["grad_norm/generator"] == pytest.approx(2 * mean["grad_norm/generator"], rel=1e-3)
    for name in ("grad_norm/d_image", "grad_norm/d_semantic"):
        assert summed[name] == pytest.approx(mean[name], rel=1e-6) and mean[name] > 0


def test_logged_losses_are_those_of_the_formula(tmp_path: Path) -> None:
    entry = log_of(train(tmp_path, "--max-steps", 1))[0]
    assert entry["generator/total"] == pytest.approx(
        entry["generator/d_image"] + 0.1 * entry["generator/d_semantic"], rel=1e-5
    )
    for name in ("d_image/real", "d_image/fake", "d_semantic/real", "d_semantic/fake", "d_semantic/r1"):
        assert entry[name] > 0, name
    assert entry["lr/generator"] == 6e-5 and entry["lr/d_image"] == entry["lr/d_semantic"] == 2e-4


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The command with two gloo processes and the same global batch: the same numbers to rounding."""
    batch = ("--set", "train.batch_size=4", "--max-steps", 2)
    one = train(tmp_path / "one", *batch)
    done = script("train_fenerf", *DEBUG, *batch, "--processes", 2, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert_same(load_checkpoint(one), load_checkpoint(tmp_path / "two"), rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        for key in (k for k in mine if k.startswith(("d_image/", "d_semantic/", "generator/", "grad_norm/"))):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5, abs=1e-6), key


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A curriculum whose second row begins at step 2 with twice the resolution."""
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED.format(base=resolve_curriculum("fenerf", "debug")))
    return path


def test_rows_change_resolution_and_resuming_is_exact_across_them(tmp_path: Path, staged: Path) -> None:
    """4 steps at once, and 1 + 2 + 1: before, across and after the change, with sample grids on the way."""
    options = ("--curriculum", staged, "--set", "loss.fade_steps=4", "--set", "log.samples_every=3")
    whole = train(tmp_path / "whole", *options, "--max-steps", 4)
    parts = tmp_path / "parts"
    for steps in (1, 3, 4):
        train(parts, *options, "--max-steps", steps, "--resume", "auto")
    first, second = load_checkpoint(whole), load_checkpoint(parts)
    assert_same(first, second)
    assert _numbers(first.state) == _numbers(second.state)
    assert [entry["row"] for entry in log_of(whole)] == [0, 0, 1, 1]
    assert [entry["lr/generator"] for entry in log_of(whole)] == [6e-5, 6e-5, 1e-5, 1e-5]
    assert first.state["position"]["starts"] == [(0, 0), (2, 8)]  # type: ignore[index]
    model = facelab.load(whole)
    assert model.config.render.resolution == 16 and model.sample(0).rgb.shape == (1, 3, 16, 16)
    from PIL import Image

    with Image.open(whole / "samples" / "00000003_image_fixed.png") as grid:
        assert grid.size == (2 * 16, 2 * 16)


def _numbers(state: Any) -> list[Any]:
    """The leaves of a training state, without the random generators of the libraries (nothing draws from them)."""

    def walk(value: Any, path: str) -> Iterator[Any]:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                if (path, key) != ("", "random"):
                    yield from walk(value[key], f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                yield from walk(item, f"{path}/{place}")
        else:
            yield path, value.tolist() if isinstance(value, Tensor) else value

    return list(walk(state, ""))


def test_fine_tuning_from_an_own_run(tmp_path: Path) -> None:
    """Rates of zero show what was taken over: the averaged generator, and the discriminators unless fresh ones."""
    source = train(tmp_path / "source", "--max-steps", 2, "--set", "ema.decay=0.5", "--seed", 3)
    old = load_checkpoint(source)
    options = ("--init-from", source, "--max-steps", 1, *NO_RATES)
    kept = load_checkpoint(train(tmp_path / "kept", *options))
    fresh = load_checkpoint(train(tmp_path / "fresh", *options, "--fresh-discriminators"))
    blank = load_checkpoint(train(tmp_path / "blank", "--max-steps", 1, *NO_RATES))
    for run in (kept, fresh):
        assert run.step == 1 and run.meta["init_from"] == str(source)
        for key, value in run.weights["generator"].items():
            if not key.startswith("average_"):
                assert torch.equal(value, old.weights["ema"][key]), key
    assert not torch.equal(
        old.weights["ema"]["field_net.sigma.weight"], old.weights["generator"]["field_net.sigma.weight"]
    )
    assert_same(kept, old, {"d_image", "d_semantic"})
    assert_same(fresh, blank, {"d_image", "d_semantic"})


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    source = train(tmp_path / "source", "--max-steps", 1)
    other = ("--set", "discriminator.channels=[8, 8, 8, 12]", "--max-steps", 1)
    result = invoke("train_fenerf", *DEBUG, "--init-from", source, *other, "--out", tmp_path / "refused")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith(f"error: {source}: the weights of 'd_image' do not fit")
    assert line.endswith("or --fresh-discriminators")
    train(tmp_path / "fresh", "--init-from", source, *other, "--fresh-discriminators")
    wider = ("--init-from", source, "--set", "model.hidden=24", "--out", tmp_path / "wider")
    assert "the weights of 'generator' do not fit" in invoke("train_fenerf", *DEBUG, *wider).stderr


def test_fine_tuning_does_not_keep_old_averages(tmp_path: Path) -> None:
    """The centre of truncation is that of the trained weights, not of those the run began with."""
    facelab.load(train(tmp_path / "source")).save(tmp_path / "source.safetensors")
    tuned = train(
        tmp_path / "tuned", "--init-from", tmp_path / "source.safetensors", "--set", "optim.generator_lr=0.05"
    )
    model = facelab.load(tuned)
    stored = {k: v.clone() for k, v in model.generator.average_codes().values.items()}
    model.generator.update_averages()
    for name, value in model.generator.average_codes().values.items():
        torch.testing.assert_close(stored[name], value)
    before = facelab.load(tmp_path / "source.safetensors").generator.average_codes()
    assert all((before.values[name] - value).abs().max() > 1e-3 for name, value in stored.items())


def test_fine_tuning_from_an_original_generator(tmp_path: Path) -> None:
    """The pickled miniature of the released files: its averaged weights, its architecture, fresh discriminators."""
    result = succeed("train_fenerf", *DEBUG, "--init-from", GENERATOR, "--out", tmp_path, "--max-steps", 1, *NO_RATES)
    assert result.exit_code == 0
    original, ours = (
        read_original(GENERATOR, GENERATOR.with_name("checkpoint_fixture_ema.pth")),
        load_checkpoint(tmp_path),
    )
    assert set(original.weights) == {"generator", "ema"}
    for key, value in original.weights["ema"].items():
        if not key.startswith("average_"):
            assert torch.equal(ours.weights["generator"][key], value), key
    model = facelab.load(tmp_path)
    assert model.config.model.hidden == 8 and model.config.model.grid_size == [3, 4, 5]
    assert model.config.model.variant == original.model["variant"]
    again = train(tmp_path / "trained", "--init-from", GENERATOR)
    moved = load_checkpoint(again).weights["generator"]["field_net.grid"]
    assert not torch.equal(moved, ours.weights["generator"]["field_net.grid"]) and bool(moved.isfinite().all())


def test_reference_restores_every_original_behaviour(tmp_path: Path) -> None:
    result = succeed("train_fenerf", *DEBUG, "--reference", "--out", tmp_path)
    assert "deviates" not in result.stdout
    meta = load_checkpoint(tmp_path).meta
    assert meta["deviations"] == [] and facelab.load(tmp_path).deviations == []
    reference = meta["config"]["reference"]  # type: ignore[index]
    assert reference and all(reference.values())


@pytest.mark.shared
def test_real_pairs_train(tmp_path: Path, real_data: Path) -> None:
    """Five portraits with masks, 32 px, two dozen steps of a small model: both discriminators tell real from
    made, nothing is skipped, the grids are there."""
    settings = {
        "model.hidden": 32, "discriminator.channels": "[16, 16, 16, 16, 16, 16]", "render.resolution": 32,
        "render.samples": 6, "train.batch_per_gpu": 4, "train.batch_chunk": 4, "checkpoint.every": 24, "log.every": 8,
        "optim.image_lr": 1e-3, "optim.semantic_lr": 1e-3, "loss.fade_steps": 0, "loss.pose": 0,
    }  # fmt: skip
    options = [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
    data = ("--data", real_data / "celebamask_pairs", "--max-steps", 24)
    result = succeed("train_fenerf", *DEBUG, *options, "--set", "log.samples_every=24", *data, "--out", tmp_path)
    assert "data: 5 samples, smallest 1024 x 1024 px" in result.stdout
    entries = log_of(tmp_path)
    assert [entry["step"] for entry in entries] == [8, 16, 24]
    assert all(entry[f"skipped/{phase}"] == 0 for entry in entries for phase in ("d_image", "d_semantic", "generator"))
    for judge in ("d_image", "d_semantic"):
        assert entries[-1][f"{judge}/real"] < entries[0][f"{judge}/real"]
        assert entries[-1][f"{judge}/real_logit"] - entries[-1][f"{judge}/fake_logit"] > 1
    assert len(list((tmp_path / "samples").glob("00000024_*.png"))) == 10
    assert load_checkpoint(tmp_path).step == 24


DYING = """
import os, signal
from facelab.cli.train import train_command
from facelab.methods.fenerf.training import Fenerf

original = Fenerf.generate

def generate(self, ctx, draws):
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and os.environ["RANK"] == "1" and ctx.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, ctx, draws)

if DIES:
    Fenerf.generate = generate
train_command("fenerf", "debug")()
"""


def torchrun(script_file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [
        *DEBUG,
        "--set",
        "train.batch_size=4",
        "--set",
        "checkpoint.every=1",
        "--max-steps",
        "5",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script_file), *arguments]
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), text=True, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True], ids=["two_nodes", "a_killed_worker_comes_back"])
def test_torchrun(tmp_path: Path, dies: bool) -> None:
    """Two agents on loopback, and a worker that is killed in its first life: both equal one process."""
    code = tmp_path / "train.py"
    code.write_text(DYING.replace("DIES", str(dies)))
    if dies:
        agents = [torchrun(code, tmp_path / "run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")]
    else:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            endpoint = f"localhost:{probe.getsockname()[1]}"
        common = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "fenerf")
        where = ("--rdzv-endpoint", endpoint, "--local-addr", "localhost")
        agents = [torchrun(code, tmp_path / "run", *common, *where) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
        assert not dies or "resumed from" in errors
    whole = train(tmp_path / "one", "--set", "train.batch_size=4", "--max-steps", 5)
    assert_same(load_checkpoint(whole), load_checkpoint(tmp_path / "run"), rtol=1e-4, atol=1e-6)
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    """Nothing in it points to where it was."""
    run = train(tmp_path / "here")
    moved = shutil.move(run, tmp_path / "elsewhere")
    assert not os.path.exists(run)
    train(Path(moved), "--resume", "auto", "--max-steps", 3)
    assert load_checkpoint(moved).step == 3
