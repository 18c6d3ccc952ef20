# SPDX-License-Identifier: Apache-2.0
"""The picture decoder behind a volume renderer: StyleGAN2 with skips, from a feature map to the picture.

StyleSDF (arXiv 2112.11427, section 3.2) after StyleGAN2 (arXiv 1912.04958); with a second head for semantics as in
CNeRF (arXiv 2302.01579). Shapes: N batch, V width of the renderer's code, W width of a style code, L number of style
codes, R side of the feature map, S side of the picture, K semantic channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cuda_ops import setup_filter, upsample2d
from facelab.draws import Draws
from facelab.nn.stylegan2.layers import FILTER, FullyConnected, normalize_second_moment, reset_children
from facelab.nn.stylegan2.network import FusedModulation, block_noise, is_fused
from facelab.nn.stylegan2.noise import NoiseMaps, NoiseMode, resolve_noise
from facelab.nn.stylegan2.precision import AS_BUILT, Precision
from facelab.nn.stylegan2.synthesis import SynthesisLayer, ToRGB

COARSE_CHANNELS, COARSE_RESOLUTION = 512, 32  # up to this resolution all have as many channels
RGB = 3


def decoder_channels(resolution: int, multiplier: int = 2, limit: int | None = None) -> int:
    """Channels at a resolution: 512 up to 32, then ``16384 * multiplier / resolution``; at most ``limit``.

    >>> [decoder_channels(r) for r in (32, 64, 128, 1024)]
    [512, 512, 256, 32]
    """
    fine = COARSE_CHANNELS * COARSE_RESOLUTION * multiplier // resolution
    count = COARSE_CHANNELS if resolution <= COARSE_RESOLUTION else max(1, fine)
    return count if limit is None else min(count, limit)


@dataclass(frozen=True)
class SkipDecoderConfig:
    """Shape of a :class:`SkipDecoder`. ValueError for sizes that are no powers of two, or a picture below its features.

    Attributes:
        size: side S of the picture, pixels.
        in_resolution: side R of the feature map.
        in_channels: of the feature map.
        style_dim: width V of the renderer's code.
        latent_dim: width W of the style codes; None: twice ``style_dim``.
        mapping_layers: of the mapping network.
        lr_mapping: its learning rate multiplier.
        channel_multiplier, channel_max: see :func:`decoder_channels`.
        semantic_channels: K; 0: no semantic head.
        half_blocks: so many of the highest resolutions run in half precision on a GPU.
        clamp: limit of every layer's output; None: none. Half precision wants one, 256 is usual.
        fused_modulation: see :func:`facelab.nn.stylegan2.network.is_fused`.
    """

    size: int = 1024
    in_resolution: int = 64
    in_channels: int = 256
    style_dim: int = 256
    latent_dim: int | None = None
    mapping_layers: int = 5
    lr_mapping: float = 0.01
    channel_multiplier: int = 2
    channel_max: int | None = None
    semantic_channels: int = 0
    half_blocks: int = 0
    clamp: float | None = None
    fused_modulation: FusedModulation = "inference_only"

    def __post_init__(self) -> None:
        for name in ("size", "in_resolution"):
            value = getattr(self, name)
            if value < 4 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from 4, got {value}")
        if self.size < self.in_resolution:
            raise ValueError(f"size must be at least in_resolution, got {self.size} below {self.in_resolution}")
        if min(self.in_channels, self.style_dim, self.mapping_layers, self.channel_multiplier) < 1:
            raise ValueError(
                "in_channels, style_dim, mapping_layers and channel_multiplier must be at least 1, got "
                f"{self.in_channels}, {self.style_dim}, {self.mapping_layers}, {self.channel_multiplier}"
            )

    @property
    def width(self) -> int:
        """W."""
        return 2 * self.style_dim if self.latent_dim is None else self.latent_dim

    @property
    def resolutions(self) -> list[int]:
        """Of the blocks, R first."""
        return [self.in_resolution << k for k in range(int(math.log2(self.size // self.in_resolution)) + 1)]

    @property
    def num_ws(self) -> int:
        """L: one for each convolution and one for the last head."""
        return 2 * len(self.resolutions)

    def channels(self, resolution: int) -> int:
        """Channels at a resolution."""
        return decoder_channels(resolution, self.channel_multiplier, self.channel_max)


@dataclass(frozen=True)
class Decoded:
    """What the decoder draws: rgb (N, 3, S, S) in about [-1, 1], semantics (N, K, S, S) raw values or None."""

    rgb: Tensor
    semantics: Tensor | None = None


class ScaledStyles(FullyConnected):
    """Styles times a constant: what an equalised convolution weight would be multiplied by."""

    def __init__(self, in_features: int, out_features: int, gain: float) -> None:
        super().__init__(in_features, out_features, bias_init=1.0)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """(N, W) -> (N, channels)."""
        return super().forward(x) * self.gain


class EqualizedSynthesisLayer(SynthesisLayer):
    """A synthesis layer whose weight is scaled by 1 / sqrt(in * k^2) before the demodulation.

    Demodulation takes the scale away again but for its 1e-8, which counts where styles are small.
    """

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, *, up: int, clamp: float | None
    ) -> None:
        super().__init__(in_channels, out_channels, w_dim, resolution, up=up, clamp=clamp)
        self.affine = ScaledStyles(w_dim, in_channels, 1 / math.sqrt(self.weight[0].numel()))


class DecoderBlock(nn.Module):
    """The layers of one resolution: an upsampling convolution (not in the first block), a plain one, the heads.

    Args:
        up: the block doubles the side of features, picture and semantics.
        half: marked for half precision (see :class:`Precision`).
    """

    def __init__(self, config: SkipDecoderConfig, resolution: int, *, up: bool, half: bool) -> None:
        super().__init__()
        width, clamp, out_channels = config.width, config.clamp, config.channels(resolution)
        in_channels = config.channels(resolution // 2) if up else config.in_channels
        self.lowered = half
        self.conv0 = (
            EqualizedSynthesisLayer(in_channels, out_channels, width, resolution, up=2, clamp=clamp) if up else None
        )
        entering = out_channels if up else in_channels
        self.conv1 = EqualizedSynthesisLayer(entering, out_channels, width, resolution, up=1, clamp=clamp)
        self.to_rgb = ToRGB(out_channels, RGB, width, clamp=clamp)
        labels = config.semantic_channels
        self.to_semantics = ToRGB(out_channels, labels, width, clamp=clamp) if labels else None
        self.register_buffer("taps", setup_filter(list(FILTER), device="cpu"), persistent=False)

    @property
    def num_conv(self) -> int:
        """Number of convolutions; the heads share one more style code."""
        return 1 if self.conv0 is None else 2

    def forward(
        self,
        x: Tensor,
        drawn: Decoded | None,
        ws: Tensor,
        noise: Mapping[str, Tensor],
        precision: Precision,
        fused: bool,
        semantics: Tensor | None = None,
    ) -> tuple[Tensor, Decoded]:
        """Features, what is drawn so far and the style codes (N, num_conv + 1, W) of this block -> the same, one on.

        ``semantics`` (N, K, R, R) is what the first block adds its own semantics to.
        """
        weight = self.conv1.weight
        x = x.to(dtype=precision.dtype_of(self.lowered, weight), memory_format=precision.memory_format)
        codes = ws.unbind(dim=1)
        if self.conv0 is not None:
            x = self.conv0(x, codes[0], noise.get("conv0"), fused=fused)
        x = self.conv1(x, codes[-2], noise.get("conv1"), fused=fused)
        rgb = self.to_rgb(x, codes[-1], fused=fused).to(weight.dtype)
        labels = None
        if self.to_semantics is not None:
            labels = self.to_semantics(x, codes[-1], fused=fused).to(weight.dtype)
        if drawn is None:
            return x, Decoded(rgb, _added(labels, semantics))
        taps = cast(Tensor, self.taps)
        before = None if drawn.semantics is None else upsample2d(drawn.semantics, taps)
        return x, Decoded(rgb + upsample2d(drawn.rgb, taps), _added(labels, before))


class SkipDecoder(nn.Module):
    """Feature map and style codes -> picture (and semantics).

    The picture is the sum of what the heads draw at every resolution; the rendered thumbnail is not added. Semantics
    start from the rendered ones. ``precision`` (a plain attribute, not part of the state) says how it computes.

    Args:
        config: its shape.
        generator: draws the first weights; None: seed 0.
    """

    def __init__(self, config: SkipDecoderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = AS_BUILT
        sizes = (config.style_dim, *[config.width] * config.mapping_layers)
        self.mapping = nn.ModuleList(
            FullyConnected(a, b, activation="lrelu", lr_multiplier=config.lr_mapping)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        half_from = 2 * config.size >> config.half_blocks
        self.blocks = nn.ModuleList(
            DecoderBlock(config, resolution, up=resolution > config.in_resolution, half=resolution >= half_from)
            for resolution in config.resolutions
        )
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @property
    def num_ws(self) -> int:
        """L."""
        return self.config.num_ws

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights and stored noise anew."""
        reset_children(self, generator)

    def style(self, code: Tensor) -> Tensor:
        """The renderer's code (N, V) -> (N, W): normalised, then the mapping network. ValueError for another shape."""
        if code.ndim != 2 or code.shape[1] != self.config.style_dim:
            raise ValueError(f"code: expected shape (N, {self.config.style_dim}), got {tuple(code.shape)}")
        x = normalize_second_moment(code)
        for layer in self.mapping:
            x = layer(x)
        return x

    def broadcast(self, style: Tensor, other: Tensor | None = None, inject: int | None = None) -> Tensor:
        """(N, W) -> the style codes (N, L, W) of all layers.

        Args:
            other: (N, W) of a second picture, whose style the layers from ``inject`` on take (style mixing).
            inject: 1 ... L - 1.

        Raises:
            ValueError: one of ``other`` and ``inject`` without the other, or a layer that is not there.
        """
        count = self.num_ws
        if other is None and inject is None:
            return style[:, None].expand(-1, count, -1)
        if other is None or inject is None or not 1 <= inject < count:
            raise ValueError(f"style mixing needs a second style and a layer from 1 to {count - 1}, got {inject}")
        return torch.cat([style[:, None].expand(-1, inject, -1), other[:, None].expand(-1, count - inject, -1)], dim=1)

    def forward(
        self,
        features: Tensor,
        ws: Tensor,
        semantics: Tensor | None = None,
        *,
        noise_mode: NoiseMode = "const",
        noise_maps: NoiseMaps | None = None,
        draws: Draws | None = None,
    ) -> Decoded:
        """Draw pictures.

        Args:
            features: (N, C, R, R).
            ws: (N, L, W).
            semantics: (N, K, R, R) as rendered, if the decoder has a semantic head.
            noise_mode, noise_maps, draws: see :func:`facelab.nn.stylegan2.noise.resolve_noise`; layers are called
                ``blocks.0.conv1``, ``blocks.1.conv0`` ...

        Raises:
            ValueError: other shapes, semantics without a head or a head without semantics.
        """
        self._check(features, ws, semantics)
        noise = resolve_noise(self, len(ws), noise_mode, noise_maps, draws)
        fused = is_fused(self.config.fused_modulation, self.training)
        x, drawn, first = features, None, 0
        for index, module in enumerate(self.blocks):
            block = cast(DecoderBlock, module)
            codes = ws[:, first : first + block.num_conv + 1]
            maps = block_noise(noise, f"blocks.{index}.")
            x, drawn = block(x, drawn, codes, maps, self.precision, fused, semantics)
            first += block.num_conv
        return cast(Decoded, drawn)

    def _check(self, features: Tensor, ws: Tensor, semantics: Tensor | None) -> None:
        c = self.config
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (c.num_ws, c.width):
            raise ValueError(f"ws: expected shape (N, {c.num_ws}, {c.width}), got {tuple(ws.shape)}")
        wanted = (len(ws), c.in_channels, c.in_resolution, c.in_resolution)
        if tuple(features.shape) != wanted:
            raise ValueError(f"features: expected shape {wanted}, got {tuple(features.shape)}")
        labels = (len(ws), c.semantic_channels, *wanted[2:]) if c.semantic_channels else None
        got = None if semantics is None else tuple(semantics.shape)
        if got != labels:
            raise ValueError(f"semantics: expected {labels or 'none'}, got {got or 'none'}")


def _added(new: Tensor | None, before: Tensor | None) -> Tensor | None:
    return new if new is None or before is None else new + before
