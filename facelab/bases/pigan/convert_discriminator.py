# SPDX-License-Identifier: Apache-2.0
"""Discriminator weights of pi-GAN and FENeRF: original key names <-> ours.

Original keys: ``layers.<i>.network.{0,2}`` (the two convolutions; ``.conv`` inside a CoordConv, with
the input channels [x, row, column]), ``layers.<i>.proj`` (skip), ``fromRGB.<i>.model.0`` (adapter),
``final_layer`` (head), ``pose_layer`` (never used: dropped when read, zeros when written).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.errors import UserError, nearest
from facelab.nn.discriminators import DiscriminatorConfig, ProgressiveDiscriminator

StateDict = Mapping[str, Tensor]
CONVOLUTIONS = {"conv0": "network.0", "conv1": "network.2", "skip": "proj"}
POSE_LAYER = {"pose_layer.weight": (400, 2), "pose_layer.bias": (400,)}
COORDINATES = 2  # trailing input channels of a CoordConv


@dataclass(frozen=True)
class OriginalClass:
    """What a discriminator class of the originals is in our terms; ``latents`` share the head equally."""

    block: str
    latents: tuple[str, ...] = ()
    pose: bool = False


ORIGINAL_CLASSES: dict[str, OriginalClass] = {
    "CCSEncoderDiscriminator": OriginalClass("coord_strided", ("z",), pose=True),
    "CCSDiscriminator": OriginalClass("coord_strided"),
    "StridedDiscriminator": OriginalClass("strided"),
    "ProgressiveEncoderDiscriminator": OriginalClass("coord_pool", ("z",), pose=True),
    "ProgressiveDiscriminator": OriginalClass("coord_pool"),
    "CCSDoubleEncoderDiscriminator": OriginalClass("coord_strided", ("z_geo", "z_app"), pose=True),
}
DOUBLE_LATENTS = 2 * 256  # the two codes of the released FENeRF discriminators


def published_config(
    class_name: str, *, in_channels: int = 3, latents: Mapping[str, int] | None = None
) -> DiscriminatorConfig:
    """The configuration of an original class (the last part of a dotted name counts).

    Args:
        latents: sizes of its codes, by default 256 each.

    Raises:
        UserError: unknown class.
    """
    original = _original_class(class_name)
    sizes = dict(latents) if latents is not None else dict.fromkeys(original.latents, 256)
    return DiscriminatorConfig(in_channels=in_channels, block=original.block, latents=sizes, pose=original.pose)


def describe_discriminator(
    original: StateDict, class_name: str | None = None, latents: Mapping[str, int] | None = None
) -> DiscriminatorConfig:
    """Derive the configuration from the shapes of an original state dict.

    Without a class name, a head of 1 channel is realness alone, 1 + 512 + 2 are the two codes
    ``z_geo`` and ``z_app`` of FENeRF, and any other is one code ``z``; ``latents`` says otherwise.

    Raises:
        UserError: not such a state dict, it contradicts the class name, or the shapes alone do not
            decide and a class name is needed.
    """
    channels = _channels(original)
    block = _block_kind(original, channels, class_name)
    named = _original_class(class_name) if class_name else None
    if named and named.block != block:
        raise UserError(f"{class_name} has {named.block} blocks, but the shapes of this file say {block}")
    rows = int(original["final_layer.weight"].shape[0])
    pose = rows > 1 if named is None else named.pose
    if latents is None:
        guess = ("z_geo", "z_app") if rows == 3 + DOUBLE_LATENTS else ("z",)
        names = named.latents if named else (guess if rows > 1 else ())
        latents = {name: (rows - 1 - 2 * pose) // len(names) for name in names}
    if rows != 1 + sum(latents.values()) + 2 * pose or any(size < 1 for size in latents.values()):
        raise UserError(
            f"the head of this discriminator has {rows} channels, which is not 1 + {dict(latents)}"
            f"{' + 2 for the pose' if pose else ''}; give the class or the latent sizes it was trained with"
        )
    in_channels = int(original["fromRGB.0.model.0.weight"].shape[1])
    return DiscriminatorConfig(
        in_channels=in_channels, channels=channels, block=block, latents=dict(latents), pose=pose
    )


def discriminator_from_original(original: StateDict, config: DiscriminatorConfig) -> dict[str, Tensor]:
    """Original state dict -> state dict of ``ProgressiveDiscriminator(config)``.

    Raises:
        UserError: keys or shapes that do not belong to this configuration.
    """
    _check_keys(original, config)
    converted: dict[str, Tensor] = {}
    for ours, theirs in _key_pairs(config):
        weight, bias = original[f"{theirs}.weight"], original[f"{theirs}.bias"]
        if theirs.endswith(".conv"):
            weight, coordinates = weight.split([weight.shape[1] - COORDINATES, COORDINATES], dim=1)
            converted[f"{ours}.coord_weight"] = coordinates.contiguous()
        converted[f"{ours}.weight"], converted[f"{ours}.bias"] = weight.contiguous(), bias
    return converted


def discriminator_to_original(state: StateDict, config: DiscriminatorConfig) -> dict[str, Tensor]:
    """State dict of ``ProgressiveDiscriminator(config)`` -> original keys, in the original order."""
    converted: dict[str, Tensor] = {}
    for ours, theirs in _key_pairs(config):
        weight = state[f"{ours}.weight"]
        if theirs.endswith(".conv"):
            weight = torch.cat([weight, state[f"{ours}.coord_weight"]], dim=1)
        converted[f"{theirs}.weight"], converted[f"{theirs}.bias"] = weight, state[f"{ours}.bias"]
    if _has_pose_layer(config):
        converted |= {key: state["head.bias"].new_zeros(shape) for key, shape in POSE_LAYER.items()}
    return converted


def original_shapes(config: DiscriminatorConfig) -> dict[str, tuple[int, ...]]:
    """Original key -> shape, in the order of the original state dict."""
    state = ProgressiveDiscriminator(config).state_dict()
    return {key: tuple(value.shape) for key, value in discriminator_to_original(state, config).items()}


def _key_pairs(config: DiscriminatorConfig) -> list[tuple[str, str]]:
    """(our prefix, original prefix) of every convolution, in the original order."""
    inner = "" if config.block == "strided" else ".conv"
    pairs: list[tuple[str, str]] = []
    for index, (before, after) in enumerate(zip(config.channels[:-1], config.channels[1:], strict=True)):
        for ours, theirs in CONVOLUTIONS.items():
            if ours == "skip" and config.block == "coord_pool" and before == after:
                continue
            suffix = "" if ours == "skip" else inner
            pairs.append((f"blocks.{index}.{ours}", f"layers.{index}.{theirs}{suffix}"))
    pairs += [(f"adapters.{index}", f"fromRGB.{index}.model.0") for index in range(len(config.channels))]
    return [*pairs, ("head", "final_layer")]


def _has_pose_layer(config: DiscriminatorConfig) -> bool:
    return config.block != "coord_pool" and not config.latents and not config.pose


def _original_class(class_name: str) -> OriginalClass:
    name = class_name.rpartition(".")[2]
    if name not in ORIGINAL_CLASSES:
        known = ", ".join(ORIGINAL_CLASSES)
        raise UserError(f"unknown discriminator class {name!r}; known: {known}.{nearest(name, ORIGINAL_CLASSES)}")
    return ORIGINAL_CLASSES[name]


def _channels(original: StateDict) -> tuple[int, ...]:
    adapters = [key for key in original if re.fullmatch(r"fromRGB\.\d+\.model\.0\.weight", key)]
    if len(adapters) < 2 or "fromRGB.0.model.0.weight" not in original or "final_layer.weight" not in original:
        raise UserError(
            "this is no discriminator of pi-GAN or FENeRF: expected the keys fromRGB.<i>.model.0.weight and "
            f"final_layer.weight, got {list(original)[:3]} ...; check the path"
        )
    return tuple(int(original[f"fromRGB.{i}.model.0.weight"].shape[0]) for i in range(len(adapters)))


def _block_kind(original: StateDict, channels: tuple[int, ...], class_name: str | None) -> str:
    if "layers.0.network.0.weight" in original:
        return "strided"
    # Strided blocks always have a skip convolution; pooling ones only where the channels change.
    equal = [i for i, (before, after) in enumerate(zip(channels[:-1], channels[1:], strict=True)) if before == after]
    if equal:
        return "coord_strided" if f"layers.{equal[0]}.proj.weight" in original else "coord_pool"
    if class_name:
        return _original_class(class_name).block
    raise UserError(
        "the shapes alone do not tell strided from pooling blocks, because every block changes the channels; "
        f"give the original class, one of {', '.join(ORIGINAL_CLASSES)}"
    )


def _check_keys(original: StateDict, config: DiscriminatorConfig) -> None:
    expected = original_shapes(config)
    got = {key: tuple(value.shape) for key, value in original.items()}
    optional = set(POSE_LAYER)
    missing = sorted(set(expected) - set(got) - optional)
    unknown = sorted(set(got) - set(expected) - optional)
    differing = [
        f"{key} {got[key]} instead of {expected[key]}"
        for key in expected
        if key in got and key not in optional and got[key] != expected[key]
    ]
    if missing or unknown or differing:
        raise UserError(
            f"these weights do not fit the discriminator: missing {missing[:3]} ({len(missing)} in all), "
            f"unknown {unknown[:3]} ({len(unknown)}), other shapes {differing[:3]} ({len(differing)}); copy or download the "
            "file again"
        )
