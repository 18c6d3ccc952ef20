# SPDX-License-Identifier: Apache-2.0
"""Density regularisers on fields whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cuda_ops import filter2d
from facelab.bases.eg3d.losses import DensityPoints, Sight, gradient_penalty, label_noise
from facelab.draws import Draws
from facelab.losses.density import density_l1, density_monotonic, density_tv
from facelab.nn.filtered_resizing import blur_taps

SLOPE = torch.tensor([1.0, -2.0, 4.0])
POINTS = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0))


def plane(points: Tensor) -> Tensor:
    """A density that grows evenly."""
    return (points * SLOPE).sum(-1, keepdim=True)


def test_differences_of_a_plane() -> None:
    offsets = torch.zeros_like(POINTS)
    offsets[..., 1] = 0.5
    assert density_l1(plane, POINTS, offsets).item() == pytest.approx(1.0, rel=1e-5)
    assert density_tv(plane, POINTS, 0.1).item() == pytest.approx(0.7, rel=1e-4)
    assert density_monotonic(plane, POINTS, 0.1, False).item() == pytest.approx(
        0.4, rel=1e-4
    )  # falls behind by 4 * 0.1
    assert density_monotonic(lambda x: -plane(x), POINTS, 0.1, False).item() == 0


def test_detached_front_teaches_the_point_behind_only() -> None:
    for detach, expected in ((True, -1.0), (False, 0.0)):
        bias = torch.zeros((), requires_grad=True)
        density_monotonic(lambda x, b=bias: plane(x) + b, POINTS, 0.1, detach).backward()
        assert bias.grad is not None and bias.grad.item() == pytest.approx(expected, abs=1e-5)


def test_points_of_the_box_keep_the_meaning_of_the_weight() -> None:
    """A field that is empty outside its box: both ways of choosing points expect the same value."""

    def box(points: Tensor) -> Tensor:
        return torch.relu(0.5 - points.abs().amax(-1, keepdim=True))

    def value(where: DensityPoints) -> float:
        x = where.draw(Draws(0), "points", 1, 400_000, torch.device("cpu"))
        return density_l1(box, x, torch.full_like(x, 1e-3)).item() * where.share

    ours, original = DensityPoints.of_box(1.0, False), DensityPoints.of_box(1.0, True)
    assert (ours.half_side, original.half_side) == (0.5, 1.0) and original.share == 1.0
    assert value(ours) == pytest.approx(value(original), rel=0.15)
    assert DensityPoints.of_box(4.0, False) == DensityPoints(1.0)


def test_gradient_penalty_sums_its_inputs_per_sample() -> None:
    a, b = torch.randn(3, 2, 2, 2, requires_grad=True), torch.randn(3, 1, 4, 4, requires_grad=True)
    logits = 3 * a.flatten(1).sum(1, keepdim=True) + 2 * b.flatten(1).sum(1, keepdim=True)
    expected = torch.full((3,), 9.0 * 8 + 4.0 * 16)
    torch.testing.assert_close(gradient_penalty([a, b], logits), expected)
    torch.testing.assert_close(gradient_penalty([a, b], logits.double(), 1024.0), expected, check_dtype=False)
    with pytest.raises(ValueError, match="requires_grad_"):
        gradient_penalty([a, b.detach()], logits)


def test_label_noise_leaves_its_input_alone() -> None:
    label, kept = torch.ones(500, 25), torch.ones(500, 25)
    deviation = torch.arange(25.0)
    noisy = label_noise(label, deviation, 0.5, Draws(0))
    assert label.equal(kept) and noisy[:, 0].equal(kept[:, 0])
    torch.testing.assert_close((noisy - label).std(0)[1:], deviation[1:] / 2, rtol=0.15, atol=0)
    assert label_noise(label, deviation, 0.0, Draws(0)) is label


def test_the_raw_rendering_of_fakes_is_not_blurred() -> None:
    image, raw = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    sight = Sight(blur_taps(torch.tensor(1.0), torch.tensor(3), 5))
    (real, real_raw), (fake, fake_raw) = sight.real(image, raw, Draws(0)), sight.fake(image, raw, Draws(0))
    assert real.equal(fake) and real.std() < 0.6 * image.std()
    assert fake_raw is raw and real_raw is not None and real_raw.std() < 0.6 * raw.std()


@pytest.mark.parametrize("sigma", [10.0, 6.66, 2.5, 1 / 3, 0.7, 10 * (1 - 0.9)])
def test_a_longer_kernel_that_ends_in_zeros_blurs_alike(sigma: float) -> None:
    image = torch.randn(2, 3, 20, 24)
    reach = math.floor(3 * sigma)
    taps = blur_taps(torch.tensor(sigma), torch.tensor(reach), 30)
    short = torch.tensor([2.0 ** -((k / sigma) ** 2) for k in range(-reach, reach + 1)])
    torch.testing.assert_close(Sight(taps).fake(image, None, Draws(0))[0], filter2d(image, short / short.sum()))
    assert int((taps > 0).sum()) == 2 * int(3 * sigma) + 1
