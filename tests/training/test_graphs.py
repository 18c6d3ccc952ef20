# SPDX-License-Identifier: Apache-2.0
"""Phases that are played back give the same training as phases that run anew at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from facelab import recording
from facelab.config import load_staged, resolve_curriculum
from facelab.draws import Draws
from facelab.methods import load_config_type, load_method
from facelab.nn.augment import GEOMETRIC
from facelab.recording import Ungraphable, copy_tensors
from facelab.training import graphs
from facelab.training.distributed import Distributed
from facelab.training.graphs import Recording, taped
from facelab.training.loop import Trainer
from facelab.training.phases import PhaseContext, SharedResults, Sums
from facelab.training.schedule import Progress

COMMON = ("log.samples_every=0", "log.progress=false", "data.heads=8", "train.workers=0")
RUNS = {
    "eg3d": ("eg3d", "debug", ("loss.blur_fade_kimg=1",)),  # every step has another blur
    "eg3d with coins": (
        "eg3d",
        "debug",
        ("discriminator.label_noise=0.3", "loss.style_mixing=0.9", "conditioning.swap=0.5", "loss.blur_fade_kimg=0"),
    ),
    "eg3d with colours": (
        "eg3d",
        "debug",
        ("augment.mode=fixed", "augment.p=0.9", *(f"augment.strengths.{name}=0" for name in GEOMETRIC)),
    ),
    "stylesdf": ("stylesdf", "debug", ()),
    "stylesdf full": ("stylesdf", "debug_full", ()),
    "cnerf": ("cnerf", "debug_volume", ()),
    "cnerf full": ("cnerf", "debug_full", ()),
    "fenerf": ("fenerf", "debug", ()),
    "pigan": ("pigan", "debug", ()),
}


class Kept(Trainer):
    """A run that leaves no checkpoint, and keeps what it says."""

    def save(self) -> Path:
        return self.run_dir


def trained(name: str, folder: Path, played: bool, steps: int, device: str = "cpu") -> Kept:
    method, curriculum, settings = RUNS[name]
    changes = [*COMMON, *settings, f"train.max_steps={steps}", f"train.cuda_graphs={str(played).lower()}"]
    if name == "stylesdf full":
        first = load_staged(
            load_config_type(method), [resolve_curriculum(method, "debug")], [*COMMON, "train.max_steps=1"]
        )
        Trainer(load_method(method), first, folder / "first", Distributed()).run()
        changes.append(f"init_from={folder / 'first'}")
    config = load_staged(load_config_type(method), [resolve_curriculum(method, curriculum)], changes)
    run = Kept(load_method(method), config, folder / "run", Distributed(device=torch.device(device)))
    run.run()
    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_played_back(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WARM", 1)
    steps = 4
    plain = trained(name, tmp_path / "plain", False, steps)
    played = trained(name, tmp_path / "played", True, steps)
    said = capfd.readouterr()
    assert "without a CUDA graph" not in said.out + said.err
    assert played._graphs is not None and played._graphs.played > 0
    for model in plain.models:
        for key, value in plain.models[model].state_dict().items():
            assert torch.equal(value, played.models[model].state_dict()[key]), f"{model}.{key}"


def test_a_phase_that_warps_pictures_runs_without_a_graph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The margins of augmented pictures are numbers of Python's: one line for each phase says so, others are played."""
    monkeypatch.setattr(recording, "WARM", 1)
    ada = ("augment.mode=ada", "augment.interval=2", "augment.kimg=0.1", "augment.target=-2", "loss.r1_every=2")
    ada += ("loss.density_every=1",)
    monkeypatch.setitem(RUNS, "ada", ("eg3d", "debug", (*ada, "train.batch_size=8", "train.batch_chunk=4")))
    plain = trained("ada", tmp_path / "plain", False, 4)
    played = trained("ada", tmp_path / "played", True, 4)
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "without a CUDA graph" in line]
    phases = [line.split("phase ")[1].split()[0] for line in lines]
    assert sorted(phases) == ["d_main", "d_reg", "g_main"]
    assert all("without a CUDA graph: it augments pictures" in line for line in lines)
    assert played._graphs is not None and played._graphs.played > 0
    assert float(played.models["augment"].p) > 0
    for model in plain.models:
        for key, value in plain.models[model].state_dict().items():
            assert torch.equal(value, played.models[model].state_dict()[key]), f"{model}.{key}"


def test_resumed_and_uninterrupted_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are no part of the state: a resumed run makes its own."""
    monkeypatch.setattr(recording, "WARM", 1)
    whole = trained("cnerf", tmp_path / "whole", True, 5)
    method, curriculum, settings = RUNS["cnerf"]
    for steps, resume in ((2, None), (5, "auto")):
        changes = [*COMMON, *settings, f"train.max_steps={steps}", "train.cuda_graphs=true"]
        config = load_staged(load_config_type(method), [resolve_curriculum(method, curriculum)], changes)
        again = Trainer(load_method(method), config, tmp_path / "parts", Distributed(), resume=resume)
        again.run()
    for key, value in whole.models["generator"].state_dict().items():
        assert torch.equal(value, again.models["generator"].state_dict()[key]), key


# ---------------------------------------------------------------- what a phase may not do


def context(step: int = 0) -> PhaseContext:
    return PhaseContext(
        Progress(step, 4 * step, 4), None, {}, torch.device("cpu"), 2, 1, 2, Draws(3, step, "p", 1), None, SharedResults(),
        Sums(), Sums(), torch.ones(()), lambda enabled: torch.autocast("cpu", enabled=False),
    )  # fmt: skip


def played_losses(losses: Any, steps: int = 6) -> tuple[list[float], list[str]]:
    """What a phase logs at each step, and what was said."""
    said: list[str] = []
    runner, logged = graphs.PhaseGraphs(False, said.append), []
    for step in range(steps):
        here = context(step)

        def work(ctx: PhaseContext) -> None:
            for name, loss in losses(ctx):
                ctx.log(name, loss)

        runner.run(("p",), here, work)
        logged.append(float(here._log.totals["loss"]))
    return logged, said


def test_everything_that_comes_by_a_door_is_fresh() -> None:
    def losses(ctx: PhaseContext) -> Any:
        again = ctx.draws.at(phase="p/again", chunk=0)
        total = (
            ctx.draws.normal("a", (2,)).sum() + again.uniform("b", ()) + ctx.schedule(lambda progress: progress.step)
        )
        total = total + ctx.host(lambda draws: draws.normal("c", (3,)).sort().values, again)[0]
        total = total + ctx.shared("s", lambda draws: draws.normal("d", ()))
        if ctx.decide(lambda draws, progress: progress.step % 2 == 0):
            total = total * ctx.draws.normal("e", ())
        yield "loss", total

    def plainly(step: int) -> float:
        here = context(step)
        return 2 * float(next(losses(here))[1])

    found, said = played_losses(losses, 12)
    assert said == []
    assert found == [pytest.approx(plainly(step), rel=1e-6) for step in range(12)]


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (lambda ctx: torch.tensor(float(ctx.step)), "reads progress.step"),
        (lambda ctx: torch.randn((), generator=ctx.draws.generator("z")), "asks for the generator 'z'"),
        (lambda ctx: ctx.log("number", 1.0) or torch.zeros(()), "logs 'number'"),
    ],
)
def test_what_a_recording_cannot_refill_runs_without_one(what: Any, word: str) -> None:
    def losses(ctx: PhaseContext) -> Any:
        yield "loss", what(ctx)

    found, said = played_losses(losses)
    assert len(said) == 1 and word in said[0] and "without a CUDA graph" in said[0]
    assert found == [2 * float(what(context(step))) for step in range(6)]


def test_a_recording_that_asks_for_something_else_is_an_error() -> None:
    recording = Recording()
    taped(context(), recording, playing=False).draws.normal("a", (2,))
    again = taped(context(1), recording, playing=True)
    with pytest.raises(Ungraphable, match="out of order"):
        again.draws.normal("b", (2,))
    with pytest.raises(Ungraphable, match="shapes change"):
        copy_tensors(torch.zeros(2), torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_graphs_on_a_gpu(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same losses and, within rounding that atomics reorder, the same weights."""
    steps = 12
    plain = trained(name, tmp_path / "plain", False, steps, "cuda")
    played = trained(name, tmp_path / "played", True, steps, "cuda")
    said = capfd.readouterr()
    assert "without a CUDA graph" not in said.out + said.err
    assert played._graphs is not None and played._graphs.played > 0
    for model in plain.models:
        for key, value in plain.models[model].state_dict().items():
            other = played.models[model].state_dict()[key]
            apart = (other.double() - value.double()).abs() > 2e-3 + 1e-2 * value.double().abs()
            # where a gradient is almost zero, Adam steps by the sign of what rounding leaves of it
            assert apart.double().mean() < 0.02, f"{model}.{key}: {int(apart.sum())} of {apart.numel()} numbers differ"
