# SPDX-License-Identifier: Apache-2.0
"""Score distillation on denoisers whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.draws import Draws
from facelab.losses.score_distillation import (
    GuidanceReference,
    GuidanceSettings,
    NoiseSchedule,
    ScoreDistillation,
    describe,
)

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012)
TOKENS = torch.tensor([[[0.0]], [[1.0]]])  # negative prompt 0, prompt 1
Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """Answers by a function of latents, alpha (both broadcast) and the prompt (R, 1, 1, 1); notes what it was asked."""

    answer: Answer
    asked: list[tuple[int, ...]]

    def __call__(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.asked.append(tuple(x.shape))
        alpha = SCHEDULE.alphas[t].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.answer(x.float(), alpha, encoder_hidden_states[:, :, :, None].float()))


class Encoder(nn.Module):
    """4 channels of averages of 2 x 2 pixels; what passes back is ``slope`` times as large."""

    def __init__(self, slope: float = 1.0, deviation: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=dtype), requires_grad=False)
        self.deviation, self.config = deviation, {"scaling_factor": 0.5}

    def encode(self, pictures: Tensor) -> Any:
        mean = F.avg_pool2d(torch.cat([pictures, pictures[:, :1]], 1), 2) * self.slope
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, self.deviation)))


def towards(prompted: float, empty: float = 0.0) -> Answer:
    """The perfect denoiser of a world in which all latents are one number, which the prompt says."""

    def answer(x: Tensor, alpha: Tensor, prompt: Tensor) -> Tensor:
        wanted = empty + prompt * (prompted - empty)
        return (x - alpha.sqrt() * wanted) / (1 - alpha).sqrt()

    return answer


def made(answer: Answer, encoder: Any = None, schedule: Any = SCHEDULE, **settings: Any) -> ScoreDistillation:
    """8 x 8 pictures, 4 x 4 latents."""
    chosen = GuidanceSettings(**{"picture_size": 8, **settings})
    return ScoreDistillation(Denoiser(answer, []), encoder or Encoder(), schedule, TOKENS, chosen)


def pictures(count: int = 2, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_the_gradient_is_the_formula() -> None:
    """A perfect denoiser leaves (eps_hat - eps) = sqrt(a / (1 - a)) (z - wanted), whatever the noise."""
    guided = made(towards(0.3), guidance=0.0)
    t = torch.tensor([[100, 900]])
    gradient, found = guided.gradient(pictures(), Draws(0), timesteps=t)
    z = 0.5 * F.avg_pool2d(torch.cat([pictures(), pictures()[:, :1]], 1), 2)
    torch.testing.assert_close(found.latents, z)
    a = SCHEDULE.alphas[t[0]].reshape(-1, 1, 1, 1)
    expected = (1 - a) * (a / (1 - a)).sqrt() * (z - 0.3)
    torch.testing.assert_close(found.latent_gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.square, expected.square().sum((1, 2, 3)), rtol=1e-3, atol=1e-5)
    back = F.interpolate(expected, scale_factor=2) * 0.5 / 4
    back = torch.cat([back[:, :1] + back[:, 3:], back[:, 1:3]], 1)
    torch.testing.assert_close(gradient, back, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("one_minus_alpha", lambda a: 1 - a), ("sqrt_alpha", lambda a: a.sqrt() * (1 - a)), ("one", lambda a: a * 0 + 1)],
)
def test_weightings(weighting: Any, weight: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([300, 600])
    found = made(lambda x, a, p: 0 * x, weighting=weighting).gradient(pictures(), Draws(1), timesteps=t)[1]
    noise = Draws(1).normal("sds/noise", (1, 2, 4, 4, 4))[0]
    expected = -weight(SCHEDULE.alphas[t].reshape(-1, 1, 1, 1)) * noise
    torch.testing.assert_close(found.latent_gradient, expected)


def test_guidance_goes_away_from_the_negative_prompt() -> None:
    """Both formulas; 7 beyond the prompt is 8 from the empty one."""
    t = torch.tensor([500, 500])
    answer = towards(0.4, -0.2)
    beyond = made(answer, guidance=7.0).gradient(pictures(), Draws(2), timesteps=t)[1].latent_gradient
    usual = made(answer, guidance=8.0, formula="from_empty").gradient(pictures(), Draws(2), timesteps=t)[1]
    torch.testing.assert_close(beyond, usual.latent_gradient, rtol=1e-4, atol=1e-4)
    a = SCHEDULE.alphas[500]
    z = made(answer).encode(pictures(), Draws(2))
    wanted = 0.4 + 7 * (0.4 + 0.2)  # the optimum lies beyond the prompt
    torch.testing.assert_close(beyond, (1 - a) * (a / (1 - a)).sqrt() * (z - wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_all_predictions_mean_the_same_noise(prediction: str) -> None:
    """The same perfect denoiser, saying noise, velocity or latents."""

    def answer(x: Tensor, a: Tensor, prompt: Tensor) -> Tensor:
        noise = towards(0.3)(x, a, prompt)
        latents = (0.3 * prompt).expand_as(x)
        return {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * latents, "sample": latents}[
            prediction
        ]

    schedule = NoiseSchedule(SCHEDULE.alphas, prediction)
    t = torch.tensor([400, 700])
    found = made(answer, schedule=schedule, guidance=3.0).gradient(pictures(), Draws(0), timesteps=t)[1]
    expected = made(towards(0.3), guidance=3.0).gradient(pictures(), Draws(0), timesteps=t)[1]
    torch.testing.assert_close(found.latent_gradient, expected.latent_gradient, rtol=1e-3, atol=1e-4)


def test_descent_arrives_where_the_prompt_points() -> None:
    guided = made(towards(0.3), guidance=0.0, samples=2)
    x = pictures(1).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05)
    for step in range(150):
        adam.zero_grad()
        (1e-5 * guided.loss(x, Draws(0, step=step))).sum().backward()
        adam.step()
    z = guided.encode(x.detach(), Draws(0))
    assert (z - 0.3).abs().max() < 0.02


def test_loss_is_half_the_square_and_differentiates_to_the_gradient_of_each_photo() -> None:
    guided = made(towards(0.3))
    x = pictures().requires_grad_()
    loss = guided.loss(x, Draws(3))
    gradient, found = guided.gradient(x, Draws(3))
    torch.testing.assert_close(loss, 0.5 * found.square)
    (back,) = torch.autograd.grad((loss * torch.tensor([1e-5, 3.0])).sum(), x)
    torch.testing.assert_close(back, gradient * torch.tensor([1e-5, 3.0]).reshape(2, 1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(guided.loss(x, Draws(3)), loss)


def test_a_photo_of_a_batch_is_as_alone_with_its_own_noise() -> None:
    guided, t = made(towards(0.3), guidance=0.0), torch.tensor([250])
    both = guided.gradient(pictures(), Draws(0), timesteps=t.expand(2))[0]
    alone = guided.gradient(pictures()[1:], Draws(9), timesteps=t)[0]
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-6)  # a perfect denoiser: the noise cancels


def test_samples_are_averaged_and_rows_bound_what_is_seen_at_once() -> None:
    answer: Answer = lambda x, a, p: torch.tanh(x) + p
    t = torch.tensor([[100, 200], [700, 800], [30, 40]])
    many = made(answer, samples=3)
    found = many.gradient(pictures(), Draws(4), timesteps=t)[1]
    assert many.unet.asked == [(12, 4, 4, 4)]
    few = made(answer, samples=3, rows=2)
    torch.testing.assert_close(
        few.gradient(pictures(), Draws(4), timesteps=t)[1].latent_gradient, found.latent_gradient
    )
    assert few.unet.asked == [(4, 4, 4, 4)] * 3
    z = many.encode(pictures(), Draws(4))
    noise, rows = Draws(4).normal("sds/noise", (3, 2, 4, 4, 4)), []
    for k in range(3):
        a = SCHEDULE.alphas[t[k]].reshape(-1, 1, 1, 1)
        said = torch.tanh(a.sqrt() * z + (1 - a).sqrt() * noise[k])
        rows.append((1 - a) * (said + 1 + 100 - noise[k]))
    torch.testing.assert_close(found.latent_gradient, torch.stack(rows).mean(0))


def test_half_precision_keeps_gradients_that_the_originals_order_loses() -> None:
    """The encoder passes back a millionth: below what half precision holds once 1e-5 is multiplied in before."""
    half = Encoder(slope=1e-3, dtype=torch.float16)
    x = pictures().requires_grad_()

    def of(**reference: bool) -> Tensor:
        guided = made(towards(0.3), half, reference=GuidanceReference(**reference), precision="fp16")
        return torch.autograd.grad((1e-5 * guided.loss(x, Draws(0))).sum(), x)[0]

    exact = made(towards(0.3), Encoder(slope=1e-3))
    (expected,) = torch.autograd.grad((1e-5 * exact.loss(x, Draws(0))).sum(), x)
    torch.testing.assert_close(of(), expected, rtol=0.02, atol=float(expected.abs().max()) * 1e-2)
    assert (of(weighted_backward=True) == 0).float().mean() > 0.5
    assert (of() == 0).float().mean() == 0


def test_in_single_precision_both_orders_of_weighting_agree() -> None:
    x, found = pictures().requires_grad_(), []
    for weighted in (False, True):
        guided = made(towards(0.3), reference=GuidanceReference(weighted_backward=weighted))
        loss = guided.loss(x, Draws(0))
        found.append((loss.detach(), torch.autograd.grad((1e-5 * loss).sum(), x)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5 * float(found[0][1].abs().max()))


def test_what_is_not_finite_shows_in_the_loss_unless_replaced() -> None:
    answer: Answer = lambda x, a, p: x / 0 * p
    x = pictures().requires_grad_()
    assert not made(answer).loss(x, Draws(0)).isfinite().any()
    replaced = made(answer, reference=GuidanceReference(replace_non_finite=True)).gradient(x, Draws(0))[1]
    assert replaced.latent_gradient.isfinite().all()


def test_clip_bounds_the_gradient_of_the_latents() -> None:
    found = made(towards(0.3), clip=0.01).gradient(pictures(), Draws(0))[1]
    assert float(found.latent_gradient.abs().max()) == pytest.approx(0.01)


def test_draws_decide_everything() -> None:
    guided = made(lambda x, a, p: torch.tanh(x), Encoder(deviation=0.3))
    first = guided.gradient(pictures(), Draws(1, step=7))
    assert guided.gradient(pictures(), Draws(1, step=7))[0].equal(first[0])
    assert not guided.gradient(pictures(), Draws(1, step=8))[0].equal(first[0])
    z, posterior = first[1].latents, Draws(1, step=7).normal("sds/posterior", (2, 4, 4, 4))
    torch.testing.assert_close(z - made(towards(0.0)).encode(pictures(), Draws(0)), 0.5 * 0.3 * posterior)


def test_time_steps_cover_their_range_with_both_ends() -> None:
    guided = made(towards(0.3), samples=200, t_min=0.5, t_max=0.51, picture_size=2)
    assert guided.settings.range_at(0.0, 1000) == (500, 510)
    t = guided.gradient(pictures(4, 2), Draws(0))[1].timesteps
    assert t.shape == (200, 4) and set(t.flatten().tolist()) == set(range(500, 511))
    assert GuidanceSettings().range_at(0.3, 1000) == (20, 980)
    annealed = replace(GuidanceSettings(), t_max_end=0.5)
    assert [annealed.range_at(p, 1000)[1] for p in (0.0, 0.5, 1.0, 2.0)] == [980, 740, 500, 500]
    assert GuidanceSettings(t_min=0.0, t_max=1.0).range_at(0.0, 1000) == (0, 999)


def test_pictures_of_any_size_are_brought_to_the_denoisers() -> None:
    guided = made(towards(0.3))
    large, small = pictures(1, 16), pictures(1, 4)
    torch.testing.assert_close(guided.encode(large, Draws(0)), guided.encode(F.avg_pool2d(large, 2), Draws(0)))
    bilinear = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(guided.encode(small, Draws(0)), guided.encode(bilinear, Draws(0)))
    gradient = guided.gradient(large, Draws(0))[0]
    assert gradient.shape == large.shape and gradient.abs().min() > 0
    unet, vae = Denoiser(towards(0.3), []), Encoder()
    assert ScoreDistillation(unet, vae, SCHEDULE, TOKENS).side == 512
    sized: Any = SimpleNamespace(config={"sample_size": 96})
    vae.config = {**vae.config, "block_out_channels": (1, 1, 1, 1)}
    assert ScoreDistillation(sized, vae, SCHEDULE, TOKENS).side == 768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formula": "from_emtpy"}, "Did you mean 'from_empty'"),
        ({"weighting": "two"}, "weighting must be one of"),
        ({"precision": "fp8"}, "fp16, bf16, fp32"),
        ({"t_min": 0.9, "t_max": 0.5}, "t_min <= guidance.t_max"),
        ({"t_max_end": 0.01}, "t_max_end 0.01"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"clip": 0.0}, "guidance.clip must be above 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceSettings(**options)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"embeddings must be \(2, T, C\)"):
        ScoreDistillation(Denoiser(towards(0.0), []), Encoder(), SCHEDULE, torch.zeros(1, 77, 8))
    guided = made(towards(0.0))
    with pytest.raises(ValueError, match=r"pictures must be float"):
        guided.loss(torch.zeros(2, 4, 8, 8), Draws(0))
    with pytest.raises(ValueError, match=r"time steps must lie in 0\.\.999"):
        guided.loss(pictures(), Draws(0), timesteps=torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match="must predict"):
        NoiseSchedule(SCHEDULE.alphas, "flow")


def test_settings_are_stored_as_plain_values() -> None:
    import json

    assert json.loads(json.dumps(describe(GuidanceSettings())))["guidance"] == 100.0
