# SPDX-License-Identifier: Apache-2.0
"""Configuration of FENeRF. Defaults are those of the README's curriculum, with latent grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from facelab.bases.pigan import config as pigan
from facelab.deviations import Deviation
from facelab.ranges import check_ranges


@dataclass(frozen=True)
class ModelConfig(pigan.ModelConfig):
    """Generator with a geometry and an appearance code."""

    variant: str = "TextureEmbeddingPiGAN256SEMANTICDISENTANGLE_DIM_96"
    mapping_linears: int = 5


@dataclass(frozen=True)
class DiscriminatorConfig(pigan.DiscriminatorConfig):
    """Image (3 channels) and semantic (18 labels + 3) discriminators."""

    kind: str = "CCSDoubleEncoderDiscriminator"


@dataclass(frozen=True)
class RenderConfig(pigan.RenderConfig):
    resolution: int = 32
    samples: int = 24
    fill_color: Literal["black", "white", "grey", "light_grey"] = "black"  # of empty rays at inference


@dataclass(frozen=True)
class LossConfig(pigan.LossConfig):
    latent: dict[str, float] = field(default_factory=lambda: {"z_geo": 0.0, "z_app": 0.0})
    semantic: float = 0.1  # weight of the semantic discriminator in the generator's loss
    opacity: float = 0.0  # rays stop as much as their labels add up to (ours; the original has no such term)
    opacity_steps: int = 2000  # over which that weight grows from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("loss", self, not_negative=("semantic", "opacity", "opacity_steps"))


@dataclass(frozen=True)
class OptimConfig(pigan.OptimConfig):
    semantic_lr: float = 2e-4  # semantic discriminator


@dataclass(frozen=True)
class ReferenceConfig(pigan.ReferenceConfig):
    fill_labels: bool = False


@dataclass(frozen=True)
class FenerfConfig(pigan.PiganConfig):
    """A FENeRF run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    share_fakes: bool = False  # True: both discriminators see the same fakes (the original draws two batches)


DEVIATIONS = [
    *pigan.siren_deviations(
        "fenerf",
        data_chain="the original does not exchange left and right classes on mirrored samples and resizes "
        "without antialiasing; we do both",
    ),
    Deviation(
        "fenerf",
        "fill_labels",
        "the original replaces rays of opacity below 0.9 by the fill colour, in all labels too, so that with white "
        "all tie; we lay the picture over the colour and score the background class by the missing opacity",
    ),
]
