# SPDX-License-Identifier: Apache-2.0
"""The authors' generators, with or without a decoder: their names and shapes <-> ours, and the architecture from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from facelab.bases.stylesdf.full_model import FullGenerator, FullGeneratorConfig
from facelab.bases.stylesdf.keys import count_of, decoder_dropped, decoder_rules, from_original, to_original
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.originals import volume_config_from_original, volume_rules
from facelab.checkpoints.key_map import KeyMap
from facelab.errors import UserError
from facelab.nn.skip_decoder import COARSE_CHANNELS, COARSE_RESOLUTION, SkipDecoderConfig

DECODER = "decoder."
AVERAGES = ("average_w", "average_style")  # ours alone: the original computes them at each start
MAX_SIZE, MAX_LEVELS = 4096, 10  # of pictures
MULTIPLIERS = (1, 2, 4, 8)


def generator_keys() -> KeyMap:
    """Names of a whole generator; constants of the decoder are dropped."""
    return KeyMap([*volume_rules(), *decoder_rules(DECODER)], decoder_dropped(DECODER))


def generator_from_original(
    state: Mapping[str, Tensor], generator: SdfGenerator, what: str = "the generator"
) -> dict[str, Tensor]:
    """A state dict of the authors' generator -> the weights of ours, strictly; the stored averages stay ours.

    Raises:
        UserError: unknown or missing keys (named, with the nearest ones), another shape or another filter.
    """
    ours = generator.state_dict()
    expected = {key: value for key, value in ours.items() if key not in AVERAGES}
    renamed = from_original(state, generator_keys(), expected, what)
    return {**renamed, **{key: ours[key] for key in AVERAGES if key in ours}}


def generator_to_original(generator: SdfGenerator) -> dict[str, Tensor]:
    """Our weights under the authors' names and shapes, the decoder's constants included."""
    state = {key: value for key, value in generator.state_dict().items() if key not in AVERAGES}
    return to_original(state, generator_keys())


def has_decoder(state: Mapping[str, object]) -> bool:
    """Whether a state dict is that of a whole generator."""
    return any(key.startswith(DECODER) for key in state)


def build_generator(config: SdfGeneratorConfig, generator: torch.Generator | None = None) -> SdfGenerator:
    """The generator of a configuration, with a decoder if that has one; ``generator`` draws the first weights."""
    if isinstance(config, FullGeneratorConfig):
        return FullGenerator(config, generator)
    return SdfGenerator(config, generator)


def generator_config_from_original(
    state: Mapping[str, Tensor],
    *,
    dist_radius: float | None = 0.12,
    offset_sampling: bool = True,
    lr_mapping: float = 0.01,
    channel_multiplier: int | None = None,
    double_truncation: bool = False,
    what: str = "the generator",
) -> SdfGeneratorConfig:
    """Architecture from names and shapes: a :class:`FullGeneratorConfig` if there are tensors of a decoder.

    Args:
        dist_radius, offset_sampling, lr_mapping: what shapes do not show; the defaults are those of all released files.
        channel_multiplier: None: by the shapes (2 for pictures of up to 32 pixels, where it changes nothing).
        double_truncation: see :class:`FullGeneratorConfig`.

    Raises:
        UserError: no generator of StyleSDF, or one whose sizes do not belong together.
    """
    try:
        volume = volume_config_from_original(state, dist_radius=dist_radius, offset_sampling=offset_sampling)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if not has_decoder(state):
        return volume
    try:
        decoder = _decoder_config(state, volume, lr_mapping, channel_multiplier)
        return FullGeneratorConfig(
            volume.field,
            volume.latent_dim,
            volume.mapping_layers,
            volume.sampling,
            decoder=decoder,
            double_truncation=double_truncation,
        )
    except KeyError as error:
        raise UserError(f"{what}: no tensor {error}, which every StyleSDF decoder has; check the file") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{what}: the sizes of its decoder do not belong together ({error}); check the file") from error


def _decoder_config(
    state: Mapping[str, Tensor], volume: SdfGeneratorConfig, lr_mapping: float, multiplier: int | None
) -> SkipDecoderConfig:
    side = state[f"{DECODER}noises.noise_0"].shape[-1]
    levels = count_of(state, f"{DECODER}to_rgbs.")
    if side < 1 or levels > MAX_LEVELS or side << levels > MAX_SIZE:
        raise ValueError(f"{levels} levels from {side} pixels on, expected pictures of at most {MAX_SIZE}")
    size = side << levels
    latent_dim, style_dim = state[f"{DECODER}style.1.weight"].shape
    head = state[f"{DECODER}to_rgbs.{levels - 1}.conv.weight" if levels else f"{DECODER}to_rgb1.conv.weight"]
    first = state[f"{DECODER}conv1.conv.weight"]
    if style_dim != volume.field.style_dim or head.ndim != 5 or first.ndim != 5:
        raise ValueError(f"codes of {style_dim} for a field with {volume.field.style_dim}, or weights without 5 axes")
    found, limit = _channels(size, head.shape[2])
    return SkipDecoderConfig(
        size=size,
        in_resolution=side,
        in_channels=first.shape[2],
        style_dim=style_dim,
        latent_dim=None if latent_dim == 2 * style_dim else latent_dim,
        mapping_layers=count_of(state, f"{DECODER}style."),
        lr_mapping=lr_mapping,
        channel_multiplier=found if multiplier is None else multiplier,
        channel_max=limit,
    )


def _channels(size: int, channels: int) -> tuple[int, int | None]:
    """The multiplier that the channels of the last level show, and the limit if they are fewer than the table's."""
    if size <= COARSE_RESOLUTION:
        return 2, None if channels == COARSE_CHANNELS else channels
    for multiplier in MULTIPLIERS:
        if channels * size == COARSE_CHANNELS * COARSE_RESOLUTION * multiplier:
            return multiplier, None
    return 2, channels
