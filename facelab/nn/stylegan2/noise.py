# SPDX-License-Identifier: Apache-2.0
"""The noise of synthesis layers: which map each layer adds.

A map is (H, W), (1, 1, H, W) or (N, 1, H, W) of the layer's resolution; the layer multiplies it by its learned
strength. Maps are named by the path of the layer in its network: ``blocks.8.conv0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from facelab.draws import Draws
from facelab.errors import nearest
from facelab.nn.stylegan2.synthesis import SynthesisLayer

NoiseMode = Literal["const", "random", "none"]
NoiseMaps = Mapping[str, Tensor]


def noise_layers(network: nn.Module) -> dict[str, SynthesisLayer]:
    """Name -> layer of all layers of ``network`` that take noise, in order."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, SynthesisLayer))
    return {name: layer for name, layer in found if layer.noise_strength is not None}


def const_noise(network: nn.Module) -> dict[str, Tensor]:
    """The stored maps (H, W) of all layers, to be kept over a video or optimised in an inversion (clone them)."""
    return {name: layer.stored_noise() for name, layer in noise_layers(network).items()}


def draw_noise(network: nn.Module, batch: int, draws: Draws) -> dict[str, Tensor]:
    """A new map (N, 1, H, W) for each layer, drawn on the layer's device under ``noise/<name of the layer>``."""
    maps = {}
    for name, layer in noise_layers(network).items():
        size = (batch, 1, layer.resolution, layer.resolution)
        maps[name] = draws.normal(f"noise/{name}", size, layer.weight.device).to(layer.weight.dtype)
    return maps


def resolve_noise(
    network: nn.Module, batch: int, mode: NoiseMode, maps: NoiseMaps | None = None, draws: Draws | None = None
) -> dict[str, Tensor]:
    """The map of each layer that adds one.

    Args:
        mode: ``const``: the stored maps; ``random``: drawn from ``draws``; ``none``: no noise.
        maps: given maps by layer; they come before the mode.

    Raises:
        ValueError: an unknown mode, ``random`` without draws, a map for an unknown layer or of another shape.
    """
    if mode == "const":
        resolved = const_noise(network)
    elif mode == "random":
        if draws is None:
            raise ValueError(
                "noise_mode 'random' needs draws: the numbers come from an explicit source; pass Draws(seed)"
            )
        resolved = draw_noise(network, batch, draws)
    elif mode == "none":
        resolved = {}
    else:
        raise ValueError(f"noise_mode: expected 'const', 'random' or 'none', got {mode!r}")
    if maps:
        layers = noise_layers(network)
        for name, value in maps.items():
            resolved[name] = _checked(name, value, layers, batch)
    return resolved


def _checked(name: str, value: Tensor, layers: Mapping[str, SynthesisLayer], batch: int) -> Tensor:
    if name not in layers:
        raise ValueError(f"noise map '{name}': no such layer.{nearest(name, layers)}")
    size = torch.Size((layers[name].resolution,) * 2)
    if value.shape == size or (value.ndim == 4 and value.shape in ((1, 1, *size), (batch, 1, *size))):
        return value
    side = layers[name].resolution
    raise ValueError(
        f"noise map '{name}': expected shape ({side}, {side}) or ({batch}, 1, {side}, {side}), got {tuple(value.shape)}"
    )
