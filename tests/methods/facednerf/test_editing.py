# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's loop on a tiny EG3D: what moves and what stays, going on exactly, losses that are not wanted, NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.errors import Interrupted, UserError
from facelab.generator import Codes
from facelab.inversion.problem import Target
from facelab.inversion.session import STATE, TUNING, Session
from facelab.lighting import preset
from facelab.losses.perceptual import RandomPerceptual
from facelab.methods.facednerf import editing
from facelab.methods.facednerf.course import CODES, TUNE, Course
from facelab.methods.facednerf.editing import Control, Edited, Model, Networks, Step, edit, generate, project, relight
from facelab.methods.facednerf.terms import SideView, side_place
from facelab.nn.stylegan2 import FULL
from facelab.nn.stylegan2.noise import const_noise
from tests.methods.facednerf.doubles import SIDE, FakeText, networks, photos, settings, tiny_model

MODEL = tiny_model()


def weights_of(found: Edited, photo: int = 0) -> dict[str, Tensor]:
    return dict(found.generators[photo].state_dict())


def same(first: Edited, second: Edited) -> bool:
    """Bit for bit."""
    pairs = [(first.codes.values["w"], second.codes.values["w"]), (first.front.rgb, second.front.rgb)]
    pairs += [(first.noise[name], second.noise[name]) for name in first.noise]
    for a, b in zip(first.generators, second.generators, strict=True):
        pairs += [(value, b.state_dict()[name]) for name, value in a.state_dict().items()]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def projected() -> tuple[Target, Edited, list[Step]]:
    """Two photos, W+ with noise maps, then tuned."""
    target, steps = photos(MODEL, 2), list[Step]()
    config = settings("codes.steps=40", "tune.steps=15", "tune.lr=0.002", "weights.picture=5", "weights.noise=0.01")
    return target, project(MODEL, target, config, networks(), Control(on_step=steps.append)), steps


def test_both_stages_come_closer_to_the_photo(projected: tuple[Target, Edited, list[Step]]) -> None:
    target, found, steps = projected
    codes = [step for step in steps if step.stage == CODES]
    assert [step.step for step in codes] == list(range(40)) and codes[0].parts["picture"].shape == (2,)
    assert all((codes[-1].parts["picture"] < 0.9 * codes[0].parts["picture"]).tolist())
    for photo in range(2):
        tuned = [step for step in steps if step.stage == TUNE and step.photo == photo]
        assert len(tuned) == 15 and tuned[0].parts["picture"].shape == (1,)
        assert float(tuned[-1].parts["picture"]) < 0.8 * float(codes[-1].parts["picture"][photo])
    assert found.steps == 40 + 2 * 15
    error = (found.front.rgb - target.picture).square().mean()
    assert error < 0.8 * codes[-1].parts["picture"].mean()
    assert torch.allclose(found.losses["picture"].mean(), error)


def test_the_model_stays_and_every_photo_has_its_own(projected: tuple[Target, Edited, list[Step]]) -> None:
    _, found, _ = projected
    fresh = tiny_model().generator.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in MODEL.generator.state_dict().items())
    first, second = (weights_of(found, photo) for photo in range(2))
    assert not torch.equal(first["field_net.decoder.hidden_weight"], second["field_net.decoder.hidden_weight"])
    mapping = [name for name in fresh if name.startswith("backbone.mapping.")]
    assert mapping and all(torch.equal(first[name], fresh[name]) for name in mapping)
    assert not any(value.requires_grad for value in found.generators[0].parameters())


def test_noise_maps_are_found_normalised_and_stored(projected: tuple[Target, Edited, list[Step]]) -> None:
    _, found, _ = projected
    names = list(const_noise(MODEL.generator.backbone.synthesis))
    assert list(found.noise) == names
    for name, maps in found.noise.items():
        assert maps.shape[:2] == (2, 1)
        torch.testing.assert_close(maps.mean((1, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
        torch.testing.assert_close(maps.square().mean((1, 2, 3)), torch.ones(2))
        for photo, generator in enumerate(found.generators):
            stored = const_noise(generator.backbone.synthesis)[name]
            assert torch.equal(stored, maps[photo, 0])
            assert torch.equal(stored, generator.state_dict()[f"backbone.synthesis.{name}.noise_const"])
    # so codes and generator alone give the picture
    settings_now = MODEL.settings(settings()).deterministic()
    with torch.no_grad():
        scene = found.generators[1].scene(found.codes[[1]])
        again = found.generators[1].render(scene, found.camera[1], settings_now)
    torch.testing.assert_close(again.rgb[0], found.front.rgb[1])


def test_its_own_picture_is_found() -> None:
    weights = ["weights.identity=0", "weights.picture=10", "weights.noise=0.1"]
    config = settings("codes.steps=150", "codes.lr=0.05", "tune.steps=0", *weights)
    with torch.no_grad():
        codes, camera = MODEL.generator.map({"z": Draws(3).normal("z", (1, 8))}), MODEL.camera(config, 0.1, -0.1)
        scene = MODEL.generator.scene(codes)
        picture = MODEL.generator.render(scene, camera, MODEL.settings(config).deterministic()).rgb
    steps = list[Step]()
    found = project(MODEL, Target(picture, camera), config, networks(), Control(on_step=steps.append))
    assert (found.front.rgb - picture).square().mean() < steps[0].parts["picture"] / 10


@pytest.mark.parametrize("space", ["w", "w_plus"])
def test_spaces(space: str) -> None:
    config = settings(f"codes.space={space}", "tune.steps=0", "codes.noise_maps=false")
    found = project(MODEL, photos(MODEL), config, networks())
    w = found.codes.values["w"]
    assert w.shape == (1, MODEL.generator.backbone.num_ws, 12)
    assert torch.equal(w, w[:, :1].expand_as(w)) is (space == "w")
    assert found.noise == {} and found.steps == 6
    assert all(torch.equal(v, MODEL.generator.state_dict()[k]) for k, v in weights_of(found).items())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("stop_after", [3, 8])
def test_going_on_is_exact(tmp_path: Path, fresh: bool, stop_after: int) -> None:
    config = settings(f"reference.fresh_noise={str(fresh).lower()}", "weights.locality=0.1")
    target = photos(MODEL)
    whole = edit(MODEL, target, config, networks(), "left")
    made = list[Step]()
    control = Control([Session(tmp_path)], 2, on_step=made.append, stop=lambda: len(made) == stop_after)
    with pytest.raises(Interrupted, match=rf"step {stop_after - (6 if stop_after > 6 else 0)} of .* is kept in"):
        edit(MODEL, target, config, networks(), "left", control)
    assert (tmp_path / STATE).exists() and (tmp_path / TUNING).exists() is (stop_after > 6)
    rest = edit(MODEL, target, config, networks(), "left", dataclasses.replace(control, stop=lambda: False))
    assert rest.steps == 10 - stop_after and same(whole, rest)
    over = edit(MODEL, target, config, networks(), "left", dataclasses.replace(control, stop=lambda: False))
    assert over.steps == 0 and same(whole, over)


def test_a_photo_alone_and_side_by_side_without_jitter() -> None:
    config = settings("render.jitter=false", "tune.steps=2", "weights.text=0")
    target = photos(MODEL, 2)
    both = edit(MODEL, target, config, networks(), "right")
    alone = edit(MODEL, target[1], config, networks(), "right")
    torch.testing.assert_close(both.codes.values["w"][1], alone.codes.values["w"][0], atol=2e-5, rtol=1e-4)


def test_each_photo_may_have_its_own_light() -> None:
    lights = torch.cat([preset("right")[None], preset("left")[None]])
    steps = list[Step]()
    config = settings("weights.text=0", "codes.steps=2", "tune.steps=1")
    relight(MODEL, photos(MODEL, 2), config, networks(), lights, Control(on_step=steps.append))
    first = steps[0].parts["light"]
    for photo, name in enumerate(("right", "left")):
        alone = list[Step]()
        relight(MODEL, photos(MODEL, 2), config, networks(), name, Control(on_step=alone.append))
        torch.testing.assert_close(first[photo], alone[0].parts["light"][photo])
        assert torch.allclose(steps[2 + photo].parts["light"], alone[2 + photo].parts["light"], rtol=0.02)


# ---------------------------------------------------------------- what is computed


class Counting:
    """A generator that counts its scenes and renderings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scenes = self.renders = 0
        scene, render = TriPlaneGenerator.scene, TriPlaneGenerator.render

        def counted_scene(generator: Any, *args: Any, **kwargs: Any) -> Any:
            self.scenes += 1
            return scene(generator, *args, **kwargs)

        def counted_render(generator: Any, *args: Any, **kwargs: Any) -> Any:
            self.renders += 1
            return render(generator, *args, **kwargs)

        monkeypatch.setattr(TriPlaneGenerator, "scene", counted_scene)
        monkeypatch.setattr(TriPlaneGenerator, "render", counted_render)


def advanced(config: Any, nets: Networks, light: Any = None, steps: int = 3) -> list[Any]:
    course = Course(MODEL, photos(MODEL), config, nets, editing.light_goal(light, config))
    inversion = course.inversion()
    return [inversion.advance() for _ in range(steps)]


def test_one_scene_a_step_and_a_side_view_for_all_its_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    target_net = networks()
    count = Counting(monkeypatch)
    before = count.scenes  # the photo is made by another generator
    advanced(settings(), target_net, "right")
    made_by_photos = 1
    assert count.scenes - before - made_by_photos == 3
    assert count.renders - made_by_photos == 2 * 3


def test_losses_of_weight_zero_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    count, text = Counting(monkeypatch), FakeText()
    reports = advanced(settings("weights.text=0", "weights.light=0"), networks(text=text), "right")
    assert text.asked == 0 and count.renders - 1 == 3  # no side view
    assert set(reports[0].parts) == {"identity", "reconstruction", "noise"} and reports[0].shared == {}
    count.renders = 0
    reports = advanced(settings("weights.identity=0", "weights.reconstruction=0"), networks(text=text), "right")
    assert count.renders - 1 == 3 and reports[0].seen is None and text.asked == 3  # no front view
    assert reports[0].shared["side"].shape == (1, 3, SIDE, SIDE)
    assert text.progress == [0.0, 1 / 6, 2 / 6]


def test_all_losses_are_looked_at_on_request() -> None:
    config = settings("weights.text=0", "weights.light=0.1", "reference.all_losses=true", "weights.noise=0")
    with_all = advanced(config, networks(), "right")
    without = advanced(dataclasses.replace(config, reference=settings().reference), networks(), "right")
    assert {"text", "picture"} <= set(with_all[0].parts) and "text" not in without[0].parts
    assert [float(r.total) for r in with_all] == [float(r.total) for r in without]


def test_the_target_is_looked_at_once() -> None:
    seen = list[int]()

    def identity(pictures: Tensor) -> Tensor:
        seen.append(int(pictures.requires_grad))
        return pictures.flatten(1)[:, :8]

    advanced(settings(), networks(identity=identity), "right")
    assert seen == [0, 1, 1, 1]


# ---------------------------------------------------------------- side views and light


def test_side_views_stay_in_their_rectangle_and_differ() -> None:
    config = settings("side.width=0.4", "side.height=0.2")
    course = Course(MODEL, photos(MODEL, 2), config, networks(), editing.light_goal("right", config))
    inversion = course.inversion()
    seen = []
    for step in range(30):
        seen.append(side_place(MODEL, config, 2, Tensor, inversion.problem.clock(step, 30, "inversion")))
    angles = torch.tensor([view.angles for view in seen])
    assert (angles[:, 0].abs() <= 0.2).all() and (angles[:, 1].abs() <= 0.1).all()
    assert angles[:, 0].abs().max() > 0.15 and angles[:, 1].abs().max() > 0.07
    assert len(angles.unique(dim=0)) == 30 and len(seen[0].camera) == 2
    expected = MODEL.camera(config, *seen[3].angles).label()[0]
    assert torch.equal(seen[3].camera.label()[1], expected)
    radius = seen[3].camera.cam2world[:, :3, 3].norm(dim=1)
    torch.testing.assert_close(radius, torch.full((2,), MODEL.view.radius))


def side_at(horizontal: float, vertical: float) -> SideView:
    camera = MODEL.camera(settings(), horizontal, vertical)
    return SideView(camera, (horizontal, vertical), Draws(0), 0.0, lambda: torch.zeros(1, 3, SIDE, SIDE))


def test_light_stays_in_the_world() -> None:
    ours = editing.light_goal("left", settings())
    theirs = editing.light_goal("left", settings("reference.light_offsets=true"))
    assert ours is not None and theirs is not None
    front = side_at(0.0, 0.0)
    torch.testing.assert_close(ours(front).reshape(9), theirs(front).reshape(9), atol=2e-3, rtol=0)
    # moving sideways is a rotation, up to where the cameras look (a point beside the origin); moving up is not
    away = side_at(0.2, 0.0)
    moved = (ours(away) - ours(front)).reshape(9)
    torch.testing.assert_close(moved, (theirs(away) - theirs(front)).reshape(9), atol=0.05, rtol=0)
    assert moved.norm() > 0.1
    with pytest.raises(UserError, match="are for named lights, got nine numbers"):
        editing.light_goal(preset("left"), settings("reference.light_offsets=true"))
    with pytest.raises(UserError, match="no light named 'lef'.*Did you mean 'left'"):
        editing.light_goal("lef", settings())


def test_sampled_light_is_noisy_about_the_mean() -> None:
    plain = editing.light_goal("right", settings("reference.light_offsets=true"))
    noisy = editing.light_goal("right", settings("reference.light_offsets=true", "reference.sampled_light=true"))
    assert plain is not None and noisy is not None
    view = side_at(0.1, -0.1)
    again = dataclasses.replace(view, draws=Draws(0, step=1))
    assert not torch.equal(noisy(view), noisy(again)) and torch.equal(noisy(view), noisy(view))
    torch.testing.assert_close(noisy(view), plain(view), atol=0.02, rtol=0)


# ---------------------------------------------------------------- text alone


def test_heads_from_text_alone() -> None:
    text = FakeText(-0.4)
    config = settings("codes.steps=30", "weights.light=0", "weights.text=10", "weights.noise=0.01")
    steps = list[Step]()
    found = generate(MODEL, config, Networks(text=text), 2, control=Control(on_step=steps.append))
    assert found.front.rgb.shape == (2, 3, SIDE, SIDE) and len(found.generators) == 2 and found.losses == {}
    assert all(step.front is None and step.side is not None for step in steps)
    first, last = (steps[i].parts["text"] for i in (0, 29))
    assert (last < first).all()
    w = found.codes.values["w"]
    assert (w[0] - w[1]).norm() > 0.1  # random starts
    still = dataclasses.replace(config, render=dataclasses.replace(config.render, jitter=False))
    average = generate(MODEL, still, Networks(text=text), 2, random_start=False).codes.values["w"]
    torch.testing.assert_close(average[0], average[1], atol=1e-4, rtol=1e-3)
    front = MODEL.camera(config).label()
    torch.testing.assert_close(found.camera.label(), front.expand(2, -1))


# ---------------------------------------------------------------- tuning


class Lpips(RandomPerceptual):
    """Passes for LPIPS."""

    metric = "lpips_vgg"


def test_tuning_of_the_photo_ends_when_it_is_close_enough(tmp_path: Path) -> None:
    pti = ["tune.losses=photo", "tune.schedule=constant", "tune.steps=30", "tune.lr=0.003", "weights.light=0"]
    steps = list[Step]()
    target, nets = photos(MODEL), networks(perceptual=Lpips())
    project(MODEL, target, settings(*pti), nets, Control(on_step=steps.append))
    curve = [float(step.parts["reconstruction"]) for step in steps if step.stage == TUNE]
    assert len(curve) == 30 and set(steps[-1].parts) == {"picture", "reconstruction"}
    limit = sorted(curve)[10]
    number = next(i for i, value in enumerate(curve) if value <= limit)
    control = Control([Session(tmp_path)], on_step=steps.append)
    steps.clear()
    config = settings(*pti, f"tune.stop_at={limit + 1e-7}")
    short = project(MODEL, target, config, nets, control)
    tuned = [step for step in steps if step.stage == TUNE]
    assert len(tuned) == number + 1
    again = project(MODEL, target, config, nets, control)
    assert same(short, again)
    substitute = project(MODEL, target, config, networks())
    assert substitute.steps == 6 + 30  # its numbers mean something else


def test_only_named_parts_are_tuned() -> None:
    found = project(MODEL, photos(MODEL), settings("tune.parts=field_net", "codes.noise_maps=false"), networks())
    before = MODEL.generator.state_dict()
    moved = {name.split(".")[0] for name, value in weights_of(found).items() if not torch.equal(value, before[name])}
    assert moved == {"field_net"}
    with pytest.raises(UserError, match="has no part 'feld_net'"):
        project(MODEL, photos(MODEL), settings("tune.parts=feld_net"), networks())


def test_locality_keeps_other_heads() -> None:
    target = photos(MODEL)
    changes = []
    for weight in (0.0, 1000.0):
        config = settings("tune.steps=20", "tune.lr=0.003", f"weights.locality={weight}", "tune.schedule=constant")
        found = project(MODEL, target, config, networks())
        with torch.no_grad():
            codes = MODEL.generator.map({"z": Draws(3).normal("z", (4, 8))})
            view, now = (
                MODEL.camera(config).map(lambda x: x.expand(4, *x.shape[1:])),
                MODEL.settings(config).deterministic(),
            )
            pictures = [g.render(g.scene(codes, "none"), view, now).rgb for g in (MODEL.generator, found.generators[0])]
        changes.append(float((pictures[0] - pictures[1]).square().mean()))
    assert changes[1] < changes[0] / 2


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("option", ["memory.recompute=true", "memory.max_points=700"])
def test_memory_options_change_nothing(option: str) -> None:
    target = photos(MODEL)
    plain = edit(MODEL, target, settings(), networks(), "right")
    thrifty = edit(MODEL, target, settings(option), networks(), "right")
    torch.testing.assert_close(thrifty.codes.values["w"], plain.codes.values["w"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(thrifty.front.rgb, plain.front.rgb, atol=1e-3, rtol=1e-3)


def test_recomputing_keeps_less() -> None:
    kept = []
    for option in ("false", "true"):
        alone = ["weights.light=0", "weights.identity=0", "weights.reconstruction=0", "weights.picture=1"]
        config = settings(f"memory.recompute={option}", *alone)
        course = Course(MODEL, photos(MODEL), config, networks())
        inversion = course.inversion()
        stored = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal stored
            stored += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            inversion.problem.losses(inversion._moment(inversion.variables))
        kept.append(stored)
    assert kept[1] < kept[0] / 3


# ---------------------------------------------------------------- errors


class Poisoned(FakeText):
    """NaN from a step on; ``in_gradient``: the value itself is a number."""

    def __init__(self, step: int, in_gradient: bool = False) -> None:
        super().__init__()
        self.step, self.in_gradient = step, in_gradient

    def loss(self, pictures: Tensor, draws: Draws, *, progress: Callable[[int], float]) -> Tensor:
        value = super().loss(pictures, draws, progress=progress)
        if draws.step < self.step:
            return value
        return value + ((pictures - pictures).abs().sqrt().sum() if self.in_gradient else torch.nan)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_nan_stops_with_the_last_good_state(tmp_path: Path, in_gradient: bool) -> None:
    target, config = photos(MODEL), settings()
    whole = edit(MODEL, target, config, networks(), "right")
    control = Control([Session(tmp_path)], 100)
    what = "the derivative of the loss" if in_gradient else "the loss text"
    with pytest.raises(UserError, match=rf"{what} is not finite at step 3; .*last good state is kept in {tmp_path}"):
        edit(MODEL, target, config, networks(text=Poisoned(3, in_gradient)), "right", control)
    state = Session(tmp_path).read_state()
    assert state is not None and int(state["step"]) == 3
    assert all(torch.isfinite(value).all() for name, value in state.items() if name != "best_loss")
    assert same(whole, edit(MODEL, target, config, networks(), "right", control))


def test_out_of_memory_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(FakeText):
        def loss(self, pictures: Tensor, draws: Draws, *, progress: Callable[[int], float]) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(
        UserError, match=r"out of memory in stage codes, step 0 of 6; lower it with memory.recompute=true"
    ):
        edit(MODEL, photos(MODEL), settings(), networks(text=Hungry()), "right")


@pytest.mark.parametrize(
    ("overrides", "changes", "light", "message"),
    [
        ((), {"text": None}, "right", "'text' has weight 0.1 but there is no diffusion model with a prompt; give one"),
        ((), {"identity": None}, "right", "'identity' has weight 0.6 but there is no identity network"),
        ((), {"light": None}, "right", "'light' has weight 0.1 but there is no light estimator"),
        ((), {}, None, "'light' has weight 0.1 but there is no light to aim at"),
        (("weights.clip=1",), {}, "right", "'clip' has weight 1 but there is no CLIP model with a prompt"),
        (
            ("weights.text=0", "weights.light=0", "weights.identity=0", "weights.reconstruction=0"),
            {},
            None,
            "all weights",
        ),
        (("domain=cats", "weights.text=0", "weights.reconstruction=0"), {}, "right", "all weights are 0"),
    ],
)
def test_what_is_missing_is_said(overrides: tuple[str, ...], changes: dict[str, Any], light: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edit(MODEL, photos(MODEL), settings(*overrides), networks(**changes), light)


def test_pictures_of_another_size_and_foreign_states(tmp_path: Path) -> None:
    target = photos(MODEL)
    small = Target(target.picture[..., ::2, ::2].contiguous(), target.camera)
    with pytest.raises(UserError, match="the photos have 8 pixels a side, expected the model's 16"):
        edit(MODEL, small, settings(), networks(), "right")
    with pytest.raises(ValueError, match="a session for each of 1 photos, got 2"):
        edit(MODEL, target, settings(), networks(), "right", Control([Session(tmp_path), Session(tmp_path)]))
    project(MODEL, target, settings("codes.space=w", "tune.steps=0"), networks(), Control([Session(tmp_path)]))
    with pytest.raises(UserError, match=rf"{tmp_path / STATE}: the stored state does not fit.*remove it to begin"):
        project(MODEL, target, settings(), networks(), Control([Session(tmp_path)]))


def test_models_of_other_methods_are_refused() -> None:
    class Other:
        method, path = "fenerf", Path("heads.safetensors")

    with pytest.raises(UserError, match="heads.safetensors is a fenerf model, expected an EG3D model"):
        Model.of(Other())
    with pytest.raises(ValueError, match="N cameras"):
        Target(torch.zeros(1, 3, SIDE, SIDE), Camera.cat([MODEL.camera(settings())] * 2))


def test_copies_that_move_scale_features_and_results_compute_as_the_model() -> None:
    """Styles beside the weights in the loop; what comes out folds them again, and both draw the same picture."""
    model = tiny_model()
    moving = model.movable(FULL)

    def choices(generator: torch.nn.Module) -> set[object]:
        return {module.fused_modconv for module in generator.modules() if hasattr(module, "fused_modconv")}

    assert choices(moving) == {False} and choices(model.generator) == {"inference_only"}
    codes = Codes({"w": torch.randn(1, moving.backbone.num_ws, 12, generator=torch.Generator().manual_seed(0))})
    torch.testing.assert_close(moving.scene(codes).parts["planes"], model.generator.scene(codes).parts["planes"])
    found = project(model, photos(model), settings("codes.steps=1", "tune.steps=1"), networks())
    assert choices(found.generators[0]) == {"inference_only"}
    assert found.generators[0].precision == model.generator.precision
