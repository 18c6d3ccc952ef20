# SPDX-License-Identifier: Apache-2.0
"""Steps that are played back give the same numbers as steps that run anew; what cannot be is said and runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.generator import GeneratorOutput
from facelab.inversion import recorded
from facelab.inversion.loop import Inversion, InversionSettings, NotFiniteError, advance_until
from facelab.inversion.problem import Moment, Problem
from facelab.inversion.recorded import StepGraphs
from facelab.inversion.schedules import perturbation, ramped_rate
from facelab.inversion.terms import noise_term, offsets_term
from facelab.inversion.tuning import Tuning, TuningSettings
from facelab.recording import Ungraphable
from tests.inversion.doubles import Double, make_problem, own_pictures

VIEWS = torch.tensor([[0.2, -0.1], [-0.3, 0.1]])
STEPS = 14
RATE = functools.partial(ramped_rate, steps=STEPS, base=0.05)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """Makes stages on a CPU play their steps by running them on recorded memory; what was made."""
    made: list[StepGraphs] = []

    def graphs(wanted: bool, device: torch.device, say: Callable[[str], None]) -> StepGraphs | None:
        made.append(StepGraphs(False, say))
        return made[-1] if wanted else None

    monkeypatch.setattr(recorded, "step_graphs", graphs)
    return made


def random_view(moment: Moment) -> Tensor:
    """A loss that draws on the scene's device and on the CPU, follows the step, and looks from elsewhere."""
    from facelab.cameras.sphere import sphere_camera

    def made(clock: Any) -> tuple[Any, Tensor]:
        angle = clock.draws.uniform("angle", (2,)) - 0.5
        return sphere_camera(angle[:1], angle[1:]), torch.tensor(1.0 + clock.step / clock.steps)

    camera, weight = moment.host(made)
    seen: GeneratorOutput = moment.render(camera.map(lambda x: x.expand(len(moment.target), *x.shape[1:])))
    noise = moment.draws.at(phase="random_view").normal("shade", seen.rgb.shape, seen.rgb.device)
    return weight * (seen.rgb - 0.1 * noise).square().flatten(1).mean(1)


def problem_of(terms: dict[str, Any], device: str = "cpu") -> Problem:
    target, _ = own_pictures(Double(), VIEWS)
    made = make_problem(target.to(device), VIEWS.to(device) + 0.05, {"noise": noise_term, "view": random_view, **terms})
    generator: Any = made.generator
    generator.to(device)
    return made


def inversion(wanted: bool, said: list[str], device: str = "cpu", **terms: Any) -> Inversion:
    problem = problem_of({"offsets": offsets_term, **terms}, device)
    settings = InversionSettings(
        STEPS,
        RATE,
        perturbation=lambda step, name: perturbation(step, STEPS, 1.0, ramp=0.6),
        cuda_graphs=wanted,
        say=said.append,
    )
    average = problem.generator.map({"z": torch.zeros(1, 6, device=device)})
    noise = {"map": problem.generator.noise}  # type: ignore[attr-defined]
    return Inversion(problem, average, settings, noise=noise, move_view=device == "cpu", shared=["shape"])


def tuning(wanted: bool, said: list[str], device: str = "cpu", **terms: Any) -> Tuning:
    found = inversion(False, said, device)
    problem = problem_of(terms, device)
    settings = TuningSettings(STEPS, RATE, cuda_graphs=wanted, say=said.append)
    return Tuning(problem, found.present(), settings)


def curve(stage: Any) -> list[dict[str, Tensor]]:
    """All that is reported, kept until the end: nothing may be overwritten by later steps."""
    kept = []

    def keep(report: Any) -> None:
        kept.append({"total": report.total, **report.parts, "seen": report.output.rgb, **report.shared})

    assert advance_until(stage, on_step=keep)
    return kept


@pytest.mark.parametrize("make", [inversion, tuning])
def test_the_same_numbers(make: Any, played: list[StepGraphs]) -> None:
    said: list[str] = []
    plain, again = make(False, said), make(True, said)
    graphs = played[-1]
    first, second = curve(plain), curve(again)
    assert said == [] and graphs.played == STEPS - (6 if make is inversion else 3)  # with and without perturbation
    assert again.graphs is None  # its memory is given back
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items()), step
    state = (lambda stage: stage.state(1)) if make is inversion else (lambda stage: stage.state())
    expected, got = state(plain), state(again)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.parametrize("cut", [2, 6, 11])
def test_going_on_is_exact(cut: int, played: list[StepGraphs]) -> None:
    said: list[str] = []
    whole, begun, rest = (inversion(True, said) for _ in range(3))
    curve(whole)
    for _ in range(cut):
        begun.advance()
    rest.restore([begun.state(i) for i in range(2)])
    curve(rest)
    assert said == [] and played[0].played > 0
    for i in range(2):
        expected, got = whole.state(i), rest.state(i)
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def reads_the_step(moment: Moment) -> Tensor:
    return moment.output.rgb.flatten(1).mean(1) * (moment.step + 1)


def reads_the_step_of_draws(moment: Moment) -> Tensor:
    return moment.output.rgb.flatten(1).mean(1) * (moment.draws.step + 1)


def asks_for_a_generator(moment: Moment) -> Tensor:
    return moment.output.rgb.flatten(1).mean(1) * torch.randn((), generator=moment.draws.generator("own"))


def makes_numbers(moment: Moment) -> Tensor:
    return moment.output.rgb.flatten(1).mean(1) * torch.tensor([1.0, 2.0])


def changes_shape(moment: Moment) -> Tensor:
    weights = moment.host(lambda clock: torch.ones(1 + clock.step // 5))
    return moment.output.rgb.flatten(1).mean(1) * weights.sum()


def draws_within(moment: Moment) -> Tensor:
    return moment.output.rgb.flatten(1).mean(1) * moment.host(lambda clock: moment.draws.uniform("u", ()))


@pytest.mark.parametrize("make", [inversion, tuning])
@pytest.mark.parametrize(
    ("term", "why"),
    [
        (reads_the_step, "reads the step; use moment.host"),
        (reads_the_step_of_draws, "reads draws.step; use draws.host"),
        (asks_for_a_generator, "asks for the generator 'own'"),
        (makes_numbers, "makes a tensor of numbers in tensor"),
        (changes_shape, r"met: shapes change"),
        (draws_within, "asks draws of a run that has ended"),
    ],
)
def test_what_cannot_be_refilled_runs_and_is_said_once(
    make: Any, term: Any, why: str, played: list[StepGraphs]
) -> None:
    said: list[str] = []
    plain, again = make(False, said, odd=term), make(True, said, odd=term)
    first, second = curve(plain), curve(again)
    assert len(said) == 1 and why in said[0] and "runs without a CUDA graph" in said[0] and "\n" not in said[0]
    assert said[0].startswith(f"stage {make.__name__} ")
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def poisoned_at(step: int, on: dict[str, bool]) -> Callable[[Moment], Tensor]:
    def term(moment: Moment) -> Tensor:
        factor = moment.host(lambda clock: torch.tensor(torch.nan if on["on"] and clock.step == step else 0.0))
        return moment.output.rgb.flatten(1).mean(1) * factor

    return term


@pytest.mark.parametrize("bad", [1, 5, 12])
@pytest.mark.parametrize("lag", [0, 2])
def test_nan_stops_and_nothing_has_moved(bad: int, lag: int, played: list[StepGraphs]) -> None:
    """Seen two steps late, as on a GPU, or at once; then it goes on as if there had been no bad step."""
    said: list[str] = []
    on, off = {"on": True}, {"on": False}
    ill, well = inversion(True, said, poison=poisoned_at(bad, on)), inversion(True, said, poison=poisoned_at(bad, off))
    ill.guard.lag = lag
    for _ in range(bad):
        well.advance()
    with pytest.raises(NotFiniteError, match=f"the loss poison is not finite at step {bad}"):
        advance_until(ill)
    assert ill.step == bad and said == []
    for name, value in well.state(0).items():
        assert torch.equal(value, ill.state(0)[name]), name
    on["on"] = False
    advance_until(ill)
    advance_until(well)
    for name, value in well.state(1).items():
        assert torch.equal(value, ill.state(1)[name]), name


def test_a_capture_that_breaks_off_leaves_the_step_to_python(
    monkeypatch: pytest.MonkeyPatch, played: list[StepGraphs]
) -> None:
    """The line gives the first error, not what the end of the capture made of it, and where it arose."""

    def breaks(self: StepGraphs, context: Any, recording: Any, work: Any) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nlong trace")
        except RuntimeError:
            raise RuntimeError("capture was invalidated") from None

    said: list[str] = []
    plain, again = inversion(False, said), inversion(True, said)
    monkeypatch.setattr(played[-1], "_capture", True)
    monkeypatch.setattr(StepGraphs, "_captured", breaks)
    first, second = curve(plain), curve(again)
    assert len(said) == 1 and "met: operation not permitted when stream is capturing (test_recorded.py:" in said[0]
    assert all(torch.equal(a["total"], b["total"]) for a, b in zip(first, second, strict=True))


def test_the_end_of_a_tuning_that_is_good_enough(played: list[StepGraphs]) -> None:
    said: list[str] = []
    found = []
    for wanted in (False, True):
        stage = tuning(wanted, said)
        stage.settings = replace(stage.settings, enough=lambda report: report.step == 8)
        advance_until(stage)
        assert stage.step == stage.steps == 8
        found.append(stage.state())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_outside_of_its_run_a_recording_answers_nothing(played: list[StepGraphs]) -> None:
    kept: list[Moment] = []

    def keep(moment: Moment) -> Tensor:
        kept.append(moment)
        return moment.output.rgb.flatten(1).mean(1)

    inversion(True, [], keep=keep).advance()
    with pytest.raises(Ungraphable, match="of a run that has ended"):
        kept[0].draws.normal("late", ())
    with pytest.raises(Ungraphable, match="reads the step"):
        _ = kept[0].step


@pytest.mark.gpu
@pytest.mark.parametrize("make", [inversion, tuning])
def test_graphs_on_a_gpu(make: Any) -> None:
    """Within what atomics and Adam make of rounding; a number of another step would be seen: the view's loss differs by
    tenths from one to the next."""
    said: list[str] = []
    plain, again = make(False, said, "cuda"), make(True, said, "cuda")
    graphs = again.graphs
    first, second = curve(plain), curve(again)
    assert said == [], said
    assert graphs is not None and graphs.played > 0
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        for name, value in one.items():
            torch.testing.assert_close(
                other[name], value, rtol=1e-2, atol=2e-3, msg=lambda text, s=step, n=name: f"step {s}, {n}: {text}"
            )
