# SPDX-License-Identifier: Apache-2.0
"""A whole edit whose steps are played back equals one whose steps run anew: every loss, both stages, every switch."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facelab import recording
from facelab.bases.eg3d.training import Eg3d
from facelab.config import load_staged, resolve_curriculum
from facelab.errors import Interrupted, UserError
from facelab.inversion import recorded
from facelab.inversion.problem import Target
from facelab.inversion.recorded import StepGraphs
from facelab.inversion.session import Session
from facelab.lighting import preset, to_dpr
from facelab.losses.perceptual import RandomPerceptual
from facelab.losses.score_distillation import ScoreDistillation
from facelab.methods import load_config_type
from facelab.methods.facednerf.course import CODES, Course
from facelab.methods.facednerf.editing import Control, Edited, Model, Networks, Step, edit, light_goal
from facelab.methods.facednerf.terms import SideView
from facelab.nn.pretrained.arcface import ArcFace, FaceIdentity
from facelab.nn.pretrained.diffusion import recompute_encoder
from facelab.nn.pretrained.light_estimator import LightEstimator
from facelab.nn.pretrained.random_diffusion import tiny_diffusion, tiny_embeddings
from facelab.recording import RecordingDraws
from tests.methods.facednerf.doubles import FakeText, networks, photos, settings, tiny_model

MODEL = tiny_model()
CODES_STEPS, TUNE_STEPS = 8, 3  # 6 of the first with perturbed codes
SHORT = (f"codes.steps={CODES_STEPS}", f"tune.steps={TUNE_STEPS}")
ALL = (*SHORT, "weights.picture=0.1", "weights.locality=0.1", "guidance.picture_size=32", "guidance.t_max_end=0.5")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """Stages on the CPU play their steps on recorded memory, and draws are looked at as if the model lay elsewhere."""
    made: list[StepGraphs] = []
    elsewhere = RecordingDraws._elsewhere

    def graphs(wanted: bool, device: torch.device, say: Callable[[str], None]) -> StepGraphs | None:
        if wanted:
            made.append(StepGraphs(False, say))
        return made[-1] if wanted else None

    monkeypatch.setattr(recording, "WARM", 1)
    monkeypatch.setattr(recorded, "step_graphs", graphs)
    # who names no device draws on the CPU, which a GPU would notice
    monkeypatch.setattr(RecordingDraws, "_elsewhere", lambda self, d: isinstance(d, str) or elsewhere(self, d))
    return made


def text(config: Any, device: str = "cpu", recompute: bool = False) -> ScoreDistillation:
    """Score distillation with tiny networks of diffusers."""
    pytest.importorskip("diffusers")
    parts = tiny_diffusion(device=device)
    if recompute:
        recompute_encoder(parts.vae)
    return ScoreDistillation(
        parts.unet, parts.vae, parts.scheduler, tiny_embeddings("a hat").to(device), config.guide()
    )


def edited(
    config: Any,
    nets: Networks,
    light: Any,
    *,
    graphs: bool,
    model: Model = MODEL,
    target: Target | None = None,
    **more: Any,
) -> tuple[Edited, list[Step], list[str]]:
    """An edit, what its steps told, what was said."""
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, cuda_graphs=graphs))
    steps, said = list[Step](), list[str]()
    control = Control(on_step=steps.append, say=said.append, **more)
    found = edit(model, photos(model) if target is None else target, config, nets, light, control)
    return found, steps, said


def alike(first: tuple[Edited, list[Step], list[str]], second: tuple[Edited, list[Step], list[str]]) -> None:
    """Bit for bit: results, and what each step told."""
    for one, other in zip(first[1], second[1], strict=True):
        where = f"{one.stage} {one.step}"
        assert torch.equal(one.total, other.total), where
        assert all(torch.equal(value, other.parts[name]) for name, value in one.parts.items()), where
        for a, b in ((one.front, other.front), (one.side, other.side)):
            assert (a is None) is (b is None) and (a is None or torch.equal(a, b)), where
    a, b = first[0], second[0]
    assert torch.equal(a.codes.values["w"], b.codes.values["w"])
    for one, other in zip(a.generators, b.generators, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "light", "count"),
    [
        ((), "right", 1),
        (("memory.recompute=true", "memory.max_points=700"), "left", 1),
        (("codes.space=w", "codes.noise_maps=false", "tune.losses=photo", "tune.schedule=constant"), "right", 2),
        (("reference.fresh_noise=true", "reference.light_offsets=true", "reference.sampled_light=true"), "right", 1),
        (("reference.weighted_backward=true", "guidance.samples=2", "guidance.rows=1"), "below", 1),
        (("reference.all_losses=true", "weights.light=0", "render.jitter=false"), "right", 1),
    ],
)
def test_an_edit_is_the_same_played_back(
    overrides: tuple[str, ...], light: str, count: int, played: list[StepGraphs]
) -> None:
    config = settings(*ALL, *overrides)
    nets = networks(text=text(config, recompute=config.memory.recompute))
    target = photos(MODEL, count)
    plain = edited(config, nets, light, graphs=False, target=target)
    again = edited(config, nets, light, graphs=True, target=target)
    assert again[2] == []
    # perturbed and unperturbed codes are recorded apart, each after one run
    assert [graphs.played for graphs in played] == [CODES_STEPS - 2, *[TUNE_STEPS - 1] * count]
    alike(plain, again)


def test_each_photo_keeps_its_own_light(played: list[StepGraphs]) -> None:
    lights = torch.cat([preset("right")[None], preset("left")[None]])
    config, target = settings(*SHORT), photos(MODEL, 2)
    plain = edited(config, networks(), lights, graphs=False, target=target)
    again = edited(config, networks(), lights, graphs=True, target=target)
    assert again[2] == [] and all(graphs.played for graphs in played)
    alike(plain, again)


def test_a_light_of_ones_own_is_asked_at_every_step(played: list[StepGraphs]) -> None:
    """Its view is that of the step: angles, camera, share of the stage, random numbers."""
    seen: list[tuple[float, float]] = []

    def turning(side: SideView) -> Tensor:
        seen.append((side.angles[0], side.progress))
        return to_dpr(preset("right")[None], side.camera) * (1 + side.progress) + 0.1 * side.draws.normal("own", (9,))

    config = settings(*SHORT)
    plain = edited(config, networks(), turning, graphs=False)
    first = list(seen)
    seen.clear()
    again = edited(config, networks(), turning, graphs=True)
    assert again[2] == [] and seen == first and len(first) == CODES_STEPS + TUNE_STEPS
    alike(plain, again)


def test_a_light_that_looks_at_the_picture_runs_and_is_said(played: list[StepGraphs]) -> None:
    def looking(side: SideView) -> Tensor:
        return preset("right") * side.picture.detach().mean()

    config = settings(*SHORT)
    plain = edited(config, networks(), looking, graphs=False)
    again = edited(config, networks(), looking, graphs=True)
    why = "runs without a CUDA graph: it has a light to aim at that looks at the picture"
    assert again[2] == [f"stage inversion {why}", f"stage tuning {why}"]
    assert [graphs.played for graphs in played] == [0, 0]
    alike(plain, again)


@pytest.mark.parametrize("stop_after", [3, 7, CODES_STEPS + 2])
def test_going_on_is_exact(tmp_path: Path, stop_after: int, played: list[StepGraphs]) -> None:
    config, nets = settings(*SHORT, "weights.locality=0.1"), networks()
    whole = edited(config, nets, "left", graphs=False)
    made = list[Step]()
    control = Control([Session(tmp_path)], 2, on_step=made.append, stop=lambda: len(made) == stop_after)
    with pytest.raises(Interrupted):
        edit(MODEL, photos(MODEL), config, nets, "left", control)
    rest = edited(config, nets, "left", graphs=True, sessions=[Session(tmp_path)])
    assert rest[2] == []
    alike((whole[0], [], []), (rest[0], [], []))


def test_nan_stops_with_the_last_good_state(tmp_path: Path, played: list[StepGraphs]) -> None:
    class Poisoned(FakeText):
        def loss(self, pictures: Tensor, draws: Any, *, progress: Any) -> Tensor:
            worth = draws.host(lambda own: torch.tensor(torch.nan if own.step == 4 else 0.0), pictures.device)
            return super().loss(pictures, draws, progress=progress) + worth

    config = settings(*SHORT)
    whole = edited(config, networks(), "right", graphs=False)
    with pytest.raises(UserError, match=r"the loss text is not finite at step 4; .*last good state is kept in"):
        edited(config, networks(text=Poisoned()), "right", graphs=True, sessions=[Session(tmp_path)])
    assert played[0].played == 4  # the step was one that is played back
    rest = edited(config, networks(), "right", graphs=True, sessions=[Session(tmp_path)])
    assert rest[0].steps == CODES_STEPS + TUNE_STEPS - 4
    alike((whole[0], [], []), (rest[0], [], []))


def test_a_stage_that_is_dropped_takes_its_recordings_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """No circle of references holds gigabytes of a graph until Python looks for circles."""
    monkeypatch.setattr(recorded, "step_graphs", lambda wanted, device, say: StepGraphs(False, say))
    config = settings(*ALL)
    course = Course(MODEL, photos(MODEL), config, networks(text=text(config)), light_goal("right", config))
    inversion = course.inversion()
    gc.disable()
    try:
        for _ in range(3):  # recorded, not played: the double of a graph holds on to its work
            inversion.advance()
        graphs = weakref.ref(inversion.graphs)
        found = inversion.present()
        del inversion
        assert graphs() is None
        tuning = course.tuning(found, 0)
        tuning.advance()
        graphs = weakref.ref(tuning.graphs)
        del tuning
        assert graphs() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- on a GPU


def judges(config: Any, device: str, recompute: bool) -> Networks:
    """Networks of the real architectures where that is cheap, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made: list[nn.Module] = [FaceIdentity(ArcFace()), LightEstimator(side=32), RandomPerceptual()]
    identity, light, perceptual = (net.requires_grad_(False).eval().to(device) for net in made)
    return Networks(perceptual, identity, text(config, device, recompute), None, light)  # type: ignore[arg-type]


def model_with_superresolution(device: str) -> Model:
    """EG3D's debug curriculum."""
    config = load_staged(load_config_type("eg3d"), [resolve_curriculum("eg3d", "debug")], []).stages[-1]
    generator = Eg3d().build_generator(config).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.1)
    return Model(generator.to(device), config.view, config.render)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides", [(), ("memory.recompute=true", "memory.max_points=5000"), ("memory.superresolution=bf16",)]
)
def test_graphs_on_a_gpu(overrides: tuple[str, ...]) -> None:
    """Nothing is said, and losses are those of plain steps; later ones drift as atomics reorder sums, and Adam's first
    steps divide rounding by its own size."""
    model = model_with_superresolution("cuda")
    longer = ("codes.steps=16", "tune.steps=6", "codes.lr=0.001", "tune.lr=0.00001")
    config = settings(*ALL, *longer, "memory.precision=fp32", *overrides)
    side = model.picture_side(model.settings(config))
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    target = Target(
        nn.functional.interpolate(picture, size=(side, side), mode="bilinear"), model.camera(config, 0.1, 0.0)
    )
    nets = judges(config, "cuda", config.memory.recompute)
    plain = edited(config, nets, "right", graphs=False, model=model, target=target)
    again = edited(config, nets, "right", graphs=True, model=model, target=target)
    assert again[2] == [], again[2]
    loose = 0.2 if overrides == ("memory.superresolution=bf16",) else 0.05
    for one, other in zip(plain[1], again[1], strict=True):
        for name, value in one.parts.items():
            # a step that played an earlier one's numbers would see another side view, with other losses altogether
            torch.testing.assert_close(
                other.parts[name], value, rtol=loose, atol=1e-3,
                msg=lambda text, s=one, n=name: f"{s.stage} {s.step}, {n}: {text}",
            )  # fmt: skip
        if one.side is not None and other.side is not None:
            assert float((one.side - other.side).abs().mean()) < loose / 5, f"{one.stage} {one.step}"


@pytest.mark.gpu
def test_stages_on_a_gpu_are_played() -> None:
    model = model_with_superresolution("cuda")
    config = settings(*ALL, "codes.steps=16", "tune.steps=6")
    side = model.picture_side(model.settings(config))
    target = Target(torch.zeros(1, 3, side, side), model.camera(config))
    said: list[str] = []
    nets = judges(config, "cuda", False)
    course = Course(model, target, config, nets, light_goal("right", config), Control(say=said.append))
    with course.switches():
        inversion = course.inversion()
        for _ in range(5):
            inversion.advance()
        assert said == [], said
        assert inversion.graphs is not None and inversion.graphs.played == 2, CODES
        tuning = course.tuning(inversion.present(), 0)
        for _ in range(4):
            tuning.advance()
    assert said == [], said
    assert tuning.graphs is not None and tuning.graphs.played == 1
