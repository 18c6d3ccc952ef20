# SPDX-License-Identifier: Apache-2.0
"""Sizes that an official EG3D pickle states, against the shapes of its tensors.

Everything here looks at shapes only, so that a file which claims a huge network is refused before one is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from facelab.bases.eg3d.model import TriPlaneGeneratorConfig
from facelab.errors import UserError
from facelab.nn.discriminators.stylegan2 import StyleGan2DiscriminatorConfig
from facelab.nn.stylegan2 import KINDS

MAX_LAYERS = 64


def style_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the style codes that the super-resolution takes; None without one."""
    weight = state.get("superresolution.block0.conv0.affine.weight")
    return None if weight is None or weight.ndim != 2 else weight.shape[1]


def check_generator_sizes(
    where: str,
    state: Mapping[str, Tensor],
    config: TriPlaneGeneratorConfig,
    kwargs: Mapping[str, Any],
    with_picture: bool = True,
) -> None:
    """Raise a UserError for the first size that the arguments state and the tensors do not have.

    Args:
        where: file and network, for the message.
        state: original keys.
        config: architecture by the arguments.
        kwargs: constructor arguments.
        with_picture: whether the super-resolution is looked at.
    """
    check = _Check(where, state)
    w, c = config.w_dim, config.c_dim
    sizes = {"z_dim": config.z_dim, "c_dim": c, "w_dim": w, "num_layers": config.mapping_layers,
             "channel_base": config.channel_base, "channel_max": config.channel_max}  # fmt: skip
    for name, value in sizes.items():
        if type(value) is not int or value < (0 if name in ("z_dim", "c_dim") else 1):
            raise UserError(f"{where}: {name} should be a number of channels or layers, got {value!r:.40}")
    count = check.count(
        r"backbone\.mapping\.fc(\d+)\.weight", "num_layers of the mapping network", config.mapping_layers
    )
    mapped = w if c else 0
    check.shape("z_dim and w_dim", "backbone.mapping.fc0.weight", (w, config.z_dim + mapped))
    for layer in range(1, count):
        check.shape("w_dim", f"backbone.mapping.fc{layer}.weight", (w, w))
    check.shape("w_dim", "backbone.mapping.w_avg", (w,))
    if c:
        check.shape("c_dim", "backbone.mapping.embed.weight", (w, c))
    elif "backbone.mapping.embed.weight" in state:
        raise UserError(
            f"{where}: c_dim is 0, but the mapping network embeds a label; the file does not fit its arguments"
        )
    _check_backbone(check, config)
    field = config.field
    check.shape("decoder", "decoder.net.0.weight", (field.hidden, field.inputs))
    check.shape("decoder", "decoder.net.2.weight", (1 + field.features, field.hidden))
    if with_picture and config.superresolution is not None:
        _check_superresolution(check, config, kwargs)


def _check_backbone(check: _Check, config: TriPlaneGeneratorConfig) -> None:
    found = re.compile(r"backbone\.synthesis\.b(\d{1,5})\.conv1\.weight")
    resolutions = sorted(int(m[1]) for key in check.state if (m := found.fullmatch(key)))
    if not resolutions or resolutions != [4 << k for k in range(len(resolutions))]:
        raise UserError(
            f"{check.where}: expected blocks of 4, 8, 16 ... pixels, got {resolutions[:12]}; check the file"
        )
    for side in resolutions:
        channels = min(config.channel_base // side, config.channel_max)
        if channels < 1:
            raise UserError(f"{check.where}: channel_base {config.channel_base} leaves no channels at {side} pixels")
        block = f"backbone.synthesis.b{side}"
        check.shape("channel_base and channel_max", f"{block}.conv1.weight", (channels, channels, 3, 3))
        check.shape("the planes' channels", f"{block}.torgb.weight", (3 * config.field.channels, channels, 1, 1))
        check.shape("w_dim", f"{block}.conv1.affine.weight", (channels, config.w_dim))


def _check_superresolution(check: _Check, config: TriPlaneGeneratorConfig, kwargs: Mapping[str, Any]) -> None:
    assert config.superresolution is not None
    kind = KINDS[config.superresolution]
    side = kind.output_resolution
    stated = kwargs.get("img_resolution", side)
    if stated != side:
        raise UserError(
            f"{check.where}: img_resolution is {stated!r:.20}, but super-resolution {config.superresolution} makes {side} px"
        )
    what = f"superresolution_module ({config.superresolution})"
    inner = config.field.features
    for block, channels in enumerate(kind.channels):
        size = side // 2 if block == 0 else side
        prefix = f"superresolution.block{block}"
        check.shape(what, f"{prefix}.conv0.weight", (channels, inner, 3, 3))
        check.shape(what, f"{prefix}.conv0.affine.weight", (inner, config.w_dim))
        check.shape(what, f"{prefix}.conv1.noise_const", (size, size))
        inner = channels


def check_discriminator_sizes(where: str, state: Mapping[str, Tensor], config: StyleGan2DiscriminatorConfig) -> None:
    """The same for a discriminator."""
    check = _Check(where, state)
    for name in ("channel_base", "channel_max"):
        if getattr(config, name) < 1:
            raise UserError(f"{where}: {name} should be at least 1, got {getattr(config, name)}")
    for side in config.resolutions:
        if side > 1 << 14:
            raise UserError(f"{where}: img_resolution {side} is not supported")
        channels = config.channels(side)
        check.shape("channel_base and channel_max", f"b{side}.conv0.weight", (channels, channels, 3, 3))
    first = config.resolutions[0]
    check.shape("class", f"b{first}.fromrgb.weight", (config.channels(first), config.image_channels, 1, 1))
    last = config.channels(4)
    check.shape("mbstd_num_channels", "b4.conv.weight", (last, last + config.group_channels, 3, 3))
    if config.label_dim:
        check.shape("c_dim", "mapping.embed.weight", (last, config.label_dim))
        check.count(r"mapping\.fc(\d+)\.weight", "num_layers of the mapping network", config.mapping_layers)


class _Check:
    """Comparison of one network."""

    def __init__(self, where: str, state: Mapping[str, Tensor]) -> None:
        self.where, self.state = where, state

    def shape(self, what: str, key: str, expected: tuple[int, ...]) -> None:
        """UserError unless ``key`` is there with this shape."""
        tensor = self.state.get(key)
        got = "none" if tensor is None else str(tuple(tensor.shape))
        if tensor is None or tuple(tensor.shape) != expected:
            raise UserError(
                f"{self.where}: by its arguments ({what}) '{key}' should have shape {expected}, got {got}; "
                "the file does not fit its arguments"
            )

    def count(self, pattern: str, what: str, expected: int) -> int:
        """The number of keys that match; UserError unless it is the expected one."""
        found = sum(re.fullmatch(pattern, key) is not None for key in self.state)
        if found != expected or found > MAX_LAYERS:
            raise UserError(
                f"{self.where}: {what} is {expected!r:.20}, the file has {found}; it does not fit its arguments"
            )
        return found
