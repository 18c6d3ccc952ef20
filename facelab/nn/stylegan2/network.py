# SPDX-License-Identifier: Apache-2.0
"""The synthesis network of StyleGAN2 and the generator made of mapping and synthesis; EG3D's backbone.

Shapes: N batch, W width of a style code, L number of style codes, R side of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from facelab.draws import Draws
from facelab.nn.stylegan2.layers import FILTER, reset_children
from facelab.nn.stylegan2.mapping import MappingNetwork
from facelab.nn.stylegan2.noise import NoiseMaps, NoiseMode, resolve_noise
from facelab.nn.stylegan2.precision import AS_BUILT, Precision
from facelab.nn.stylegan2.synthesis import Architecture, SynthesisBlock

FusedModulation = bool | Literal["inference_only"]


def is_fused(choice: FusedModulation, training: bool) -> bool:
    """Whether styles are folded into the weights: always, never, or when the module is not in training mode."""
    return not training if choice == "inference_only" else bool(choice)


def block_noise(noise: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The maps of the block at the path ``prefix``, by the names of its layers."""
    return {name.removeprefix(prefix): value for name, value in noise.items() if name.startswith(prefix)}


class SynthesisNetwork(nn.Module):
    """Style codes -> image of ``img_channels`` channels (the planes of EG3D), from 4x4 on, doubling block by block.

    The block of resolution r has ``min(channel_base / r, channel_max)`` channels. Each block takes as many style
    codes as it has convolutions; its RGB layer takes the code after these, which is the next block's first.

    Args:
        img_resolution: R, a power of two, at least 4.
        num_fp16_res: so many of the highest resolutions (never below 8) are marked for half precision.
        conv_clamp: limit of every convolution's output; None: none.
        use_noise: without it the layers have neither noise maps nor strengths.
        resample_filter: taps of the low-pass that goes with every upsampling.
        fused_modconv: see :func:`is_fused`.
        generator: draws the first weights; None: seed 0.

    Raises:
        ValueError: a resolution that is no power of two, an unknown architecture.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
        architecture: Architecture = "skip",
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        fused_modconv: FusedModulation = "inference_only",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise ValueError(f"img_resolution: expected a power of two of at least 4, got {img_resolution}")
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.fused_modconv: FusedModulation = fused_modconv
        log_resolution = int(math.log2(img_resolution))
        fp16_from = max(2 ** (log_resolution + 1 - num_fp16_res), 8)
        self.blocks = nn.ModuleDict()
        channels = 0
        for resolution in (2**level for level in range(2, log_resolution + 1)):
            in_channels, channels = channels, min(channel_base // resolution, channel_max)
            self.blocks[str(resolution)] = SynthesisBlock(
                in_channels,
                channels,
                w_dim,
                resolution,
                img_channels,
                is_last=resolution == img_resolution,
                architecture=architecture,
                use_noise=use_noise,
                activation=activation,
                resample_filter=resample_filter,
                clamp=conv_clamp,
                use_fp16=resolution >= fp16_from,
            )
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @property
    def num_ws(self) -> int:
        """Number of style codes: one for each convolution and one for the last RGB layer."""
        return sum(cast(SynthesisBlock, block).num_conv for block in self.blocks.values()) + 1

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights and stored noise anew."""
        reset_children(self, generator)

    def forward(
        self,
        ws: Tensor,
        *,
        noise_mode: NoiseMode = "const",
        noise_maps: NoiseMaps | None = None,
        draws: Draws | None = None,
        precision: Precision = AS_BUILT,
    ) -> Tensor:
        """ws (N, L, W) -> (N, img_channels, R, R) in full precision.

        Args:
            noise_mode, noise_maps, draws: see :func:`facelab.nn.stylegan2.noise.resolve_noise`.
            precision: see :class:`Precision`.

        Raises:
            ValueError: another shape of ``ws`` or of a noise map.
        """
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.num_ws, self.w_dim):
            raise ValueError(f"ws: expected shape (N, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}")
        noise = resolve_noise(self, ws.shape[0], noise_mode, noise_maps, draws)
        fused = is_fused(self.fused_modconv, self.training)
        x = img = None
        first = 0
        for name, module in self.blocks.items():
            block = cast(SynthesisBlock, module)
            codes = ws[:, first : first + block.num_ws]
            maps = block_noise(noise, f"blocks.{name}.")
            x, img = block(x, img, codes, maps, precision=precision, fused=fused)
            first += block.num_conv
        return cast(Tensor, img)


class StyleGAN2Generator(nn.Module):
    """Mapping and synthesis network: latent code and label -> style codes -> image.

    Args:
        z_dim, c_dim, w_dim: widths of latent code, label and style code.
        mapping_layers: number of layers of the mapping network (2 in EG3D, 8 in StyleGAN2).
        The others are those of :class:`SynthesisNetwork`; ``mapping_options`` go to :class:`MappingNetwork`.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        *,
        mapping_layers: int = 8,
        mapping_options: Mapping[str, object] | None = None,
        generator: torch.Generator | None = None,
        **synthesis_options: object,
    ) -> None:
        super().__init__()
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        self.synthesis = SynthesisNetwork(
            w_dim,
            img_resolution,
            img_channels,
            generator=source,
            **synthesis_options,  # type: ignore[arg-type]
        )
        options = dict(mapping_options or {})
        self.mapping = MappingNetwork(
            z_dim,
            c_dim,
            w_dim,
            self.synthesis.num_ws,
            num_layers=mapping_layers,
            generator=source,
            **options,  # type: ignore[arg-type]
        )

    @property
    def num_ws(self) -> int:
        """Number of style codes of a sample."""
        return self.synthesis.num_ws

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        reset_children(self, generator)

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
        noise_maps: NoiseMaps | None = None,
        draws: Draws | None = None,
        precision: Precision = AS_BUILT,
    ) -> Tensor:
        """z (N, Z), c (N, C) -> (N, img_channels, R, R); the arguments of both networks."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise_mode=noise_mode, noise_maps=noise_maps, draws=draws, precision=precision)
