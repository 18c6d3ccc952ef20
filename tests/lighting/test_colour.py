# SPDX-License-Identifier: Apache-2.0
"""Lightness and Lab: known colours, the way back, and derivatives that never are NaN."""

from __future__ import annotations

import pytest
import torch

from facelab import lighting


def colours(*rows: tuple[float, float, float]) -> torch.Tensor:
    """(1, 3, 1, len(rows)) float64."""
    return torch.tensor(rows, dtype=torch.float64).T[None, :, None]


def test_known_colours() -> None:
    """CIE Lab (D65) of sRGB white, black, middle grey, red and blue, to the digits of common tables."""
    found = lighting.lab(colours((1, 1, 1), (0, 0, 0), (0.5, 0.5, 0.5), (1, 0, 0), (0, 0, 1)))[0, :, 0].T
    expected = [(100, 0, 0), (0, 0, 0), (53.389, 0, 0), (53.241, 80.092, 67.203), (32.297, 79.188, -107.860)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=0.02, rtol=0)


def test_lightness_is_the_first_channel_of_lab() -> None:
    pictures = torch.rand(2, 3, 5, 7) * 1.6 - 0.3
    torch.testing.assert_close(lighting.lightness(pictures), lighting.lab(pictures)[:, :1] / 100)


def test_there_and_back_also_outside_srgb() -> None:
    pictures = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 1.4 - 0.2
    back = lighting.srgb_from_lab(lighting.lab(pictures))
    torch.testing.assert_close(back, pictures, atol=3e-4, rtol=0)  # the published thresholds do not quite meet


def test_derivatives_are_finite_and_right_where_the_power_of_a_negative_number_hides() -> None:
    pictures = colours((-0.3, -0.06, -1.0), (0.5, -0.2, 1.4), (0.0, 0.0, 0.0), (2.0, 1.0, 0.3))
    pictures.requires_grad_()
    for function in (lighting.lightness, lighting.lab, lambda p: lighting.srgb_from_lab(lighting.lab(p))):
        (gradient,) = torch.autograd.grad(function(pictures).sum(), pictures)
        assert gradient.isfinite().all()
        assert torch.autograd.gradcheck(function, (pictures,), atol=1e-4)
    (gradient,) = torch.autograd.grad(lighting.lightness(pictures).sum(), pictures)
    assert (gradient > 0).all()  # nothing is clamped: every pixel can still be moved


def test_with_lightness_keeps_the_colour() -> None:
    pictures, level = torch.rand(1, 3, 4, 4) * 0.6 + 0.2, torch.full((1, 1, 4, 4), 0.5)
    changed = lighting.lab(lighting.with_lightness(pictures, level))
    torch.testing.assert_close(changed[:, :1], torch.full((1, 1, 4, 4), 50.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(changed[:, 1:], lighting.lab(pictures)[:, 1:], atol=2e-2, rtol=0)


def test_other_shapes_are_refused() -> None:
    for wrong in (torch.rand(3, 4, 4), torch.rand(1, 1, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pictures must be float"):
            lighting.lightness(wrong)
