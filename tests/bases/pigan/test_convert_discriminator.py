# SPDX-License-Identifier: Apache-2.0
"""Discriminator weights: original keys <-> ours, and the variant read off the shapes."""

from __future__ import annotations

import hashlib

import pytest
import torch

from facelab.bases.pigan.convert_discriminator import (
    ORIGINAL_CLASSES,
    describe_discriminator,
    discriminator_from_original,
    discriminator_to_original,
    original_shapes,
    published_config,
)
from facelab.errors import UserError
from facelab.nn.discriminators import DiscriminatorConfig, ProgressiveDiscriminator

# sha256 of the lines "key shape" of the originals' state dicts, in their order.
LISTINGS = {
    ("CCSDiscriminator", 3): "83044059e9332b8d",
    ("CCSEncoderDiscriminator", 3): "904c7decc4b468d8",
    ("ProgressiveDiscriminator", 3): "260d2a678a8faf0b",
    ("ProgressiveEncoderDiscriminator", 3): "ec216907e7278e85",
    ("StridedDiscriminator", 3): "39f516dabc4e9c4f",
    ("CCSDoubleEncoderDiscriminator", 3): "8c5f274deaecf9e1",
    ("CCSDoubleEncoderDiscriminator", 21): "738b5ba4b1d3754e",
}
SLIM = DiscriminatorConfig(in_channels=4, channels=(3, 5, 5, 6), latents={"z_geo": 4, "z_app": 4}, pose=True)


@pytest.mark.parametrize(("class_name", "in_channels"), LISTINGS)
def test_keys_shapes_and_order_are_the_originals(class_name: str, in_channels: int) -> None:
    config = published_config(f"discriminators.{class_name}", in_channels=in_channels)
    shapes = original_shapes(config)
    lines = "\n".join(f"{key} {shape}" for key, shape in shapes.items())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == LISTINGS[class_name, in_channels]
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert describe_discriminator(empty) == config
    assert describe_discriminator(empty, class_name) == config


def test_every_class_is_listed() -> None:
    assert {name for name, _ in LISTINGS} == set(ORIGINAL_CLASSES)


@pytest.mark.parametrize("block", ["coord_strided", "strided", "coord_pool"])
@pytest.mark.parametrize("head", [{}, {"latents": {"z": 4}, "pose": True}])
def test_there_and_back(block: str, head: dict) -> None:
    config = DiscriminatorConfig(channels=(3, 5, 5, 6), block=block, **head)
    state = ProgressiveDiscriminator(config).state_dict()
    original = discriminator_to_original(state, config)
    assert describe_discriminator(original) == config
    back = discriminator_from_original(original, config)
    assert list(back) and set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_coordinates_are_the_last_channels() -> None:
    state = ProgressiveDiscriminator(SLIM).state_dict()
    original = discriminator_to_original(state, SLIM)
    whole = original["layers.1.network.0.conv.weight"]
    assert torch.equal(whole[:, :5], state["blocks.1.conv0.weight"])
    assert torch.equal(whole[:, 5:], state["blocks.1.conv0.coord_weight"])


def test_two_codes_of_other_sizes_need_the_class_or_the_sizes() -> None:
    original = discriminator_to_original(ProgressiveDiscriminator(SLIM).state_dict(), SLIM)
    assert describe_discriminator(original).latents == {"z": 8}
    assert describe_discriminator(original, "CCSDoubleEncoderDiscriminator") == SLIM
    assert describe_discriminator(original, latents={"z_geo": 4, "z_app": 4}) == SLIM


def test_undecidable_blocks_need_the_class() -> None:
    config = DiscriminatorConfig(channels=(3, 5, 6), block="coord_pool")
    original = discriminator_to_original(ProgressiveDiscriminator(config).state_dict(), config)
    with pytest.raises(UserError, match="give the original class"):
        describe_discriminator(original)
    assert describe_discriminator(original, "ProgressiveDiscriminator") == config


def _remove(state: dict) -> None:
    del state["layers.2.proj.bias"]


def _add(state: dict) -> None:
    state["layers.9.proj.bias"] = torch.zeros(1)


def _reshape(state: dict) -> None:
    state["fromRGB.1.model.0.weight"] = torch.zeros(5, 9, 1, 1)


@pytest.mark.parametrize(
    ("damage", "words"), [(_remove, "layers.2.proj.bias"), (_add, "layers.9.proj.bias"), (_reshape, "fromRGB.1")]
)
def test_damaged_weights_are_refused(damage, words: str) -> None:
    original = discriminator_to_original(ProgressiveDiscriminator(SLIM).state_dict(), SLIM)
    damage(original)
    with pytest.raises(UserError, match=words):
        discriminator_from_original(original, SLIM)


def test_other_files_and_classes_are_refused() -> None:
    with pytest.raises(UserError, match="no discriminator"):
        describe_discriminator({"siren.network.0.layer.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="Did you mean 'StridedDiscriminator'"):
        published_config("StrideDiscriminator")
    original = discriminator_to_original(ProgressiveDiscriminator(SLIM).state_dict(), SLIM)
    with pytest.raises(UserError, match="coord_pool blocks, but"):
        describe_discriminator(original, "ProgressiveEncoderDiscriminator")
    with pytest.raises(UserError, match="the head"):
        describe_discriminator(original, "CCSDiscriminator")
