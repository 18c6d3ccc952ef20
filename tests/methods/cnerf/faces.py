# SPDX-License-Identifier: Apache-2.0
"""Small generators, also one whose masks show a face: brows at the top, then eyes, nose and mouth."""

from __future__ import annotations

import torch

from facelab.methods.cnerf.field import CNerfFieldConfig
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.methods.cnerf.order import BROW, EYE, MOUTH, NOSE
from facelab.nn.skip_decoder import SkipDecoderConfig
from facelab.rendering.settings import RenderSettings

SETTINGS = RenderSettings(8, 0.88, 1.12, 4, 0, grid="centers", jitter=False)


def tiny(decoder: bool = True, channel_max: int | None = 8, **changes) -> CNerfGenerator:
    """Nine regions of width 6; the decoder draws 16 px from 8."""
    field = CNerfFieldConfig(depth=2, width=6, style_dim=5)
    tail = SkipDecoderConfig(
        size=16, in_resolution=8, in_channels=7, style_dim=5, semantic_channels=9, channel_max=channel_max
    )
    config = CNerfGeneratorConfig(field, decoder=tail if decoder else None, **changes)
    return CNerfGenerator(config, torch.Generator().manual_seed(1)).eval()


@torch.no_grad()
def with_face(generator: CNerfGenerator) -> CNerfGenerator:
    """Masks depend on the height in the picture alone: bands of brow, eye, nose and mouth."""
    head = generator.field_net.regions.mask
    head.weight.zero_()
    head.bias.fill_(-10)
    up = generator.config.field.width + 1  # the view direction's second component
    # offsets and slopes of lines in the height, of which each is the highest somewhere: brow on top, mouth below
    for region, slope, offset in ((BROW, 3, -0.1), (EYE, 1, 0.0), (NOSE, -1, 0.0), (MOUTH, -3, -0.1)):
        head.weight[region, 0, up], head.bias[region, 0] = slope, offset
    generator.update_averages()
    return generator
