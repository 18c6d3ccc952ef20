# SPDX-License-Identifier: Apache-2.0
"""Configuration of the face parser's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from facelab.training.config import CheckpointConfig, LogConfig, TrainConfig


@dataclass(frozen=True)
class ModelConfig:
    """The network, see facelab/nn/pretrained/face_parsing.py."""

    widths: list[int] = field(default_factory=lambda: [24, 48, 96, 160])  # channels at 1/2, 1/4 ... of the size
    size: int = 256  # side in pixels of the pictures that the network sees, in training and after

    def __post_init__(self) -> None:
        step = 2 ** len(self.widths)
        if self.size < step or self.size % step:
            raise ValueError(f"model.size must be a multiple of {step}, got {self.size}")


@dataclass(frozen=True)
class DataConfig:
    """The heads; all are drawn before the first step and kept in memory (4 bytes per pixel)."""

    heads: int = 20_000
    size: int = 256  # side of the drawn pictures, pixels
    fov: float = 13.0  # degrees; a little wider than a portrait, so that there is something to zoom into
    yaw_std: float = 0.35  # radians around the frontal view
    pitch_std: float = 0.2
    draw_on: Literal["auto", "cpu", "cuda"] = "auto"  # auto = the GPU where there is one


@dataclass(frozen=True)
class AugmentConfig:
    """How synthetic heads are made to vary like photographs; ``p_...`` are probabilities per picture."""

    rotate: float = 0.35  # largest angle, radians
    zoom: tuple[float, float] = (0.9, 1.8)  # factor on the size of the head
    shift: float = 0.14  # largest shift, share of the side
    lower: float = 0.09  # portraits are cropped with the eyes in the middle; heads are drawn with them above it
    stretch: float = 0.12  # largest change of the aspect ratio
    elastic: float = 0.014  # deviation of the smooth warp, share of the side
    p_flip: float = 0.5
    p_long_hair: float = 0.45  # hair falls down over background and clothes
    p_wild_hair: float = 0.6  # hair grows irregularly over what is beside it
    p_hair_texture: float = 0.8
    p_brows: float = 0.35  # thicker brows
    p_eyes: float = 0.5  # dark lashes, make-up and shaded eyes
    p_beard: float = 0.35
    p_neckline: float = 0.4  # skin below the neck, labelled neck
    p_cloth_texture: float = 0.7
    p_occluder: float = 0.12  # something in front, labelled background
    p_shadow: float = 0.7
    p_blur: float = 0.4
    noise: float = 0.05  # largest deviation of pixel noise, of 0..1
    colour: float = 0.35  # strength of brightness, contrast, saturation and tint changes


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy with weights, and soft Dice."""

    dice: float = 0.5
    small_parts: float = 2.0  # weight of the pixels of eyes, brows, lips, ears ... against 1 for the large parts


@dataclass(frozen=True)
class OptimConfig:
    """Adam."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


@dataclass(frozen=True)
class FaceParserConfig:
    """A training run of the face parser."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema_decay: float = 0.998
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(max_steps=12_000, batch_per_gpu=64, batch_chunk=64, grad_clip=1.0)
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(samples_every=0))
