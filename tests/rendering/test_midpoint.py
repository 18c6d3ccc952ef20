# SPDX-License-Identifier: Apache-2.0
"""EG3D's compositing and sampling against hand-made numbers; chunks do not change a picture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from facelab.cameras.rays import Rays
from facelab.draws import Draws, TapeDraws
from facelab.fields.output import FieldOutput
from facelab.rendering.midpoint import (
    ImportanceSampler,
    MidpointIntegrator,
    limit_rays,
    ray_box,
    render_midpoints,
)
from facelab.rendering.settings import RenderSettings

SETTINGS = RenderSettings(near=1.0, far=2.0, samples_coarse=8, samples_fine=6, grid="centers")


def rays(count: int = 5, seed: int = 0) -> Rays:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(2, count, 3, generator=generator) * 0.6 - 0.3
    origins = torch.tensor([0.0, 0.0, 1.5]).expand(2, count, 3)
    return Rays(origins, torch.nn.functional.normalize(target - origins, dim=-1))


def ball(points: Tensor, directions: Tensor) -> FieldOutput:
    """A soft ball of radius 0.3 with colours of the position."""
    radius = points.norm(dim=-1, keepdim=True)
    features = torch.sigmoid(torch.cat([points, 2 * points], dim=-1))
    return FieldOutput(60 * (0.3 - radius), features[..., :3], features=features)


def test_one_interval_by_hand() -> None:
    t = torch.tensor([[[1.0, 3.0]]])
    sigma = torch.tensor([[[[2.0], [4.0]]]])
    features = torch.tensor([[[[0.0, 0.2, 1.0], [1.0, 0.4, 0.0]]]])
    alpha = 1 - math.exp(-2 * math.log1p(math.exp(2.0)))  # softplus((2 + 4) / 2 - 1) over a length of 2
    output = MidpointIntegrator()([(t, FieldOutput(sigma, features))])
    assert output.features is not None and output.mean_depth is not None and output.weights is not None
    torch.testing.assert_close(output.features[0, 0], torch.tensor([0.5, 0.3, 0.5]) * alpha)
    torch.testing.assert_close(output.depth.item(), 2 * alpha)
    torch.testing.assert_close(output.mean_depth.item(), 2.0)
    white = MidpointIntegrator(white=True)([(t, FieldOutput(sigma, features))])
    torch.testing.assert_close(white.rgb[0, 0], torch.tensor([0.5, 0.3, 0.5]) * alpha + 1 - alpha)


def test_sets_are_merged_by_depth_wherever_their_samples_stand() -> None:
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(2, 3, 7, generator=generator).sort(-1).values
    values = FieldOutput(
        torch.randn(2, 3, 7, 1, generator=generator) * 5,
        torch.rand(2, 3, 7, 3, generator=generator),
        features=torch.rand(2, 3, 7, 5, generator=generator),
    )
    whole = MidpointIntegrator()([(t, values)])
    parts = [torch.tensor([6, 0, 3]), torch.tensor([2, 5, 1, 4])]
    split = [(t[..., i], values.select(i.expand(2, 3, -1))) for i in parts]
    merged = MidpointIntegrator()(split)
    for name in ("features", "depth", "opacity", "mean_depth", "weights", "t"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))


def test_an_empty_ray_lies_at_its_own_end_or_at_the_batch_s() -> None:
    t = torch.tensor([[[1.0, 2.0], [1.0, 5.0]]])
    values = FieldOutput(torch.tensor([-1e4, 3.0])[None, :, None, None].expand(1, 2, 2, 1), torch.zeros(1, 2, 2, 3))
    assert MidpointIntegrator()([(t, values)]).mean_depth.flatten().tolist() == [2.0, 3.0]  # type: ignore[union-attr]
    assert MidpointIntegrator(batch_range=True)([(t, values)]).mean_depth.flatten().tolist() == [5.0, 3.0]  # type: ignore[union-attr]


def test_depths_are_even_in_depth_or_disparity() -> None:
    sampler = ImportanceSampler(SETTINGS.replace(samples_coarse=5), MidpointIntegrator())
    zero = torch.zeros(2, 5, 5)
    torch.testing.assert_close(sampler.coarse_depths(rays(), zero)[0, 0], torch.linspace(1, 2, 5))
    torch.testing.assert_close(sampler.coarse_depths(rays(), None)[1, 4], torch.linspace(1, 2, 5) + 0.125)
    inverse = ImportanceSampler(SETTINGS.replace(samples_coarse=5, spacing="disparity"), MidpointIntegrator())
    torch.testing.assert_close(1 / inverse.coarse_depths(rays(), zero)[0, 0], torch.linspace(1, 0.5, 5))


def test_fine_samples_gather_where_the_weight_is() -> None:
    sampler = ImportanceSampler(SETTINGS.replace(samples_coarse=11, samples_fine=200), MidpointIntegrator())
    t = torch.linspace(1, 2, 11).expand(1, 1, -1)
    weights = torch.zeros(1, 1, 10)
    weights[..., 5] = 1.0  # the interval 1.5 .. 1.6
    fine = sampler.fine_depths(t, weights, None)[0, 0]
    assert ((fine > 1.35) & (fine < 1.75)).float().mean() > 0.9
    assert fine.min() >= 1.05 and fine.max() <= 1.85


def test_a_box_limits_each_ray() -> None:
    two = Rays(
        torch.tensor([[[0.0, 0.0, 2.0], [0.1, 0.1, 3.0], [5.0, 0.0, 2.0]]]),
        torch.tensor([[[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, -1.0]]]),
    )
    entry, leave = ray_box(two, 1.0)
    assert entry.flatten().tolist() == [1.5, 2.5, -1.0] and leave.flatten().tolist() == [2.5, 3.5, -2.0]
    limited = limit_rays(two, SETTINGS.replace(box_side=1.0)).limits
    assert limited is not None and limited[0].tolist() == [[1.5, 2.5], [2.5, 3.5], [1.5, 3.5]]
    original = limit_rays(two, SETTINGS.replace(box_side=1.0, reference=True)).limits
    assert original is not None and original[0, 2].tolist() == [1.5, 2.5]
    nothing = limit_rays(two.part(2, 3), SETTINGS.replace(box_side=1.0)).limits
    assert nothing is not None and nothing[0].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("fine", [0, 6])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_chunks_do_not_change_the_picture(fine: int, noise: float) -> None:
    settings = SETTINGS.replace(samples_fine=fine, sigma_noise=noise, box_side=0.8)
    with torch.no_grad():
        whole = render_midpoints(ball, rays(9), settings, Draws(3), keep_weights=True)
        parts = render_midpoints(ball, rays(9), settings.replace(max_points=2 * 8 * 2), Draws(3), keep_weights=True)
    for name in ("features", "rgb", "depth", "opacity", "mean_depth", "weights", "t"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert whole.t is not None and whole.t.shape[-1] == 8 + fine - 1


def test_recomputing_gives_the_same_gradient() -> None:
    scale = torch.tensor(1.0, requires_grad=True)

    def field(points: Tensor, directions: Tensor) -> FieldOutput:
        values = ball(points, directions)
        return FieldOutput(values.sigma * scale, values.rgb, features=values.features)

    gradients = []
    for settings in (SETTINGS, SETTINGS.replace(recompute=True, max_points=2 * 8 * 2)):
        output = render_midpoints(field, rays(9), settings, Draws(4))
        gradients += torch.autograd.grad(output.depth.sum() + output.rgb.sum(), scale)
    assert gradients[0].abs() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_picture_without_jitter_needs_no_numbers_and_sees_the_ball() -> None:
    settings = SETTINGS.replace(samples_coarse=48, samples_fine=48, jitter=False)
    straight = Rays(torch.tensor([[[0.0, 0.0, 1.5]]]), torch.tensor([[[0.0, 0.0, -1.0]]]))
    output = render_midpoints(ball, straight, settings)
    assert output.mean_depth is not None and output.opacity.item() > 0.99
    # entered at 1.2 with density about 60 x - 1 at x behind it: E[x] = sqrt(pi / 30) / 2 + 1 / 60 = 0.178
    assert abs(output.mean_depth.item() - 1.378) < 0.015
    with pytest.raises(ValueError, match="need draws"):
        render_midpoints(ball, straight, SETTINGS)


def test_density_noise_is_one_number_a_sample() -> None:
    settings = SETTINGS.replace(sigma_noise=2.0)
    numbers = {
        "jitter": torch.full((2, 5, 8), 0.5),
        "importance": torch.full((2, 5, 6), 0.5),
        "coarse_noise": torch.ones(2, 5, 8, 1),
        "fine_noise": torch.ones(2, 5, 6, 1),
    }
    noisy = render_midpoints(ball, rays(), settings, TapeDraws(tape=numbers))

    def denser(points: Tensor, directions: Tensor) -> FieldOutput:
        values = ball(points, directions)
        return FieldOutput(values.sigma + 2, values.rgb, features=values.features)

    plain = render_midpoints(denser, rays(), SETTINGS, TapeDraws(tape=numbers))
    torch.testing.assert_close(noisy.features, plain.features)


@pytest.mark.parametrize("change", [{"background": "last"}, {"samples_coarse": 3}])
def test_settings_it_does_not_have_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="midpoint compositing has|samples_coarse >= 4"):
        render_midpoints(ball, rays(), SETTINGS.replace(**change), Draws(0))
