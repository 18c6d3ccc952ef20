# SPDX-License-Identifier: Apache-2.0
"""The discriminators of rendered thumbnails: residual CoordConv networks that also read off the viewpoint or the class.

StyleSDF (arXiv 2112.11427) judges the thumbnail and guesses the viewpoint; CNeRF (arXiv 2302.01579) judges thumbnail
and semantic map together, and one region at a time with a guess which region it is. Shapes: N batch, R picture side,
K semantic channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops.convolution_derivatives import conv2d
from facelab.nn.discriminators.progressive import ResidualBlock
from facelab.nn.discriminators.skip_residual import Grouping
from facelab.nn.discriminators.stylegan2 import dividing_group, minibatch_std
from facelab.nn.init import uniform_
from facelab.nn.layers import LEAK, Conv2d, CoordConv2d
from facelab.nn.skip_decoder import RGB
from facelab.nn.stylegan2.layers import FullyConnected

VIEW_CHANNELS: Mapping[int, int] = {2: 400, 4: 400, 8: 400, 16: 400, 32: 256, 64: 128, 128: 64}
REGION_CHANNELS: Mapping[int, int] = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128}
VIEW_FINAL, REGION_FINAL = 2, 4  # side of the last features


@dataclass(frozen=True, kw_only=True)
class ViewDiscriminatorConfig:
    """Shape of a :class:`ViewDiscriminator`. ValueError for a resolution without an entry in the table of channels.

    Attributes:
        resolution: side R of the thumbnails: 4 to 128, a power of two.
        semantic_channels: K, a second trunk reads the semantic map; 0: thumbnails only.
        view: the head guesses (azimuth, elevation) too.
        group_size: samples that share a minibatch statistic; where it does not divide the batch, 3 or 2.
            None: no statistic (StyleSDF); 4 in CNeRF.
        grouping: see :class:`facelab.nn.discriminators.skip_residual.ResidualDiscriminatorConfig`.
        channel_max: limit of all channel counts; None: the published ones.
        channels_last: memory layout of weights and activations; changes speed, not results.
        joined: coordinates are channels of every convolution, as in the originals, whose rounding this reproduces;
            else their share is one map for the whole batch, which is faster and equal up to rounding.
    """

    resolution: int = 64
    semantic_channels: int = 0
    view: bool = True
    group_size: int | None = None
    grouping: Grouping = "contiguous"
    channel_max: int | None = None
    channels_last: bool = False
    joined: bool = False

    def __post_init__(self) -> None:
        _check_resolution(self.resolution, VIEW_CHANNELS, VIEW_FINAL)

    @property
    def inputs(self) -> dict[str, int]:
        """Trunk -> channels it reads."""
        return {"image": RGB, **({"semantics": self.semantic_channels} if self.semantic_channels else {})}


@dataclass(frozen=True, kw_only=True)
class RegionDiscriminatorConfig:
    """Shape of a :class:`RegionDiscriminator`. ValueError for a resolution without an entry in the table of channels.

    Attributes:
        resolution: side R of the thumbnails: 8 to 128, a power of two.
        classes: number of regions K.
        The others are those of :class:`ViewDiscriminatorConfig`.
    """

    resolution: int = 64
    classes: int = 9
    group_size: int = 4
    grouping: Grouping = "contiguous"
    channel_max: int | None = None
    channels_last: bool = False
    joined: bool = False

    def __post_init__(self) -> None:
        _check_resolution(self.resolution, REGION_CHANNELS, REGION_FINAL)


@dataclass(frozen=True)
class Judgement:
    """What a discriminator says of N thumbnails.

    Attributes:
        realness: (N, 1) logits, high for real.
        view: (N, 2) guess of (azimuth, elevation) in radians, or None.
        classes: (N, K) logits of the region, or None.
    """

    realness: Tensor
    view: Tensor | None = None
    classes: Tensor | None = None


class JoinedCoordConv2d(CoordConv2d):
    """The same map as one convolution of the concatenated channels."""

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """As :meth:`CoordConv2d.forward`."""
        weight = torch.cat([self.weight, self.coord_weight], dim=1)
        joined = torch.cat([x, coordinates.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1)
        return conv2d(joined, weight, None, self.stride, self.padding) + self.bias[:, None, None]


class CoordBlock(ResidualBlock):
    """Two 3x3 CoordConvs with leaky ReLU, a 2x2 mean, and a skip: (main + skip) / sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, size: int, joined: bool = False) -> None:
        super().__init__("coord_pool", in_channels, out_channels, size)
        if joined:
            self.conv0 = JoinedCoordConv2d(in_channels, out_channels, 3, padding=1)
            self.conv1 = JoinedCoordConv2d(out_channels, out_channels, 3, padding=1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """PyTorch's rule, but the fan-in of the biases leaves out the coordinates."""
        self.reset(generator, "default")
        for conv in (self.conv0, self.conv1):
            uniform_(conv.bias, 1 / math.sqrt(conv.weight[0].numel()), generator)


class Trunk(nn.Module):
    """Picture (N, C, R, R) -> features (N, channels[last], last, last).

    Args:
        channels: by resolution.
        last: side of the result.
        bent: the first 1x1 layer ends in a leaky ReLU; False: it is linear.
        joined: see :class:`ViewDiscriminatorConfig`.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        last: int,
        channels: Mapping[int, int],
        *,
        bent: bool = True,
        joined: bool = False,
    ) -> None:
        super().__init__()
        self.bent = bent
        self.first = Conv2d(in_channels, channels[resolution], 1)
        sizes = [resolution >> k for k in range(int(math.log2(resolution // last)))]
        self.blocks = nn.ModuleList(CoordBlock(channels[size], channels[size // 2], size, joined) for size in sizes)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        self.first.reset(generator)
        for block in self.blocks:
            cast(CoordBlock, block).reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.first(x)
        x = F.leaky_relu_(x, LEAK) if self.bent else x
        for block in self.blocks:
            x = block(x)
        return x


class ViewDiscriminator(nn.Module):
    """Thumbnail (and semantic map) -> logit and viewpoint: StyleSDF's volume discriminator, CNeRF's global one.

    Args:
        config: its shape.
        generator: draws the first weights; None: seed 0.

    >>> model = ViewDiscriminator(ViewDiscriminatorConfig(resolution=8, channel_max=4))
    >>> said = model(torch.zeros(2, 3, 8, 8))
    >>> said.realness.shape, said.view.shape
    (torch.Size([2, 1]), torch.Size([2, 2]))
    """

    def __init__(self, config: ViewDiscriminatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        channels = _limited(VIEW_CHANNELS, config.channel_max)
        self.trunks = nn.ModuleDict(
            {
                name: Trunk(read, config.resolution, VIEW_FINAL, channels, joined=config.joined)
                for name, read in config.inputs.items()
            }
        )
        width = channels[VIEW_FINAL] + (config.group_size is not None)
        self.head = Conv2d(width, 3 if config.view else 1, VIEW_FINAL)
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))
        if config.channels_last:
            self.to(memory_format=torch.channels_last)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        for trunk in self.trunks.values():
            cast(Trunk, trunk).reset_parameters(generator)
        self.head.reset(generator)

    def forward(self, image: Tensor, semantics: Tensor | None = None) -> Judgement:
        """image (N, 3, R, R) in [-1, 1], semantics (N, K, R, R) raw values about [0, 1].

        Raises:
            ValueError: other shapes; semantics without a trunk for them or the other way round; a batch that does not
                divide into groups.
        """
        c = self.config
        total: Tensor | None = None
        for name, x in _inputs(c.resolution, c.inputs, {"image": image, "semantics": semantics}):
            features = self.trunks[name](_laid_out(x, c.channels_last))
            total = features if total is None else total + features
        x = cast(Tensor, total)
        if c.group_size is not None:
            x = _with_statistic(x, c.group_size, c.grouping)
        said = self.head(x).flatten(1)
        return Judgement(said[:, :1], said[:, 1:] if c.view else None)


class RegionDiscriminator(nn.Module):
    """Thumbnail and one channel of the semantic map -> logit and region: CNeRF's semantic discriminator.

    The thumbnail is seen through the channel: it is multiplied by it.

    Args:
        config: its shape.
        generator: draws the first weights; None: seed 0.
    """

    def __init__(self, config: RegionDiscriminatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        channels = _limited(REGION_CHANNELS, config.channel_max)
        self.trunks = nn.ModuleDict(
            {
                "image": Trunk(RGB, config.resolution, REGION_FINAL, channels, joined=config.joined),
                "semantics": Trunk(1, config.resolution, REGION_FINAL, channels, bent=False, joined=config.joined),
            }
        )
        width = channels[REGION_FINAL]
        self.conv = Conv2d(width + 1, width, 3)
        self.realness = nn.ModuleList([FullyConnected(4 * width, width, activation="lrelu"), FullyConnected(width, 1)])
        self.classes = nn.ModuleList(
            [FullyConnected(4 * width, width, activation="lrelu"), FullyConnected(width, config.classes)]
        )
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))
        if config.channels_last:
            self.to(memory_format=torch.channels_last)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        for trunk in self.trunks.values():
            cast(Trunk, trunk).reset_parameters(generator)
        self.conv.reset(generator)
        for layer in (*self.realness, *self.classes):
            cast(FullyConnected, layer).reset_parameters(generator)

    def forward(self, image: Tensor, region: Tensor) -> Judgement:
        """image (N, 3, R, R) in [-1, 1], region (N, 1, R, R) about [0, 1]. ValueError as in :class:`ViewDiscriminator`."""
        c = self.config
        inputs = dict(_inputs(c.resolution, {"image": RGB, "semantics": 1}, {"image": image, "semantics": region}))
        seen = {"image": inputs["image"] * inputs["semantics"], "semantics": inputs["semantics"]}
        features = [self.trunks[name](_laid_out(x, c.channels_last)) for name, x in seen.items()]
        x = _with_statistic(features[0] + features[1], c.group_size, c.grouping)
        x = self.conv(x).flatten(1)
        realness, classes = (second(first(x)) for first, second in (self.realness, self.classes))
        return Judgement(realness, classes=classes)


def _with_statistic(x: Tensor, size: int, grouping: Grouping) -> Tensor:
    return minibatch_std(x, dividing_group(len(x), size), grouping=grouping)


def _limited(table: Mapping[int, int], limit: int | None) -> dict[int, int]:
    return {size: count if limit is None else min(count, limit) for size, count in table.items()}


def _check_resolution(resolution: int, table: Mapping[int, int], last: int) -> None:
    known = [size for size in table if size > last]
    if resolution not in known:
        raise ValueError(f"resolution must be one of {known}, got {resolution}")


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _inputs(size: int, channels: Mapping[str, int], given: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The inputs that the trunks read, checked."""
    count = len(cast(Tensor, given["image"]))
    for name, x in given.items():
        wanted = (count, channels[name], size, size) if name in channels else None
        got = None if x is None else tuple(x.shape)
        if got != wanted:
            raise ValueError(f"{name}: expected {wanted or 'none'}, got {got or 'none'}")
        if x is not None:
            yield name, x
