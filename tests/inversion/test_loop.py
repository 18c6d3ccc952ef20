# SPDX-License-Identifier: Apache-2.0
"""The optimisation of codes, noise and cameras."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.inversion.loop import (
    Inversion,
    InversionSettings,
    NotFiniteError,
    _laid_out,
    advance_until,
    constant_rate,
)
from facelab.inversion.noise import noise_correlation, noise_correlations, normalise_noise
from facelab.inversion.problem import Moment
from facelab.inversion.schedules import perturbation, ramped_rate
from facelab.inversion.start import code_statistics, random_latents, start_statistics
from facelab.inversion.terms import noise_term, offsets_term, prior_term
from tests.inversion.doubles import SIDE, WIDTH, Double, make_problem, own_pictures

VIEWS = torch.tensor([[0.2, -0.1], [-0.3, 0.1], [0.0, 0.0]])
FAST = InversionSettings(150, functools.partial(ramped_rate, steps=150, base=0.1))


def start() -> object:
    return start_statistics(Double(), random_latents(Double(), 64)).average


def test_codes_of_its_own_picture_are_found() -> None:
    """The loss falls by a factor of a thousand in 150 steps; the picture is matched to a grey level."""
    target, _ = own_pictures(Double(), VIEWS)
    inversion = Inversion(make_problem(target), start(), FAST)
    losses: list[Tensor] = []
    assert advance_until(inversion, on_step=lambda report: losses.append(report.total))
    solution = inversion.solution()
    assert (solution.total < losses[0] / 1000).all(), (losses[0], solution.total)
    problem = inversion.problem
    output = problem.generator.render(problem.generator.scene(solution.codes), solution.camera, problem.settings)
    assert (output.rgb - target.picture).abs().mean() < 2 / 127.5
    assert solution.parts["picture"].shape == (3,) and not solution.noise and solution.view is None


def run(steps: int, cut: int | None, photos: list[int], settings: InversionSettings | None = None) -> Inversion:
    """An inversion of some photos with everything that can move, interrupted once if ``cut`` is given."""
    target, _ = own_pictures(Double(), VIEWS)
    views = VIEWS[photos] + 0.05
    rows = [target[i] for i in photos]
    picked = replace(target, picture=torch.cat([r.picture for r in rows]), camera=target.camera[photos],
                     scores=torch.cat([r.scores for r in rows]))  # fmt: skip
    settings = settings or InversionSettings(
        steps,
        functools.partial(ramped_rate, steps=steps, base=0.05),
        perturbation=lambda step, name: perturbation(step, steps, 1.0),
    )

    def fresh() -> Inversion:
        problem = make_problem(picked, views, {"noise": noise_term, "offsets": offsets_term})
        return Inversion(problem, start(), settings, noise={"map": Double().noise}, move_view=True)

    inversion = fresh()
    if cut is not None:
        for _ in range(cut):
            inversion.advance()
        states = [{k: v.clone() for k, v in inversion.state(i).items()} for i in range(len(photos))]
        inversion = fresh()
        inversion.restore(states)
        assert inversion.step == cut
    advance_until(inversion)
    return inversion


@pytest.mark.parametrize("cut", [0, 1, 17, 24])
def test_going_on_is_exact(cut: int) -> None:
    """Bit for bit, wherever it was interrupted: unknowns, Adam's moments, the best step."""
    whole, resumed = run(25, None, [0, 1]), run(25, cut, [0, 1])
    for i in range(2):
        expected, got = whole.state(i), resumed.state(i)
        assert expected.keys() == got.keys() and len(expected) > 12
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name
    a, b = whole.solution(), resumed.solution()
    assert torch.equal(a.total, b.total) and all(torch.equal(v, b.codes.values[k]) for k, v in a.codes.values.items())


def test_photos_side_by_side_do_not_know_each_other() -> None:
    together = run(20, None, [0, 1, 2])
    for i in range(3):
        alone = run(20, None, [i])
        for name, value in alone.state(0).items():
            torch.testing.assert_close(value, together.state(i)[name], rtol=2e-4, atol=2e-5, msg=name)


def test_a_rate_without_ramps() -> None:
    assert [ramped_rate(step, 4, 0.1, rampdown=0, rampup=0) for step in range(4)] == [0.1] * 4
    assert ramped_rate(0, 4, 0.1, rampdown=0.5, rampup=0) == 0.1


def test_the_best_step_is_kept() -> None:
    """With a rate far too high the loss grows; the result is the best of what was seen, per photo."""
    target, _ = own_pictures(Double(), VIEWS)
    settings = InversionSettings(12, constant_rate(3.0))
    inversion = Inversion(make_problem(target), start(), settings)
    seen: list[Tensor] = []
    advance_until(inversion, on_step=lambda report: seen.append(report.total))
    last = Inversion(make_problem(target), start(), replace(settings, keep_best=False))
    advance_until(last)
    best = torch.minimum(torch.stack(seen).amin(0), last.solution().total)
    torch.testing.assert_close(inversion.solution().total, best)
    assert (inversion.solution().total < last.solution().total).any()


def test_the_camera_is_found() -> None:
    target, codes = own_pictures(Double(), VIEWS)
    away = VIEWS + torch.tensor([0.1, -0.08])
    settings = InversionSettings(80, functools.partial(ramped_rate, steps=80, base=0.02))
    inversion = Inversion(make_problem(target, away), codes, settings, free=[], move_view=True)
    advance_until(inversion)
    solution = inversion.solution()
    assert set(inversion.variables) == {"view"}
    torch.testing.assert_close(solution.view, VIEWS, rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="make_camera and start_view"):
        Inversion(make_problem(target), codes, settings, move_view=True)


def test_some_codes_stay_and_shared_ones_move_together() -> None:
    target, _ = own_pictures(Double(), VIEWS)
    inversion = Inversion(make_problem(target), start(), FAST, free=["shape"], shared=["shape"])
    for _ in range(5):
        inversion.advance()
    found = inversion.solution().codes.values
    assert torch.equal(found["style"], inversion.start.values["style"])
    moved = found["shape"] - inversion.start.values["shape"]
    assert moved.abs().max() > 0.01 and torch.allclose(moved[:, :1].expand_as(moved), moved, atol=1e-6)
    with pytest.raises(UserError, match="no code 'shapes', expected some of shape, style. Did you mean 'shape'"):
        Inversion(make_problem(target), start(), FAST, free=["shapes"])


def test_what_a_loss_sees() -> None:
    """Step, offsets, other views of the same scene; perturbed steps are not the best ones."""
    target, _ = own_pictures(Double(), VIEWS[:1])
    seen: list[Moment] = []

    def other_view(moment: Moment) -> Tensor:
        offsets = {name: value.detach().clone() for name, value in moment.offsets.items()}  # they move on
        seen.append(replace(moment, offsets=offsets))
        assert torch.equal(moment.render(moment.target.camera).rgb, moment.output.rgb)
        return moment.render(sphere_camera(0.5, 0.0)).rgb.square().flatten(1).mean(1)

    settings = InversionSettings(3, constant_rate(0.1), perturbation=lambda step, name: float(step < 2))
    inversion = Inversion(make_problem(target, terms={"other": other_view}), start(), settings)
    inversion.advance()
    assert inversion.best_loss.isinf().all()
    advance_until(inversion)
    assert inversion.best_loss.isfinite().all()
    first, _, last = seen
    assert (first.step, last.step, last.steps) == (0, 2, 3)
    base = inversion.start.values["style"]
    noise = Draws(0).at(step=0, phase="perturb").normal("perturb/style", (1, WIDTH))
    torch.testing.assert_close(first.codes.values["style"], base + noise)
    torch.testing.assert_close(last.codes.values["style"], base + last.offsets["style"])


def test_losses_that_are_not_finite_or_not_one_a_photo() -> None:
    target, _ = own_pictures(Double(), VIEWS)
    bad = make_problem(target, terms={"bad": lambda moment: moment.output.rgb.flatten(1).mean(1) / 0})
    with pytest.raises(UserError, match="not finite at step 0; expected a number, try a lower learning rate"):
        Inversion(bad, start(), FAST).advance()
    wrong = make_problem(target, terms={"wrong": lambda moment: moment.output.rgb.mean()})
    with pytest.raises(ValueError, match=r"the loss 'wrong' must be \(3,\)"):
        Inversion(wrong, start(), FAST).advance()


@pytest.mark.parametrize("ends", ["noticed", "asked", "over"])
def test_a_bad_step_that_the_host_sees_later(ends: str) -> None:
    """As on a GPU, two steps late: nothing has moved since, and it goes on as if there had been no bad step."""
    target, _ = own_pictures(Double(), VIEWS)
    bad = {"on": True}

    def poison(moment: Moment) -> Tensor:
        wrong = bad["on"] and moment.step == 3
        return moment.output.rgb.flatten(1).mean(1) * (torch.nan if wrong else 0.0)

    def made() -> Inversion:
        problem = make_problem(target, terms={"poison": poison, "noise": noise_term})
        steps = 5 if ends == "over" else 150
        return Inversion(problem, start(), replace(FAST, steps=steps), noise={"map": torch.randn(
            SIDE, SIDE, generator=torch.Generator().manual_seed(1))})  # fmt: skip

    late, exact = made(), made()
    late.guard.lag = 2
    for _ in range(3):
        late.advance()
        exact.advance()
    with pytest.raises(NotFiniteError, match="the loss poison is not finite at step 3"):
        late.advance()
        assert late.step == 4
        late.advance()  # the last one waits
        if ends == "asked":
            late.state(0)
        assert ends == "noticed" and late.step == 5
        late.advance()
    assert late.step == 3
    for name, value in exact.state(0).items():
        assert torch.equal(value, late.state(0)[name]), name
    bad["on"] = False
    late.advance()
    exact.advance()
    assert late.step == 4 and all(torch.equal(v, late.variables[name]) for name, v in exact.variables.items())


def test_states_that_do_not_fit() -> None:
    target, _ = own_pictures(Double(), VIEWS[:2])
    inversion = Inversion(make_problem(target), start(), FAST)
    one, two = inversion.state(0), inversion.state(1)
    with pytest.raises(UserError, match=r"states of 1 photos at steps \[0\]"):
        inversion.restore([one])
    with pytest.raises(UserError, match=r"at steps \[0, 3\] cannot go on side by side"):
        inversion.restore([one, {**two, "step": torch.tensor([3])}])
    with pytest.raises(UserError, match=r"expected 'value/code/style' of shape \(1, 6\), got \(1, 5\)"):
        inversion.restore([{**one, "value/code/style": torch.zeros(1, 5)}, two])
    with pytest.raises(UserError, match="expected 'first/code/shape' of shape .*, got none"):
        inversion.restore([{k: v for k, v in one.items() if k != "first/code/shape"}, two])
    broken = {**one, "value/code/style": torch.full((1, 6), torch.nan)}
    with pytest.raises(UserError, match="damaged: 'value/code/style' holds NaN"):
        inversion.restore([broken, two])


def test_noise_stays_noise() -> None:
    inversion = run(10, None, [0, 1])
    noise = inversion.variables["noise/map"].detach()
    torch.testing.assert_close(noise.mean(dim=(1, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.square().mean(dim=(1, 2, 3)), torch.ones(2))
    assert not torch.equal(noise[0], noise[1])  # each photo has its own
    smooth = torch.linspace(-1, 1, 32)[None, None, :, None].expand(1, 1, 32, 32).clone()
    normalise_noise(smooth)
    white = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert noise_correlation(smooth) > 100 * noise_correlation(white)


def test_start_and_prior() -> None:
    z = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1))
    codes = Double().map({"z": z})
    found = code_statistics(codes, repeated=("shape",))
    w = codes.values["style"]
    assert found.deviation["shape"] == pytest.approx(found.deviation["style"])
    assert found.deviation["style"] == pytest.approx(float((w - w.mean(0)).square().sum() / 500) ** 0.5, rel=1e-5)
    assert code_statistics(codes).deviation["shape"] == pytest.approx(3**0.5 * found.deviation["style"], rel=1e-5)
    target, _ = own_pictures(Double(), torch.zeros(500, 2))
    problem = make_problem(target)
    moment = problem.moment(codes, {}, {}, target.camera, problem.clock(0, 1, ""))
    assert float(prior_term(found)(moment).mean()) == pytest.approx(1.0, rel=1e-4)


def test_noise_maps_of_all_sizes_together_as_one_by_one() -> None:
    source = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, 1, side, side, generator=source) for side in (4, 8, 8, 16, 32, 32)]
    expected = torch.stack([noise_correlation(value) for value in maps]).sum(0)
    torch.testing.assert_close(noise_correlations(maps), expected)
    with pytest.raises(ValueError, match=r"noise maps must be \(N, 1, H, W\), got \(4, 4\)"):
        noise_correlations([torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="no noise maps"):
        noise_correlations([])


def test_gradients_are_laid_out_as_what_they_move() -> None:
    """A 1x1 weight's gradient may come with another order of its sides of 1, which fused kernels refuse."""
    weight = torch.zeros(4, 3, 1, 1)
    gradient = torch.arange(12.0).as_strided((4, 3, 1, 1), (3, 1, 3, 3))
    found = _laid_out(gradient, weight)
    assert found.stride() == weight.stride() and torch.equal(found, gradient)
    assert _laid_out(found, weight) is found
