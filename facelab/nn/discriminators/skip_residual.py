# SPDX-License-Identifier: Apache-2.0
"""The discriminators of whole pictures: StyleGAN2's residual network (arXiv 1912.04958), for RGB or RGB and semantics.

StyleSDF (arXiv 2112.11427) judges pictures; CNeRF (arXiv 2302.01579) adds a second trunk for the semantic map and sums
both before the last layers. Shapes: N batch, S picture side, K semantic channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from facelab.nn.discriminators.stylegan2 import (
    DiscriminatorBlock,
    DiscriminatorEpilogue,
    StyleGan2DiscriminatorConfig,
    dividing_group,
)
from facelab.nn.skip_decoder import RGB, decoder_channels
from facelab.nn.stylegan2.layers import reset_children
from facelab.nn.stylegan2.precision import AS_BUILT, Precision

Grouping = Literal["contiguous", "strided"]


@dataclass(frozen=True, kw_only=True)
class ResidualDiscriminatorConfig:
    """Shape of a :class:`ResidualDiscriminator`. ValueError unless ``resolution`` is a power of two from 8.

    Attributes:
        resolution: side S of the judged pictures.
        semantic_channels: K; 0: pictures only.
        channel_multiplier, channel_max: see :func:`facelab.nn.skip_decoder.decoder_channels`.
        group_size: samples that share a minibatch statistic; where it does not divide the batch, 3 or 2.
        grouping: ``contiguous``: neighbours form a group, so that chunks of whole groups give what one big batch
            gives; ``strided``: sample n is in group n mod (N / G), as in the originals (a reference switch).
        clamp: limit of every layer's output; None: none.
        half_blocks: so many of the highest resolutions run in half precision on a GPU.
    """

    resolution: int = 1024
    semantic_channels: int = 0
    channel_multiplier: int = 2
    channel_max: int | None = None
    group_size: int = 4
    grouping: Grouping = "contiguous"
    clamp: float | None = None
    half_blocks: int = 0

    def __post_init__(self) -> None:
        self.trunk(RGB)  # checks the rest
        if self.semantic_channels < 0 or self.channel_multiplier < 1:
            raise ValueError(
                "semantic_channels must not be negative and channel_multiplier at least 1, got "
                f"{self.semantic_channels} and {self.channel_multiplier}"
            )

    @property
    def inputs(self) -> dict[str, int]:
        """Trunk -> channels it reads."""
        return {"image": RGB, **({"semantics": self.semantic_channels} if self.semantic_channels else {})}

    def trunk(self, read: int) -> TrunkConfig:
        """What the blocks of a trunk, and the last layers, need to know."""
        return TrunkConfig(
            resolution=self.resolution,
            dual=False,
            label_dim=0,
            clamp=self.clamp,
            half_blocks=self.half_blocks,
            group_size=self.group_size,
            grouping=self.grouping,
            read=read,
            multiplier=self.channel_multiplier,
            limit=self.channel_max,
        )


@dataclass(frozen=True)
class TrunkConfig(StyleGan2DiscriminatorConfig):
    """A StyleGAN2 trunk with the decoder's table of channels and any number of input channels."""

    read: int = RGB
    multiplier: int = 2
    limit: int | None = None

    def channels(self, resolution: int) -> int:
        """As :func:`facelab.nn.skip_decoder.decoder_channels`."""
        return decoder_channels(resolution, self.multiplier, self.limit)

    @property
    def image_channels(self) -> int:
        return self.read


class Epilogue(DiscriminatorEpilogue):
    """Last layers whose statistic falls back to smaller groups."""

    def group(self, count: int) -> int:
        """See :func:`dividing_group`."""
        return dividing_group(count, self.group_size or count)


class ResidualDiscriminator(nn.Module):
    """Picture (and semantics) -> logit, high for real.

    ``precision`` is a plain attribute, not part of the state.

    Args:
        config: its shape.
        generator: draws the first weights; None: seed 0.
    """

    def __init__(self, config: ResidualDiscriminatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = AS_BUILT
        self.trunks = nn.ModuleDict()
        for name, read in config.inputs.items():
            trunk = config.trunk(read)
            self.trunks[name] = nn.ModuleList(DiscriminatorBlock(trunk, r) for r in trunk.resolutions)
        self.epilogue = Epilogue(config.trunk(RGB))
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew: N(0, 1), biases 0."""
        reset_children(self, generator)

    def forward(self, image: Tensor, semantics: Tensor | None = None) -> Tensor:
        """image (N, 3, S, S) in about [-1, 1], semantics (N, K, S, S) in about [0, 1] -> (N, 1) logits.

        Raises:
            ValueError: other shapes; semantics without a trunk for them or the other way round; a batch that does not
                divide into groups.
        """
        with torch.autocast(image.device.type, enabled=False):
            features = [self._read(name, x) for name, x in self._inputs(image, semantics)]
            total = features[0] if len(features) == 1 else features[0] + features[1]
            return self.epilogue(total, None, None)

    def _read(self, name: str, x: Tensor) -> Tensor:
        features: Tensor | None = None
        picture: Tensor | None = x
        for block in cast(nn.ModuleList, self.trunks[name]):
            features, picture = block(features, picture, self.precision)
        return cast(Tensor, features)

    def _inputs(self, image: Tensor, semantics: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        given = {"image": image, "semantics": semantics}
        size = self.config.resolution
        for name, x in given.items():
            channels = self.config.inputs.get(name)
            wanted = None if channels is None else (len(image), channels, size, size)
            got = None if x is None else tuple(x.shape)
            if got != wanted:
                raise ValueError(f"{name}: expected {wanted or 'none'}, got {got or 'none'}")
            if x is not None:
                yield name, x
