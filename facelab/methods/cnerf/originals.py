# SPDX-License-Identifier: Apache-2.0
"""The authors' generator: names and shapes of its tensors <-> ours, and its architecture from them.

    renderer.network.2.shape_linears.1.gamma.weight    <-> field_net.regions.layers.1.frequency.weight, entry 2
    renderer.network.2.texture_linears.0.bias          <-> field_net.regions.layers.<D>.bias, entry 2
    renderer.init_network.sdf_linear.weight            <-> field_net.base.sdf.weight, entry 0
    style.0.weight, renderer.sigmoid_beta              <-> mapping.linears.0.weight, field_net.beta
    feature_transfer.0.weight, decoder....             <-> transfer.weight, decoder.... (bases/stylesdf/keys.py)

The tensors of all regions are stacked. In between, the entries of a stack are called ``<our name>@<region>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from facelab.bases.stylesdf.keys import Rules, count_of, decoder_dropped, decoder_rules, from_original, to_original
from facelab.checkpoints.key_map import KeyMap
from facelab.errors import UserError
from facelab.methods.cnerf.field import CNerfFieldConfig
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.nn.skip_decoder import SkipDecoderConfig, decoder_channels

NETWORKS = (("renderer.network.{k:n}", "field_net.regions"), ("renderer.init_network", "field_net.base"))
HEADS = (("mask_linears", "mask"), ("sdf_linear", "sdf"), ("feature_linear", "feature"), ("rgb_linear", "rgb"))
FILM = (("gamma.{p}", "frequency.{p}"), ("beta.{p}", "phase.{p}"), ("{p}", "{p}"))
_STACKED = re.compile(r"field_net\.(?:regions|base)\.")
MAX_SIZE, MAX_DOUBLINGS = 4096, 8
_AVERAGES = ("average_w", "average_style")


def generator_rules(depth: int) -> Rules:
    """Names of a whole generator with ``depth`` shape layers."""
    rules: Rules = [
        ("style.{i:n}.{p}", "mapping.linears.{i:n}.{p}"),
        ("renderer.sigmoid_beta", "field_net.beta"),
        ("feature_transfer.0.weight", "transfer.weight"),
        ("feature_transfer.1.bias", "transfer.bias"),
    ]
    for theirs, ours in NETWORKS:
        entry = "@{k:n}" if "{k" in theirs else "@0"
        # texture first: on the way back its numbers begin at depth, those of shape at 0
        for layers, place in (("texture_linears", f"{{i:n+{depth}}}"), ("shape_linears", "{i:n}")):
            rules += [(f"{theirs}.{layers}.{{i:n}}.{a}", f"{ours}.layers.{place}.{b}{entry}") for a, b in FILM]
        rules += [(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}{entry}") for a, b in HEADS]
    return rules + decoder_rules()


def generator_keys(depth: int) -> KeyMap:
    """The map of :func:`generator_rules`; constants of the decoder are dropped."""
    return KeyMap(generator_rules(depth), decoder_dropped())


def generator_from_original(
    state: Mapping[str, Tensor], generator: CNerfGenerator, what: str = "the generator"
) -> dict[str, Tensor]:
    """A state dict of the authors' generator -> the weights of ours, strictly; the averages stay ours.

    Raises:
        UserError: unknown or missing keys (named, with the nearest ones), another shape or another filter.
    """
    ours = generator.state_dict()
    expected = _apart({key: value for key, value in ours.items() if key not in _AVERAGES})
    renamed = from_original(state, generator_keys(generator.config.field.depth), expected, what)
    averages = {key: ours[key] for key in _AVERAGES if key in ours}
    return {**_together(renamed), **averages}


def generator_to_original(generator: CNerfGenerator, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Our weights under the authors' names and shapes, the decoder's constants included.

    Args:
        values: what to rename instead of the weights, by our names (gradients, for example).
    """
    state = generator.state_dict() if values is None else values
    kept = {key: value for key, value in state.items() if key not in _AVERAGES}
    return to_original(_apart(kept), generator_keys(generator.config.field.depth))


def generator_config_from_original(state: Mapping[str, Tensor], what: str = "the generator") -> CNerfGeneratorConfig:
    """The architecture that names and shapes show; what they do not show takes the released model's values.

    UserError if tensors that decide it are missing.
    """

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != axes:
            raise UserError(
                f"{what} has no tensor '{key}' of {axes} axes, as every CNeRF generator has; check the file"
            )
        return tuple(state[key].shape)

    first = "renderer.network.0."
    width, style_dim = shape(f"{first}shape_linears.0.gamma.weight", 2)
    regions, depth = count_of(state, "renderer.network."), count_of(state, f"{first}shape_linears.")
    sizes = {"width": width, "style_dim": style_dim, "regions": regions, "depth": depth}
    decoder: dict[str, int | None] = {}
    if any(key.startswith("decoder.") for key in state):
        side, doublings = shape("decoder.noises.noise_0", 4)[-1], count_of(state, "decoder.to_rgbs.")
        latent_dim = shape("decoder.style.1.weight", 2)[0]
        if doublings > MAX_DOUBLINGS:
            raise UserError(f"{what}: its decoder doubles the picture {doublings} times; check the file")
        decoder = {
            "size": side << doublings,
            "in_resolution": side,
            "in_channels": shape("decoder.conv1.conv.weight", 5)[2],
            "latent_dim": None if latent_dim == 2 * style_dim else latent_dim,
            "mapping_layers": count_of(state, "decoder.style."),
            "semantic_channels": shape("decoder.to_seg1.bias", 4)[1],
        }
        last = f"to_rgbs.{doublings - 1}" if doublings else "to_rgb1"
        channels = shape(f"decoder.{last}.conv.weight", 5)[2]
        decoder["channel_multiplier"] = _multiplier(side << doublings, channels, what)
    large = [f"{name} {size}" for name, size in {**sizes, **decoder}.items() if size is not None and size > MAX_SIZE]
    if large:
        raise UserError(f"{what}: {', '.join(large)} is larger than any CNeRF model; check the file")
    try:
        field = CNerfFieldConfig(regions, depth, width, style_dim)
        tail = SkipDecoderConfig(style_dim=style_dim, **decoder) if decoder else None  # type: ignore[arg-type]
        return CNerfGeneratorConfig(field, count_of(state, "style."), decoder=tail)
    except ValueError as error:
        raise UserError(f"{what}: {error}; check the file") from error


def _multiplier(size: int, channels: int, what: str) -> int:
    """The channel multiplier with which the last block of a decoder has so many channels."""
    found = [m for m in (2, 1, 4, 8) if decoder_channels(size, m) == channels]  # up to 32 px it changes nothing
    if not found:
        raise UserError(f"{what}: {channels} channels at {size} pixels belong to no decoder of CNeRF; check the file")
    return found[0]


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of regions -> one tensor for each."""
    parts: dict[str, Tensor] = {}
    for key, value in state.items():
        if _STACKED.match(key):
            parts |= {f"{key}@{k}": entry for k, entry in enumerate(value)}
        else:
            parts[key] = value
    return parts


def _together(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_apart`."""
    whole: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name, mark, region = key.partition("@")
        if mark:
            stacks.setdefault(name, {})[int(region)] = value
        else:
            whole[key] = value
    for name, entries in stacks.items():
        whole[name] = torch.stack([entries[k] for k in sorted(entries)])
    return whole
