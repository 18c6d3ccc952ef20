# SPDX-License-Identifier: Apache-2.0
"""Discriminators of StyleSDF and CNeRF, original names <-> ours.

    stage 1    convs.1.conv1.conv.conv.weight (O,I+2,3,3)  <-> trunks.image.blocks.0.conv0.weight and .coord_weight
               convs.1.conv1.activation.bias               <-> trunks.image.blocks.0.conv0.bias
    stage 2    convs.1.conv2.1.weight                      <-> trunks.image.0.conv1.weight

CNeRF's have two trunks, ``convs_img`` and ``convs_seg``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from facelab.bases.stylesdf.keys import KERNELS, Rules, check_kernels, count_of, filter_kernel
from facelab.checkpoints.key_map import KeyMap, check_keys
from facelab.errors import UserError
from facelab.nn.discriminators.coordconv import (
    REGION_CHANNELS,
    VIEW_CHANNELS,
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator, ResidualDiscriminatorConfig
from facelab.nn.discriminators.stylegan2 import LAST_BLOCK

Discriminator = ViewDiscriminator | RegionDiscriminator | ResidualDiscriminator
MAX_BLOCKS = 10  # pictures of 4096 pixels
COORDINATES = 2  # channels at the end of a CoordConv's input: row, then column


def discriminator_from_original(
    state: Mapping[str, Tensor], model: Discriminator, what: str = "the discriminator"
) -> dict[str, Tensor]:
    """An original state dict -> the weights of ``model``, strictly.

    Raises:
        UserError: unknown or missing keys (named), another shape, another filter.
    """
    check_kernels(state, what)
    renamed = _keys(model).from_original(state, what=what)
    converted: dict[str, Tensor] = {}
    for key, value in renamed.items():
        if f"{key.removesuffix('weight')}coord_weight" not in model.state_dict():
            converted[key] = value
            continue
        inner = value.shape[1] - COORDINATES
        converted[key] = value[:, :inner].contiguous()
        converted[f"{key.removesuffix('weight')}coord_weight"] = value[:, inner:].contiguous()
    check_keys(converted, model.state_dict(), what)
    return converted


def discriminator_to_original(model: Discriminator, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a discriminator under the original's names, its constant filters included.

    Args:
        values: what to rename instead of the weights, by our names (gradients, for example).
    """
    ours = model.state_dict() if values is None else values
    joined: dict[str, Tensor] = {}
    for key, value in ours.items():
        if key.endswith(".coord_weight"):
            continue
        coordinates = ours.get(f"{key.removesuffix('weight')}coord_weight") if key.endswith(".weight") else None
        joined[key] = value if coordinates is None else torch.cat([value, coordinates], dim=1)
    state = dict(_keys(model).back_to_original(joined))
    if isinstance(model, ResidualDiscriminator):
        for key in [key for key in state if key.endswith((".conv2.1.weight", ".skip.1.weight"))]:
            state[f"{key.removesuffix('1.weight')}0.kernel"] = filter_kernel()
    return state


def discriminator_shapes(model: Discriminator) -> dict[str, tuple[int, ...]]:
    """Original name -> shape of every tensor of such a discriminator."""
    return {key: tuple(value.shape) for key, value in discriminator_to_original(model).items()}


def discriminator_of(state: Mapping[str, Tensor], what: str = "the discriminator") -> Discriminator:
    """A discriminator of the architecture that the names and shapes of an original state dict show, still without them.

    Minibatch statistics are grouped as in the originals' files of that kind exist: 4 samples.

    Raises:
        UserError: none of the four kinds.
    """
    trunk = "convs_img" if any(key.startswith("convs_img.") for key in state) else "convs"
    try:
        blocks = count_of(state, f"{trunk}.") - 1
        if f"{trunk}.0.0.weight" in state:
            return ResidualDiscriminator(_residual_config(state, trunk, blocks))
        if "class_linear.1.weight" in state:
            return RegionDiscriminator(_region_config(state, trunk, blocks))
        return ViewDiscriminator(_view_config(state, trunk, blocks))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{what}: its tensors are not those of a StyleSDF or CNeRF discriminator ({error}); check the file"
        ) from error


def _residual_config(state: Mapping[str, Tensor], trunk: str, blocks: int) -> ResidualDiscriminatorConfig:
    if not 1 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"{blocks} blocks, expected 1 to {MAX_BLOCKS}")
    resolution = LAST_BLOCK << (blocks - 1)
    first = state[f"{trunk}.0.0.weight"].shape[0]
    base = state["final_conv.0.weight"].shape[0]
    multiplier = max(1, first * resolution // (32 * 512))
    config = ResidualDiscriminatorConfig(
        resolution=resolution,
        semantic_channels=_semantic_channels(state, "convs_seg.0.0.weight"),
        channel_multiplier=multiplier,
        channel_max=None if base == 512 else base,
    )
    table = config.trunk(first)
    for number, side in enumerate(table.resolutions, start=1):  # before anything of that size is built
        channels, found = table.channels(side), state[f"{trunk}.{number}.conv1.0.weight"].shape
        if tuple(found[:2]) != (channels, channels):
            raise ValueError(f"block {number} has weights {tuple(found)}, {channels} channels would fit the others")
    return config


def _view_config(state: Mapping[str, Tensor], trunk: str, blocks: int) -> ViewDiscriminatorConfig:
    head = state["final_conv.conv.weight"]
    base = state[f"{trunk}.{blocks}.conv2.activation.bias"].shape[0]
    return ViewDiscriminatorConfig(
        resolution=2 << blocks,
        semantic_channels=_semantic_channels(state, "convs_seg.0.conv.weight"),
        view=head.shape[0] == 3,
        group_size=4 if head.shape[1] == base + 1 else None,
        channel_max=None if base == VIEW_CHANNELS[2] else base,
    )


def _region_config(state: Mapping[str, Tensor], trunk: str, blocks: int) -> RegionDiscriminatorConfig:
    base = state["final_conv.conv.weight"].shape[0]
    return RegionDiscriminatorConfig(
        resolution=4 << blocks,
        classes=state["class_linear.1.weight"].shape[0],
        channel_max=None if base == REGION_CHANNELS[4] else base,
    )


def _semantic_channels(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].shape[1] if key in state else 0


def _keys(model: Discriminator) -> KeyMap:
    return KeyMap(_rules(model), KERNELS)


def _rules(model: Discriminator) -> Rules:
    if isinstance(model, ResidualDiscriminator):
        rules = [rule for original, ours in _trunks(model) for rule in _residual_trunk(original, ours)]
        return [
            *rules,
            ("final_conv.0.weight", "epilogue.conv.weight"),
            ("final_conv.1.bias", "epilogue.conv.bias"),
            ("final_linear.0.{p}", "epilogue.fc.{p}"),
            ("final_linear.1.{p}", "epilogue.out.{p}"),
        ]
    rules = [rule for original, ours in _trunks(model) for rule in _coord_trunk(original, ours)]
    if isinstance(model, ViewDiscriminator):
        return [*rules, ("final_conv.conv.{p}", "head.{p}")]
    return [
        ("convs_seg.0.conv.bias", "trunks.semantics.first.bias"),  # of the convolution: there is no activation
        *[rule for rule in rules if rule[0] != "convs_seg.0.activation.bias"],
        ("final_conv.conv.{p}", "conv.{p}"),
        ("final_linear.{i:n}.{p}", "realness.{i:n}.{p}"),
        ("class_linear.{i:n}.{p}", "classes.{i:n}.{p}"),
    ]


def _trunks(model: nn.Module) -> list[tuple[str, str]]:
    names = list(model.trunks)  # type: ignore[arg-type]
    if names == ["image"]:
        return [("convs", "trunks.image")]
    return [("convs_img", "trunks.image"), ("convs_seg", "trunks.semantics")]


def _coord_trunk(original: str, ours: str) -> Rules:
    here, block = f"{original}.{{i:n+1}}", f"{ours}.blocks.{{i:n}}"
    rules = [
        (f"{original}.0.conv.weight", f"{ours}.first.weight"),
        (f"{original}.0.activation.bias", f"{ours}.first.bias"),
        (f"{here}.skip.conv.{{p}}", f"{block}.skip.{{p}}"),
    ]
    for theirs, name in (("conv1", "conv0"), ("conv2", "conv1")):
        rules.append((f"{here}.{theirs}.conv.conv.weight", f"{block}.{name}.weight"))
        rules.append((f"{here}.{theirs}.activation.bias", f"{block}.{name}.bias"))
    return rules


def _residual_trunk(original: str, ours: str) -> Rules:
    here, block = f"{original}.{{i:n+1}}", f"{ours}.{{i:n}}"
    return [
        (f"{original}.0.0.weight", f"{ours}.0.fromrgb.weight"),
        (f"{original}.0.1.bias", f"{ours}.0.fromrgb.bias"),
        (f"{here}.conv1.0.weight", f"{block}.conv0.weight"),
        (f"{here}.conv1.1.bias", f"{block}.conv0.bias"),
        (f"{here}.conv2.1.weight", f"{block}.conv1.weight"),
        (f"{here}.conv2.2.bias", f"{block}.conv1.bias"),
        (f"{here}.skip.1.weight", f"{block}.skip.weight"),
    ]
