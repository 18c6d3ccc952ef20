# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses and penalties against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss, r1_penalty, topk_count, topk_fraction
from facelab.losses.regularizers import latent_penalty, pose_penalty, weighted_sum

LOGITS = [-2.0, 0.5, 3.0, 1.0]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("column", [False, True])
def test_logistic_losses(column: bool) -> None:
    realness = torch.tensor(LOGITS)[:, None] if column else torch.tensor(LOGITS)
    assert d_fake_loss(realness).item() == pytest.approx(sum(map(softplus, LOGITS)) / 4)
    assert d_real_loss(realness).item() == pytest.approx(sum(softplus(-x) for x in LOGITS) / 4)
    assert g_loss(realness).item() == pytest.approx(d_real_loss(realness).item())
    assert g_loss(realness, top=2).item() == pytest.approx((softplus(-3.0) + softplus(-1.0)) / 2)


def test_topk_gradient_reaches_the_kept_images_only() -> None:
    realness = torch.tensor(LOGITS, requires_grad=True)
    g_loss(realness, top=2).backward()
    assert (realness.grad != 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("top", [0, 5])
def test_topk_needs_as_many_images(top: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        g_loss(torch.tensor(LOGITS), top=top)


def test_losses_of_half_logits_are_float32() -> None:
    half = torch.tensor([-30.0, 30.0], dtype=torch.float16)
    for loss in (d_fake_loss, d_real_loss, g_loss):
        assert loss(half).dtype == torch.float32
        assert loss(half).item() == pytest.approx(15.0)


def test_topk_schedule() -> None:
    assert topk_fraction(0, 2000, 0.6) == 1
    assert topk_fraction(3000, 2000, 0.6) == pytest.approx(0.99**1.5)
    assert topk_fraction(10**6, 2000, 0.6) == 0.6
    assert [topk_count(step, 24, 2000, 0.6) for step in (0, 2000, 20_000, 10**6)] == [24, 24, 22, 15]
    assert topk_count(10**6, 5, 2000, 0.6) == 3
    assert topk_count(10**6, 1, 2000, 0.6) == 1


@pytest.mark.parametrize(("interval", "floor"), [(0, 0.6), (2000, 0.0), (2000, 1.5)])
def test_topk_schedule_refuses_nonsense(interval: float, floor: float) -> None:
    with pytest.raises(ValueError, match="top-k needs"):
        topk_count(0, 4, interval, floor)


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, torch.tensor(512.0)])
def test_r1_of_a_known_function(grad_scale) -> None:
    # D(x) = sum w x^2 has the gradient 2 w x.
    weight = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    real = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]], requires_grad=True)
    penalty = r1_penalty(real, (weight * real.square()).sum(1, keepdim=True), grad_scale)
    expected = (2 * weight.detach() * real.detach()).square().sum(1).mean()
    assert penalty.item() == pytest.approx(expected.item())
    penalty.backward()
    torch.testing.assert_close(weight.grad, (8 * weight * real.square()).mean(0).detach())


def test_r1_scale_saves_small_half_gradients() -> None:
    real, small = torch.ones(2, 8, requires_grad=True), torch.tensor(1e-4, dtype=torch.float16)

    def penalty(scale: float) -> float:
        # The gradient of D is 1e-8, which is zero in half precision (smallest number 6e-8).
        realness = (real.half() * small * small).sum(1, keepdim=True)
        return r1_penalty(real, realness, scale).item()

    assert penalty(1.0) == 0
    assert penalty(32768.0) == pytest.approx(8 * 1e-16, rel=0.1)


def test_r1_needs_a_gradient() -> None:
    with pytest.raises(ValueError, match="requires_grad_"):
        r1_penalty(torch.ones(1, 2), torch.ones(1))


def test_mean_square_penalties() -> None:
    assert latent_penalty(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == 2.5
    half = pose_penalty(torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.tensor([[0.0, 0.0]]))
    assert half.item() == 2.5 and half.dtype == torch.float32
    for penalty in (latent_penalty, pose_penalty):
        with pytest.raises(ValueError, match=r"\(3, 2\), true ones \(3, 1\)"):
            penalty(torch.zeros(3, 2), torch.zeros(3, 1))


def test_weighted_sum_leaves_out_terms_of_weight_zero() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(math.nan)}
    assert weighted_sum(terms, {"a": 1.5, "b": 0}).item() == 3.0
    assert weighted_sum(terms, {"a": 0, "b": 0}).item() == 0.0
    assert weighted_sum(terms, {"a": 1.5, "b": 1}).isnan()
    with pytest.raises(ValueError, match=r"\['b'\]"):
        weighted_sum(terms, {"a": 1})
    with pytest.raises(ValueError, match="no loss terms"):
        weighted_sum({}, {})
