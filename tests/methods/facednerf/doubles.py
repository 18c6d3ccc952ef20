# SPDX-License-Identifier: Apache-2.0
"""A tiny EG3D with random weights and judges of a few numbers, so that the whole loop runs on a CPU in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.bases.eg3d.config import RenderConfig, ViewConfig
from facelab.bases.eg3d.model import TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.cameras import Camera
from facelab.config import load_config
from facelab.draws import Draws
from facelab.fields.triplane import TriplaneConfig
from facelab.inversion.problem import Target
from facelab.losses.perceptual import RandomPerceptual
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.editing import Model, Networks

TINY = TriPlaneGeneratorConfig(
    field=TriplaneConfig(channels=4, hidden=8, features=6),
    z_dim=8,
    w_dim=12,
    plane_resolution=16,
    channel_base=64,
    channel_max=8,
    superresolution=None,
)
SIDE = 16  # pixels


def tiny_model(seed: int = 1) -> Model:
    """An EG3D whose noise maps matter (a new one has strength 0)."""
    generator = TriPlaneGenerator(TINY, torch.Generator().manual_seed(seed)).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.1)
    return Model(generator, ViewConfig(), RenderConfig(resolution=SIDE, samples=5, importance=4))


class FakeText:
    """Pulls the side view towards a grey level; counts how often it was asked."""

    def __init__(self, level: float = 0.3) -> None:
        self.level, self.asked, self.progress = level, 0, []  # type: ignore[var-annotated]

    def loss(self, pictures: Tensor, draws: Draws, *, progress: Callable[[int], float]) -> Tensor:
        self.asked += 1

        def drawn(own: Draws) -> Tensor:
            self.progress.append(progress(own.step))
            return own.normal("fake", (1, 1, 1, 1))

        noise = draws.host(drawn, pictures.device).to(pictures)
        return (pictures - self.level + 0.01 * noise).square().flatten(1).mean(1)


def fake_light(lightness: Tensor) -> Tensor:
    """(N, 1, S, S) -> (N, 9): means of nine patches."""
    return F.adaptive_avg_pool2d(lightness, 3).flatten(1)


def fake_identity(pictures: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 12)."""
    return F.adaptive_avg_pool2d(pictures, 2).flatten(1)


def networks(**changes: Any) -> Networks:
    """All judges but CLIP."""
    made = Networks(RandomPerceptual(), fake_identity, FakeText(), None, fake_light)
    return dataclasses.replace(made, **changes)


@torch.no_grad()
def photos(model: Model, count: int = 1, seed: int = 7) -> Target:
    """Pictures of random heads of another generator from random cameras: nothing that the model makes exactly."""
    other = tiny_model(9)
    config = settings()
    draws = Draws(seed)
    z = draws.normal("z", (count, TINY.z_dim))
    angles = draws.uniform("angles", (count, 2)) * 0.4 - 0.2
    camera = Camera.cat([model.camera(config, float(a[0]), float(a[1])) for a in angles])
    codes = other.generator.map({"z": z})
    seen = other.generator.render(other.generator.scene(codes), camera, model.settings(config), draws)
    return Target(seen.rgb.clamp(-1, 1), camera)


def settings(*overrides: str) -> FaceDNeRFConfig:
    """A short run."""
    short = ["codes.steps=6", "tune.steps=4", "codes.start_samples=50", "render.sample_factor=1", "weights.text=0.1"]
    return load_config(FaceDNeRFConfig, overrides=[*short, "weights.light=0.1", *overrides])
