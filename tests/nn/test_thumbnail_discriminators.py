# SPDX-License-Identifier: Apache-2.0
"""Discriminators of StyleSDF and CNeRF, beyond their golden cases: groups, initial values, derivatives, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from facelab.bases.stylesdf.convert_discriminators import (
    Discriminator,
    discriminator_from_original,
    discriminator_of,
    discriminator_shapes,
    discriminator_to_original,
)
from facelab.errors import UserError
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator, ResidualDiscriminatorConfig
from facelab.nn.discriminators.stylegan2 import dividing_group

KINDS = ("view", "global", "region", "full", "full_semantics")


def source(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(kind: str, **changes) -> Discriminator:
    small = {"resolution": 8, "channel_max": 4, **changes}
    if kind == "view":
        return ViewDiscriminator(ViewDiscriminatorConfig(**small), source())
    if kind == "global":
        return ViewDiscriminator(ViewDiscriminatorConfig(semantic_channels=5, group_size=4, **small), source())
    if kind == "region":
        return RegionDiscriminator(RegionDiscriminatorConfig(classes=5, **small), source())
    channels = 5 if kind == "full_semantics" else 0
    return ResidualDiscriminator(ResidualDiscriminatorConfig(semantic_channels=channels, **small), source())


def pictures(kind: str, count: int = 4, size: int = 8) -> list[Tensor]:
    second = {"global": 5, "region": 1, "full_semantics": 5}.get(kind)
    found = [torch.randn(count, 3, size, size, generator=source(2))]
    return found if second is None else [*found, torch.rand(count, second, size, size, generator=source(3))]


def realness(model: Discriminator, images: list[Tensor]) -> Tensor:
    said = model(*images)
    return said if isinstance(said, Tensor) else said.realness


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_second_derivative(kind: str) -> None:
    """R1 by autograd against a finite difference along a random direction in all weights."""
    model = build(kind).double()
    images = [x.double().requires_grad_() for x in pictures(kind)]

    def penalty() -> Tensor:
        found = torch.autograd.grad(realness(model, images).sum(), images, create_graph=True)
        return torch.stack([g.square().sum() for g in found]).sum()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    drawn = source(4)
    directions = [torch.randn(p.shape, generator=drawn, dtype=torch.float64) for p in parameters]
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
        values.append(penalty().detach())
    torch.testing.assert_close(analytic, (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_derivatives_of_both_orders(kind: str) -> None:
    model = build(kind).double()
    images = tuple(x.double().requires_grad_() for x in pictures(kind, 2))

    def judged(*images: Tensor) -> Tensor:
        return realness(model, list(images))

    assert torch.autograd.gradcheck(judged, images, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(judged, images, atol=1e-6, fast_mode=True)


def test_statistics_fall_back_to_smaller_groups() -> None:
    assert [dividing_group(n) for n in (1, 2, 3, 4, 6, 8, 9, 10, 14)] == [1, 2, 3, 4, 3, 4, 3, 2, 2]
    with pytest.raises(ValueError, match="5 samples do not divide"):
        dividing_group(5)


@pytest.mark.parametrize("kind", ["global", "region", "full", "full_semantics"])
def test_members_of_a_group_are_neighbours_or_strided(kind: str) -> None:
    """Batch 6 makes two groups of three: (0 1 2) (3 4 5), in the originals (0 2 4) (1 3 5)."""
    images = pictures(kind, 6)
    for grouping, together in (("contiguous", {0, 1, 2}), ("strided", {0, 2, 4})):
        model = build(kind, grouping=grouping)
        before = realness(model, images)
        changed = [x.clone() for x in images]
        for x in changed:
            x[0] = x[0] * 3 + 1
        moved = (realness(model, changed) - before).abs().flatten() > 1e-7
        assert set(moved.nonzero().flatten().tolist()) == together


def test_stage_one_of_stylesdf_has_no_statistic() -> None:
    images, model = pictures("view"), build("view")
    torch.testing.assert_close(model(*images).realness[:1], model(images[0][:1]).realness)
    assert model(*images).view.shape == (4, 2)
    assert build("view", view=False)(*images).view is None


@pytest.mark.parametrize("kind", ["view", "region"])
def test_coordinates_as_channels_give_the_same(kind: str) -> None:
    images, plain, joined = pictures(kind), build(kind), build(kind, joined=True)
    joined.load_state_dict(plain.state_dict())
    torch.testing.assert_close(realness(plain, images), realness(joined, images), atol=1e-6, rtol=1e-5)


def test_channels_last_changes_nothing_but_speed() -> None:
    images, plain, last = pictures("global"), build("global"), build("global", channels_last=True)
    torch.testing.assert_close(realness(plain, images), realness(last, images), atol=1e-6, rtol=1e-5)


def test_biases_start_with_a_fan_in_without_coordinates() -> None:
    """4 * 9 inputs without and 6 * 9 with coordinates: the largest of many biases tells which bound was used."""
    model, found = build("view", resolution=32), []
    for seed in range(400):
        model.reset_parameters(source(seed))
        found.append(model.trunks["image"].blocks[0].conv0.bias.detach().abs().max())
    largest = torch.stack(found).max().item()
    assert 1 / math.sqrt(54) < largest <= 1 / math.sqrt(36)


def test_region_discriminator_sees_the_picture_through_the_region() -> None:
    image, region = pictures("region")
    region[..., :4] = 0
    model, changed = build("region"), image.clone()
    changed[..., :4] += 5
    assert torch.equal(model(image, region).realness, model(changed, region).realness)
    assert model(image, region).classes.shape == (4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_goes_there_and_back(kind: str) -> None:
    model = build(kind)
    original = discriminator_to_original(model)
    again = discriminator_of(original)
    assert type(again) is type(model)
    assert discriminator_shapes(again) == {key: tuple(value.shape) for key, value in original.items()}
    again.load_state_dict(discriminator_from_original(original, again))
    torch.testing.assert_close(realness(again, pictures(kind)), realness(model, pictures(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_missing_and_misshapen_tensors_are_named(kind: str) -> None:
    model = build(kind)
    original = discriminator_to_original(model)
    key = next(key for key in original if key.endswith(("conv1.0.weight", "conv1.conv.conv.weight")))
    with pytest.raises(UserError, match="missing"):
        discriminator_from_original({k: v for k, v in original.items() if k != key}, model)
    with pytest.raises(UserError, match="no rule for 'convs.9.nonsense'"):
        discriminator_from_original({**original, "convs.9.nonsense": torch.zeros(1)}, model)
    with pytest.raises(UserError, match="should have shape"):
        discriminator_from_original({**original, key: original[key][:1]}, model)


def test_other_filters_are_refused() -> None:
    original = discriminator_to_original(build("full"))
    key = next(key for key in original if key.endswith("kernel"))
    with pytest.raises(UserError, match="models with other filters"):
        discriminator_from_original({**original, key: torch.ones(4, 4) / 16}, build("full"))


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="not those of a StyleSDF or CNeRF discriminator"):
        discriminator_of(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("kind", "images", "words"),
    [
        ("view", [torch.zeros(2, 3, 16, 16)], "image: expected"),
        ("view", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 8, 8)], "semantics: expected none"),
        ("full_semantics", [torch.zeros(2, 3, 8, 8)], "semantics: expected"),
        ("full", [torch.zeros(5, 3, 8, 8)], "5 samples do not divide"),
    ],
)
def test_other_inputs_are_refused(kind: str, images: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(kind)(*images)


def test_resolutions_outside_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match="resolution must be one of"):
        ViewDiscriminatorConfig(resolution=256)
    with pytest.raises(ValueError, match="resolution must be one of"):
        RegionDiscriminatorConfig(resolution=4)
    with pytest.raises(ValueError, match="power of two"):
        ResidualDiscriminatorConfig(resolution=24)
