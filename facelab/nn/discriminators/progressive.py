# SPDX-License-Identifier: Apache-2.0
"""The discriminators of pi-GAN (arXiv 2012.00926, supplement) and FENeRF (arXiv 2111.15490), one class.

A chain of residual blocks halves the image down to 2 x 2, where one convolution gives the head. An
image of a smaller size enters the chain later, through a 1x1 adapter of its own, so one network
serves all sizes of a curriculum. After a change of size the new first block is faded in.

Shapes: N batch, C image channels, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.errors import nearest
from facelab.nn.layers import LEAK, Conv2d, CoordConv2d, Initialisation, coordinate_channels

BLOCKS = ("coord_strided", "strided", "coord_pool")
STRIDED_CHANNELS = (32, 64, 128, 256, 400, 400, 400, 400)
POOLED_CHANNELS = (16, 32, 64, 128, 256, 400, 400, 400, 400)
SLIM_CHANNELS = (16, 24, 32, 48, 64, 64, 64)
FINAL_SIZE = 2
INVERSE_SQRT2 = 1 / math.sqrt(2)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of a :class:`ProgressiveDiscriminator`. ValueError for contradictory settings.

    Every block halves the image and the last one leaves 2 x 2, so n + 1 channel counts give n blocks
    and the sizes 2, 4, ..., 2 * 2**n.

    Attributes:
        in_channels: image channels C (3 for RGB, 21 for 18 labels + RGB).
        channels: feature channels before the first and after each block; empty = the published ones
            of the block kind: 32-64-128-256-400-400-400-400 (up to 256 px), coord_pool
            16-32-64-128-256-400-400-400-400 (up to 512 px).
        block: ``coord_strided`` (two CoordConvs, the second with stride 2; "CCS"), ``strided`` (the
            same with plain convolutions), ``coord_pool`` (two CoordConvs, then 2x2 mean; "progressive").
        latents: name -> size of the latent codes that the head guesses, in the order of its channels.
        pose: whether the head guesses (pitch, yaw).
        initialisation: ``kaiming`` (block convolutions Kaiming normal) or ``default`` (PyTorch's rule
            everywhere); empty = as published: kaiming for the strided kinds, default for coord_pool.
        channels_last: memory layout of weights and activations; changes speed, not results.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = ()
    block: str = "coord_strided"
    latents: dict[str, int] = field(default_factory=dict)
    pose: bool = False
    initialisation: str = ""
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(
                f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}.{nearest(self.block, BLOCKS)}"
            )
        published = POOLED_CHANNELS if self.block == "coord_pool" else STRIDED_CHANNELS
        object.__setattr__(self, "channels", tuple(self.channels) or published)
        object.__setattr__(self, "latents", dict(self.latents))
        rule = self.initialisation or ("default" if self.block == "coord_pool" else "kaiming")
        object.__setattr__(self, "initialisation", rule)
        if rule not in get_args(Initialisation):
            raise ValueError(f"initialisation must be default or kaiming, got {rule!r}")
        if {"realness", "pose"} & set(self.latents):
            raise ValueError(f"the names realness and pose are taken, got the latents {list(self.latents)}")
        if len(self.channels) < 2 or min(*self.channels, self.in_channels, *self.latents.values()) < 1:
            raise ValueError(
                "a discriminator needs at least two channel counts (one block) and positive sizes, got "
                f"channels={self.channels}, in_channels={self.in_channels}, latents={self.latents}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Image sides the network accepts, ascending."""
        return tuple(FINAL_SIZE * 2**i for i in range(len(self.channels)))

    @property
    def head_layout(self) -> dict[str, int]:
        """Output name -> number of channels, in the order of the head's channels."""
        return {"realness": 1, **self.latents, **({"pose": 2} if self.pose else {})}

    def start(self, size: int) -> int:
        """Index of the first block that an image of this side runs through. ValueError for another size."""
        if size not in self.sizes:
            raise ValueError(f"a {size} px image does not fit this discriminator; it takes {list(self.sizes)} px")
        return len(self.sizes) - 1 - self.sizes.index(size)


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What a discriminator says of N images.

    Attributes:
        realness: (N, 1) logits, high for real.
        latents: name -> (N, size) guesses of the codes behind the image.
        pose: (N, 2) guess of (pitch, yaw) in radians, or None where the head has none.
    """

    realness: Tensor
    latents: Mapping[str, Tensor]
    pose: Tensor | None = None


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip, halving the image: (main + skip) / sqrt(2)."""

    coordinates: Tensor

    def __init__(self, kind: str, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        conv = Conv2d if kind == "strided" else CoordConv2d
        self.pooled = kind == "coord_pool"
        self.conv0 = conv(in_channels, out_channels, 3, padding=1)
        self.conv1 = conv(out_channels, out_channels, 3, stride=1 if self.pooled else 2, padding=1)
        identity = self.pooled and in_channels == out_channels
        self.skip = None if identity else Conv2d(in_channels, out_channels, 1, stride=1 if self.pooled else 2)
        # A block always sees the same size, whatever the size of the image, so its coordinates are
        # constant. Not part of the state dict: they follow from the architecture.
        coordinates = torch.empty(0) if kind == "strided" else coordinate_channels(size, size)
        self.register_buffer("coordinates", coordinates, persistent=False)

    def reset(self, generator: torch.Generator, initialisation: Initialisation) -> None:
        """Draw the weights; ``initialisation`` is for the two convolutions, the skip has PyTorch's default."""
        self.conv0.reset(generator, initialisation)
        self.conv1.reset(generator, initialisation)
        if self.skip is not None:
            self.skip.reset(generator)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, size, size) -> (N, out, size / 2, size / 2)."""
        # In-place operations only on fresh results whose values no backward pass needs.
        main = F.leaky_relu_(self._convolve(self.conv0, x), LEAK)
        main = F.leaky_relu_(self._convolve(self.conv1, main), LEAK)
        if self.pooled:
            main, x = F.avg_pool2d(main, 2), F.avg_pool2d(x, 2)  # the 1x1 skip commutes with the mean
        skip = x if self.skip is None else self.skip(x)
        return skip.add_(main).mul_(INVERSE_SQRT2)

    def _convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(x, self.coordinates) if isinstance(conv, CoordConv2d) else conv(x)


class ProgressiveDiscriminator(nn.Module):
    """Progressive discriminator of pi-GAN and FENeRF.

    Args:
        config: its shape.
        generator: source of the first weights; None = a fresh CPU generator with seed 0.

    >>> model = ProgressiveDiscriminator(DiscriminatorConfig(channels=(4, 8, 8), latents={"z": 5}, pose=True))
    >>> output = model(torch.zeros(3, 3, 8, 8), alpha=0.5)
    >>> output.realness.shape, output.latents["z"].shape, output.pose.shape
    (torch.Size([3, 1]), torch.Size([3, 5]), torch.Size([3, 2]))
    """

    def __init__(self, config: DiscriminatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        channels, sizes = config.channels, config.sizes
        self.blocks = nn.ModuleList(
            ResidualBlock(config.block, inner, outer, size)
            for inner, outer, size in zip(channels[:-1], channels[1:], reversed(sizes), strict=False)
        )
        self.adapters = nn.ModuleList(Conv2d(config.in_channels, count, 1) for count in channels)
        self.head = Conv2d(channels[-1], sum(config.head_layout.values()), FINAL_SIZE)
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))
        if config.channels_last:
            self.to(memory_format=torch.channels_last)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights from ``generator`` by the rule of the configuration."""
        for block in self.blocks:
            cast(ResidualBlock, block).reset(generator, self.config.initialisation)
        for layer in (*self.adapters, self.head):
            cast(Conv2d, layer).reset(generator)

    def forward(self, image: Tensor, alpha: float | Tensor = 1.0) -> DiscriminatorOutput:
        """Judge images.

        Args:
            image: (N, C, S, S), values in [-1, 1].
            alpha: weight in [0, 1] of the first block that is run; the rest comes from the image at
                half size. A number, or a 0-d tensor on the device of the image (a tensor whose
                value changes does not make a compiled network compile again). Sizes 2 and 4 have
                nothing to fade.

        Raises:
            ValueError: another number of channels, an image that is not square, or a size that this
                network does not take.
        """
        self._check(image, alpha)
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        start = self.config.start(image.shape[-1])
        x = self._adapt(start, image)
        for index in range(start, len(self.blocks)):
            if index == start + 1 and (isinstance(alpha, Tensor) or alpha != 1):
                # Nearest-neighbour half size is every other pixel.
                x = alpha * x + (1 - alpha) * self._adapt(index, image[..., ::2, ::2])
            x = self.blocks[index](x)
        parts = self.head(x).flatten(1).split(list(self.config.head_layout.values()), dim=1)
        named = dict(zip(self.config.head_layout, parts, strict=True))
        return DiscriminatorOutput(
            realness=named["realness"],
            latents={name: named[name] for name in self.config.latents},
            pose=named.get("pose"),
        )

    def _adapt(self, index: int, image: Tensor) -> Tensor:
        return F.leaky_relu_(self.adapters[index](image), LEAK)

    def _check(self, image: Tensor, alpha: float | Tensor) -> None:
        channels = self.config.in_channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] != image.shape[3]:
            raise ValueError(
                f"expected square images (N, {channels}, S, S) with S in {list(self.config.sizes)}, "
                f"got shape {tuple(image.shape)}"
            )
        if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a weight between 0 and 1, got {alpha}")
