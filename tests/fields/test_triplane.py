# SPDX-License-Identifier: Apache-2.0
"""Tri-plane lookup and decoder against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.fields.output import FieldOutput
from facelab.fields.triplane import (
    PLANE_AXES,
    OSGDecoder,
    TriplaneConfig,
    TriplaneField,
    plane_coordinates,
    sample_planes,
)


def ramp_planes(size: int = 8) -> torch.Tensor:
    """(1, 3, 2, size, size): channel 0 is the coordinate along the width, channel 1 along the height, at pixel centres."""
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    plane = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])
    return plane.expand(1, 3, 2, size, size)


@pytest.mark.parametrize("axes", sorted(PLANE_AXES))
def test_each_plane_is_indexed_by_the_coordinates_of_its_name(axes: str) -> None:
    points = torch.tensor([[[0.1, -0.3, 0.6]]])
    named = [[{"x": 0.1, "y": -0.3, "z": 0.6}[letter] for letter in pair] for pair in axes.split("_")]
    found = torch.stack(list(sample_planes(ramp_planes(), points, axes)), dim=1)[0, :, :, 0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(named))
    torch.testing.assert_close(plane_coordinates(points, axes)[0, :, 0], torch.tensor(named))  # type: ignore[arg-type]


def test_outside_the_planes_is_zero_and_the_border_fades_over_half_a_pixel() -> None:
    planes = torch.ones(1, 3, 1, 4, 4)
    points = torch.tensor([[[0.75, 0.0, 0.0], [1.0, 0.0, 0.0], [1.5, 0.0, 0.0]]])
    (first, _, _) = sample_planes(planes, points, "xy_xz_zy")
    torch.testing.assert_close(first[0, 0], torch.tensor([1.0, 0.5, 0.0]))


def test_one_set_of_planes_serves_many_scenes_and_keeps_its_gradient() -> None:
    planes = torch.randn(1, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    points = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    one = torch.stack(list(sample_planes(planes, points)))
    two = torch.stack(list(sample_planes(planes.expand(2, -1, -1, -1, -1), points)))
    torch.testing.assert_close(one, two)
    (gradient,) = torch.autograd.grad(one.sum(), planes)
    assert gradient.shape == planes.shape and gradient.abs().sum() > 0


def test_planes_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"planes must be \(2 or 1, 3, C, H, W\), got \(3, 3, 1, 2, 2\)"):
        next(sample_planes(torch.zeros(3, 3, 1, 2, 2), torch.zeros(2, 1, 3)))


def test_decoder_is_two_scaled_layers_with_a_softplus_between() -> None:
    generator = torch.Generator().manual_seed(2)
    decoder = OSGDecoder(6, hidden=5, features=4, lr_mul=0.5)
    decoder.reset_parameters(generator)
    assert 1.5 < torch.cat([p.flatten() for p in decoder.parameters() if p.ndim == 2]).std() < 2.5  # N(0, 1) / 0.5
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    hidden_w, hidden_b, output_w, output_b = (p.detach().double() for p in decoder.parameters())
    x = torch.randn(2, 6, 3, generator=generator)
    hidden = torch.log1p(torch.exp(x.double().transpose(1, 2) @ hidden_w.T * (0.5 / math.sqrt(6)) + 0.5 * hidden_b))
    output = hidden @ output_w.T * (0.5 / math.sqrt(5)) + 0.5 * output_b
    sigma, features = decoder(x)
    torch.testing.assert_close(sigma.double(), output[..., :1], rtol=1e-5, atol=1e-5)
    expected = 1 / (1 + torch.exp(-output[..., 1:])) * 1.002 - 0.001
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder.density(x), sigma)


def test_decoder_gradients_of_first_and_second_order() -> None:
    generator = torch.Generator().manual_seed(4)
    decoder = OSGDecoder(3, hidden=4, features=3).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = (3 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(decoder, (x,))
    assert torch.autograd.gradgradcheck(decoder, (x,))


def test_what_a_point_keeps_for_the_backward() -> None:
    decoder = OSGDecoder(32)
    decoder.reset_parameters(torch.Generator().manual_seed(5))
    x = torch.randn(1, 32, 1000, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sigma, features = decoder(x)
        product = sigma * features  # keeps both
    assert product.requires_grad
    at_points = sum(numbers for numbers in kept.values() if numbers >= 30_000) / 1000
    assert at_points == 32 + 64 + 33 + 32  # plane features, hidden layer, output (here for sigma), colour


@pytest.mark.parametrize("aggregation", ["mean", "concat"])
def test_field_reads_scene_units_and_its_density_agrees(aggregation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    field = TriplaneField(TriplaneConfig(aggregation=aggregation, box_side=0.5, channels=4, hidden=8, features=5))  # type: ignore[arg-type]
    field.reset_parameters(generator)
    planes = torch.randn(2, 3, 4, 6, 6, generator=generator)
    points = torch.rand(2, 3, 4, 3, generator=generator) * 0.5 - 0.25
    values = field(points, planes)
    assert values.features is not None and values.features.shape == (2, 3, 4, 5)
    assert torch.equal(values.rgb, values.features[..., :3])
    torch.testing.assert_close(field.density(points, planes), values.sigma)
    wide = TriplaneField(TriplaneConfig(aggregation=aggregation, box_side=1.0, channels=4, hidden=8, features=5))  # type: ignore[arg-type]
    wide.load_state_dict(field.state_dict())
    torch.testing.assert_close(wide(points * 2, planes).sigma, values.sigma)


def test_outputs_with_features_are_joined_and_reordered_together() -> None:
    features = torch.arange(24.0).reshape(1, 2, 3, 4)
    values = FieldOutput(features[..., :1], features[..., :3], features=features)
    joined = FieldOutput.cat([values, values]).select(torch.tensor([[[5, 0], [1, 3]]]))
    assert joined.features is not None
    torch.testing.assert_close(joined.features[0, 0], features[0, 0, [2, 0]])
    torch.testing.assert_close(joined.rgb[0, 1], features[0, 1, [1, 0], :3])


@pytest.mark.parametrize(
    ("change", "message"), [({"axes": "xy"}, "axes"), ({"features": 2}, "features"), ({"box_side": 0}, "box_side")]
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TriplaneConfig(**change)
