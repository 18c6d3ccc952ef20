# SPDX-License-Identifier: Apache-2.0
"""Path length regularisation: known lengths, the running mean, derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from facelab.losses.path_length import path_length, path_lengths
from facelab.nn.skip_decoder import SkipDecoder, SkipDecoderConfig


def test_length_of_a_linear_picture_by_hand() -> None:
    """Two codes of one number each, a 1 x 2 picture (3 a, 4 b): gradients 3 / sqrt 2 and 4 / sqrt 2, mean of squares."""
    codes = torch.tensor([[[1.0], [2.0]]], requires_grad=True)
    image = torch.stack([3 * codes[:, 0], 4 * codes[:, 1]], dim=-1).reshape(1, 1, 1, 2)
    expected = math.sqrt((9 / 2 + 16 / 2) / 2)
    assert path_lengths(image, codes, torch.ones(1, 1, 1, 2)).tolist() == pytest.approx([expected])


def test_penalty_uses_the_mean_of_this_batch_and_its_gradient() -> None:
    """Lengths a and b: mean m = d (a + b) / 2 + (1 - d) m0; the derivative of the penalty goes through m."""
    scale = torch.tensor([2.0, 5.0], requires_grad=True)
    codes = torch.zeros(2, 1, 1, requires_grad=True)
    image = (scale[:, None, None] * codes)[..., None]
    found = path_length(image, codes, torch.ones(2, 1, 1, 1), torch.tensor(1.0), decay=0.1)
    mean = 0.1 * 3.5 + 0.9 * 1
    assert found.mean.item() == pytest.approx(mean) and not found.mean.requires_grad
    assert found.penalty.item() == pytest.approx(((2 - mean) ** 2 + (5 - mean) ** 2) / 2)
    (gradient,) = torch.autograd.grad(found.penalty, scale)
    through_mean = -0.05 * ((2 - mean) + (5 - mean))
    assert gradient.tolist() == pytest.approx([2 - mean + through_mean, 5 - mean + through_mean])


def test_decoder_learns_from_path_lengths() -> None:
    """The penalty's derivative in the decoder's weights against a finite difference along a random direction."""
    config = SkipDecoderConfig(size=8, in_resolution=4, in_channels=2, style_dim=2, channel_max=3)
    model = SkipDecoder(config, torch.Generator().manual_seed(1)).double().train()
    source = torch.Generator().manual_seed(2)
    features, noise = (torch.randn(s, generator=source).double() for s in ((2, 2, 4, 4), (2, 3, 8, 8)))
    codes = torch.randn(2, model.num_ws, config.width, generator=source).double().requires_grad_()

    def penalty() -> Tensor:
        return path_length(model(features, codes).rgb, codes, noise, torch.tensor(0.3)).penalty

    parameters = list(model.blocks.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    directions = [torch.randn(p.shape, generator=source, dtype=torch.float64) for p in parameters]
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * 1e-6 * direction
        values.append(penalty().detach())
    assert analytic != 0
    torch.testing.assert_close(analytic, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-9)


def test_lengths_have_derivatives_of_both_orders() -> None:
    source = torch.Generator().manual_seed(3)
    weight, noise = (torch.randn(s, generator=source, dtype=torch.float64) for s in ((6, 4), (2, 1, 2, 2)))
    codes = torch.randn(2, 2, 3, generator=source, dtype=torch.float64).requires_grad_()
    weight.requires_grad_()

    def lengths(codes: Tensor, weight: Tensor) -> Tensor:
        return path_lengths(torch.tanh(codes.flatten(1) @ weight).reshape(2, 1, 2, 2), codes, noise)

    assert torch.autograd.gradcheck(lengths, (codes, weight))
    assert torch.autograd.gradgradcheck(lengths, (codes, weight))


def test_mistakes_are_refused() -> None:
    codes = torch.zeros(2, 1, 1)
    image = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="requires_grad_"):
        path_lengths(image, codes, image)
    with pytest.raises(ValueError, match="shape of the pictures"):
        path_lengths(image, codes.requires_grad_(), image[:1])
    with pytest.raises(ValueError, match="decay"):
        path_length(image, codes, image, torch.tensor(0.0), decay=0.0)
