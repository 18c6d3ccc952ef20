# SPDX-License-Identifier: Apache-2.0
"""The signed distance field: two ways to its gradient, density, view directions, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from facelab.fields.output import FieldOutput
from facelab.fields.sdf import BoundSdf, SdfField, SdfFieldConfig, gradient_by_autograd, laplace_density


def made(density: str = "sdf", dtype: torch.dtype = torch.float64, **changes) -> SdfField:
    config = SdfFieldConfig(**{"width": 12, "layers": 3, "style_dim": 7, "density": density, **changes})
    field = SdfField(config)
    field.reset_parameters(torch.Generator().manual_seed(1))
    return field.to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    points = 0.1 * torch.randn(2, 5, 4, 3, generator=source, dtype=dtype)
    directions = torch.nn.functional.normalize(torch.randn(2, 5, 3, generator=source, dtype=dtype), dim=-1)
    return points, directions, torch.randn(2, 7, generator=source, dtype=dtype)


def loss_of(values: FieldOutput, gradient: Tensor) -> Tensor:
    """Uses all outputs, as training does."""
    assert values.sdf is not None and values.features is not None
    return (
        (gradient.norm(dim=-1) - 1).square().mean()
        + torch.exp(-100 * values.sdf.abs()).mean()
        + (values.sigma * values.rgb).mean()
        + values.features.square().mean()
    )


def test_gradient_through_the_layers_equals_a_double_backward() -> None:
    points, directions, style = inputs()
    found = []
    for way in ("layers", "autograd"):
        field, codes = made(), style.clone().requires_grad_()
        bound = BoundSdf(field, field.film(codes))
        if way == "layers":
            values, gradient = bound.with_gradient(points, directions)
        else:
            values, gradient = gradient_by_autograd(bound, points, directions)
        loss = loss_of(values, gradient)
        slopes = torch.autograd.grad(loss, [codes, *field.parameters()])
        found.append((values, gradient, loss, slopes))
    (ours, our_gradient, our_loss, our_slopes), (theirs, their_gradient, their_loss, their_slopes) = found
    torch.testing.assert_close(our_gradient, their_gradient)
    torch.testing.assert_close(ours.rgb, theirs.rgb)
    torch.testing.assert_close(our_loss, their_loss)
    names = ["style", *(name for name, _ in made().named_parameters())]
    for name, mine, other in zip(names, our_slopes, their_slopes, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_is_with_respect_to_scene_units() -> None:
    points, directions, style = inputs()
    field = made()
    bound = BoundSdf(field, field.film(style))
    step = torch.tensor([1e-6, 0.0, 0.0], dtype=torch.float64)
    difference = (bound.distances(points + step) - bound.distances(points - step)) / 2e-6
    torch.testing.assert_close(bound.with_gradient(points, directions)[1][..., :1], difference, rtol=1e-5, atol=1e-6)
    unscaled = made(box_side=None)
    unscaled.load_state_dict(field.state_dict())
    _, slope = unscaled.with_gradient(points / 0.12, directions, unscaled.film(style))
    torch.testing.assert_close(bound.with_gradient(points, directions)[1], slope / 0.12)


def test_density_is_large_inside_and_halved_at_the_surface() -> None:
    sdf, beta = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.01])
    assert laplace_density(sdf, beta).tolist() == pytest.approx([100, 50, 0], abs=1e-4)
    points, directions, style = inputs()
    field = made()
    with torch.no_grad():
        field.beta.fill_(0.05)
    output = field(points, directions, field.film(style))
    assert output.sdf is not None
    torch.testing.assert_close(output.sigma, torch.sigmoid(-output.sdf / 0.05) / 0.05)


def test_raw_density_has_neither_beta_nor_distance() -> None:
    points, directions, style = inputs()
    field = made("raw")
    assert field.beta is None and "beta" not in field.state_dict()
    output = field(points, directions, field.film(style))
    assert output.sdf is None
    torch.testing.assert_close(output.sigma, field.distances(points, field.film(style)))
    with pytest.raises(ValueError, match="no signed distance"):
        gradient_by_autograd(BoundSdf(field, field.film(style)), points, directions)


def test_view_direction_changes_the_colour_alone() -> None:
    points, directions, style = inputs()
    field = made()
    film = field.film(style)
    here, there = field(points, directions, film), field(points, -directions, film)
    torch.testing.assert_close(here.sdf, there.sdf)
    assert (here.rgb - there.rgb).abs().max() > 1e-3
    # the direction is concatenated behind the features of the point
    weight = field.view.modulate(style).weight
    assert weight.shape[-1] == field.config.width + 3


def test_without_features_the_rest_is_the_same() -> None:
    points, directions, style = inputs()
    field = made()
    bound = BoundSdf(field, field.film(style))
    full, lean = bound(points, directions), bound.without_features()(points, directions)
    assert lean.features is None and full.features is not None and full.features.shape == (2, 5, 4, 12)
    assert torch.equal(full.rgb, lean.rgb) and torch.equal(full.sigma, lean.sigma)


@pytest.mark.parametrize("features", [True, False])
def test_without_a_graph_the_values_are_the_same_and_inputs_stay(features: bool) -> None:
    points, directions, style = inputs()
    field = made()
    film, before = field.film(style), points.clone()
    recorded = field(points, directions, film, features)
    with torch.no_grad():
        lean = field(points, directions, film, features)
        again, gradient = field.with_gradient(points, directions, film, features)
        distances = field.distances(points, film)
    assert torch.equal(points, before) and (lean.features is None) == (not features)
    for name in ("sigma", "rgb", "sdf", "features") if features else ("sigma", "rgb", "sdf"):
        for other in (lean, again):
            torch.testing.assert_close(getattr(other, name), getattr(recorded, name))
    torch.testing.assert_close(distances, recorded.sdf)
    torch.testing.assert_close(gradient, field.with_gradient(points, directions, film)[1])


def test_field_stays_in_full_precision() -> None:
    points, directions, style = inputs(torch.float32)
    field = made(dtype=torch.float32)
    expected = field(points, directions, field.film(style))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = field(points, directions, field.film(style))
    assert output.sdf is not None and output.sdf.dtype == torch.float32 and torch.equal(output.rgb, expected.rgb)


def test_one_scene_for_several_cameras_and_bad_counts() -> None:
    points, directions, style = inputs()
    field = made()
    one = field.film(style[:1])
    torch.testing.assert_close(
        field(points, directions, one.expand(2)).rgb[0], field(points[:1], directions[:1], one).rgb[0]
    )
    with pytest.raises(ValueError, match="must agree in scenes and rays"):
        field(points, directions[:, :2], one.expand(2))
    with pytest.raises(ValueError, match="2 scenes cannot be seen from 3 cameras"):
        field.film(style).expand(3)


def test_outputs_are_picked_and_joined_with_their_distance() -> None:
    points, directions, style = inputs()
    field = made()
    output = field(points, directions, field.film(style))
    order = torch.tensor([3, 1]).expand(2, 5, 2)
    picked = output.select(order)
    assert picked.sdf is not None and picked.features is not None and output.sdf is not None
    assert torch.equal(picked.sdf, output.sdf[:, :, [3, 1]]) and torch.equal(picked.rgb, output.rgb[:, :, [3, 1]])
    joined = FieldOutput.cat([output, picked])
    assert joined.sdf is not None and joined.sdf.shape == (2, 5, 6, 1) and joined.rgb.shape == (2, 5, 6, 3)
    assert not torch.equal(joined.rgb, joined.features[..., :3])


def test_initial_field_is_nearly_flat_and_beta_a_tenth() -> None:
    field = made(width=256, layers=2, dtype=torch.float32)
    bound = math.sqrt(6 / 256) / 25
    assert field.beta.item() == pytest.approx(0.1)
    assert 0.95 * bound < field.distance.weight.abs().max().item() <= bound
    assert 0.95 / 3 < field.layers[0].weight.abs().max().item() <= 1 / 3
    assert field.layers[1].weight.abs().max().item() <= bound
