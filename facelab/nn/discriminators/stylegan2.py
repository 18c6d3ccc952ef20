# SPDX-License-Identifier: Apache-2.0
"""EG3D's discriminator: the residual StyleGAN2 network, conditioned on the camera, that may see two pictures.

StyleGAN2 (arXiv 1912.04958, section 4 and appendix B), projection conditioning (arXiv 1802.05637), dual
discrimination (EG3D, arXiv 2112.07945, section 4.3). Shapes: N batch, S image side, R side of the raw picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cuda_ops import downsample2d, setup_filter
from facelab.nn.filtered_resizing import bilinear
from facelab.nn.stylegan2.layers import FILTER, EqualizedConv2d, FullyConnected, reset_children
from facelab.nn.stylegan2.mapping import MappingNetwork
from facelab.nn.stylegan2.precision import AS_BUILT, Precision

LAST_BLOCK = 8  # resolution of the last residual block; the epilogue works at 4 x 4


@dataclass(frozen=True)
class StyleGan2DiscriminatorConfig:
    """Architecture.

    Attributes:
        resolution: side of the judged pictures, a power of two from 8.
        dual: the raw picture, resized, stands beside the image: six channels instead of three.
        label_dim: width of the camera label; 0: not conditioned, the network's one output is the logit.
        channel_base, channel_max: a resolution r has ``min(channel_base / r, channel_max)`` channels.
        architecture: ``resnet``; ``skip``: every block reads the image; ``orig``: plain convolutions.
        clamp: limit of the activations (times a layer's gain), also in full precision; None = none.
        half_blocks: so many of the highest resolutions run in half precision on a GPU.
        group_size: samples that share a minibatch statistic; None: the whole pass.
        group_channels: number of statistics.
        grouping: ``contiguous``: samples 0 .. G-1 form the first group, so that chunks of whole groups give what one
            big batch gives; ``strided``: sample n is in group n mod (N / G), as in the original (a reference switch).
        mapping_layers: of the label.
        freeze_layers: so many of the first layers are not trained (``--freezed``).
    """

    resolution: int = 512
    dual: bool = True
    label_dim: int = 25
    channel_base: int = 32768
    channel_max: int = 512
    architecture: Literal["resnet", "skip", "orig"] = "resnet"
    clamp: float | None = 256.0
    half_blocks: int = 4
    group_size: int | None = 4
    group_channels: int = 1
    grouping: Literal["contiguous", "strided"] = "contiguous"
    mapping_layers: int = 8
    freeze_layers: int = 0

    def __post_init__(self) -> None:
        if self.resolution < LAST_BLOCK or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution must be a power of two from {LAST_BLOCK}, got {self.resolution}")
        if self.architecture not in ("resnet", "skip", "orig"):
            raise ValueError(f"architecture must be resnet, skip or orig, got {self.architecture!r}")
        if self.grouping not in ("contiguous", "strided"):
            raise ValueError(f"grouping must be contiguous or strided, got {self.grouping!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1 or null, got {self.group_size}")

    def channels(self, resolution: int) -> int:
        """Channels at a resolution."""
        return max(1, min(self.channel_base // resolution, self.channel_max))

    @property
    def resolutions(self) -> list[int]:
        """Of the blocks, highest first."""
        return [2**k for k in range(int(math.log2(self.resolution)), int(math.log2(LAST_BLOCK)) - 1, -1)]

    @property
    def freezable(self) -> int:
        """How many layers ``freeze_layers`` can count: all of the blocks, nothing behind them."""
        each, once = {"resnet": (3, 1), "skip": (3, 0), "orig": (2, 1)}[self.architecture]
        return each * len(self.resolutions) + once

    @property
    def image_channels(self) -> int:
        return 6 if self.dual else 3


def minibatch_std(
    x: Tensor,
    group_size: int | None,
    channels: int = 1,
    grouping: Literal["contiguous", "strided"] = "contiguous",
) -> Tensor:
    """Append the standard deviation over groups of samples as constant maps (arXiv 1710.10196, section 3).

    Args:
        x: (N, C, H, W).
        group_size: samples in a group, at most N; None: N.
        channels: number of maps, a divisor of C.
        grouping: see :class:`StyleGan2DiscriminatorConfig`.

    Returns:
        (N, C + channels, H, W).

    Raises:
        ValueError: groups or channels do not divide.
    """
    count, width, height, length = x.shape
    size = count if group_size is None else min(group_size, count)
    if count % size or width % channels:
        raise ValueError(
            f"minibatch statistics: {count} samples in groups of {size}, {width} channels in {channels} parts; "
            "the first must be a multiple of the second"
        )
    shape = (size, count // size) if grouping == "strided" else (count // size, size)
    y = x.reshape(*shape, channels, width // channels, height, length)
    over = 0 if grouping == "strided" else 1
    # spelled out, not var(): R1's second derivatives then cancel exactly in a group, not up to rounding
    y = (y - y.mean(dim=over, keepdim=True)).square().mean(dim=over)
    y = (y + 1e-8).sqrt().mean(dim=(2, 3, 4))  # (groups, channels)
    y = y.repeat(size, 1) if grouping == "strided" else y.repeat_interleave(size, dim=0)
    return torch.cat([x, y[:, :, None, None].expand(-1, -1, height, length)], dim=1)


def dividing_group(count: int, size: int = 4) -> int:
    """Samples in a group where ``size`` need not divide the batch: ``size``, else 3, else 2 (StyleSDF, CNeRF).

    Raises:
        ValueError: none of them divides ``count``.

    >>> [dividing_group(count) for count in (1, 3, 8, 6, 10)]
    [1, 3, 4, 3, 2]
    """
    for group in (min(size, count), 3, 2):
        if count % group == 0:
            return group
    raise ValueError(
        f"minibatch statistics: {count} samples do not divide into groups of {size}, 3 or 2; use another batch size"
    )


class DiscriminatorBlock(nn.Module):
    """One resolution: two convolutions, the second halves the picture."""

    def __init__(self, config: StyleGan2DiscriminatorConfig, resolution: int) -> None:
        super().__init__()
        self.architecture = config.architecture
        first, low = resolution == config.resolution, resolution // 2
        self.half = resolution > config.resolution / 2**config.half_blocks
        here, there, clamp = config.channels(resolution), config.channels(low), config.clamp
        reads = first or config.architecture == "skip"
        self.first = first
        self.fromrgb = (
            EqualizedConv2d(config.image_channels, here, 1, activation="lrelu", clamp=clamp) if reads else None
        )
        self.conv0 = EqualizedConv2d(here, here, 3, activation="lrelu", clamp=clamp)
        self.conv1 = EqualizedConv2d(here, there, 3, activation="lrelu", down=2, clamp=clamp)
        self.skip = EqualizedConv2d(here, there, 1, bias=False, down=2) if config.architecture == "resnet" else None
        self.register_buffer("taps", setup_filter(list(FILTER)), persistent=False)

    def layers(self) -> list[nn.Module]:
        """In the order in which ``freeze_layers`` counts."""
        return [m for m in (self.fromrgb, self.conv0, self.conv1, self.skip) if m is not None]

    def forward(self, x: Tensor | None, image: Tensor | None, precision: Precision) -> tuple[Tensor, Tensor | None]:
        """Features (N, C, r, r) or None in the first block, image (N, 3 or 6, r, r) where it is read -> the same at r/2."""
        dtype = precision.dtype_of(self.half, self.conv0.weight)
        if self.fromrgb is not None:
            assert image is not None
            read = self.fromrgb(image.to(dtype, memory_format=precision.memory_format))
            x = read if x is None else x.to(dtype) + read
            image = (
                downsample2d(image, self.taps, down=2) if self.architecture == "skip" else None  # type: ignore[arg-type]
            )
        assert x is not None
        x = x.to(dtype, memory_format=precision.memory_format)
        if self.skip is None:
            return self.conv1(self.conv0(x)), image
        half = math.sqrt(0.5)
        return self.skip(x, gain=half) + self.conv1(self.conv0(x), gain=half), image


class DiscriminatorEpilogue(nn.Module):
    """4 x 4 features -> logits, always in full precision."""

    def __init__(self, config: StyleGan2DiscriminatorConfig) -> None:
        super().__init__()
        self.group_size, self.group_channels, self.grouping = config.group_size, config.group_channels, config.grouping
        width = config.channels(4)
        self.label_width = width if config.label_dim else 0
        skip = config.architecture == "skip"
        self.fromrgb = EqualizedConv2d(config.image_channels, width, 1, activation="lrelu") if skip else None
        self.conv = EqualizedConv2d(width + config.group_channels, width, 3, activation="lrelu", clamp=config.clamp)
        self.fc = FullyConnected(16 * width, width, activation="lrelu")
        self.out = FullyConnected(width, self.label_width or 1)

    def group(self, count: int) -> int | None:
        """Samples in a group of the statistic in a pass of ``count``."""
        return self.group_size

    def forward(self, x: Tensor, image: Tensor | None, label: Tensor | None) -> Tensor:
        """x (N, C, 4, 4), mapped label (N, C) or None -> (N, 1)."""
        x = x.to(self.conv.weight.dtype, memory_format=torch.contiguous_format)
        if self.fromrgb is not None and image is not None:
            x = x + self.fromrgb(image.to(x.dtype))
        x = minibatch_std(x, self.group(len(x)), self.group_channels, self.grouping)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        return x if label is None else (x * label).sum(dim=1, keepdim=True) / math.sqrt(self.label_width)


class StyleGan2Discriminator(nn.Module):
    """Picture, raw picture and camera label -> logit, high for real.

    Args:
        config: the architecture.
        generator: draws the first weights; None: seed 0.
    """

    def __init__(self, config: StyleGan2DiscriminatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision = AS_BUILT
        width = config.channels(4)
        self.blocks = nn.ModuleDict({str(r): DiscriminatorBlock(config, r) for r in config.resolutions})
        self.mapping = (
            MappingNetwork(0, config.label_dim, width, None, num_layers=config.mapping_layers)
            if config.label_dim
            else None
        )
        self.epilogue = DiscriminatorEpilogue(config)
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))
        layers = [layer for block in self.blocks.values() for layer in block.layers()]  # type: ignore[operator]
        for layer in layers[: config.freeze_layers]:
            layer.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        reset_children(self, generator)

    def combine(self, image: Tensor, raw: Tensor | None, raw_weight: float = 1.0) -> Tensor:
        """What the network sees: (N, 3, S, S), or with the resized raw picture (N, 6, S, S)."""
        if not self.config.dual:
            return image
        if raw is None:
            raise ValueError("a dual discriminator judges the image and the raw picture: raw is missing")
        return torch.cat([image, raw_weight * bilinear(raw, image.shape[-1]).to(image.dtype)], dim=1)

    def forward(
        self, image: Tensor, raw: Tensor | None = None, label: Tensor | None = None, raw_weight: float = 1.0
    ) -> Tensor:
        """Judge pictures.

        Args:
            image: (N, 3, S, S) in about [-1, 1].
            raw: (N, 3, R, R), the rendering before super-resolution; not looked at unless ``dual``.
            label: (N, label_dim) cameras.
            raw_weight: factor on the raw picture (fades the second picture out; 1 in EG3D).

        Returns:
            (N, 1) logits in full precision.

        Raises:
            ValueError: pictures of another size, a missing raw picture or label.
        """
        size = self.config.resolution
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            raise ValueError(f"expected (N, 3, {size}, {size}) pictures, got {tuple(image.shape)}")
        if self.mapping is not None and label is None:
            raise ValueError(
                f"this discriminator judges pictures with their camera: expected label (N, {self.config.label_dim})"
            )
        with torch.autocast(image.device.type, enabled=False):
            seen: Tensor | None = self.combine(image, raw, raw_weight)
            x: Tensor | None = None
            for block in self.blocks.values():
                x, seen = block(x, seen, self.precision)
            assert x is not None
            mapped = self.mapping(None, label) if self.mapping is not None else None
            return self.epilogue(x, seen, mapped)
