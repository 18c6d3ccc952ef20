# SPDX-License-Identifier: Apache-2.0
"""Untrained StyleSDF and CNeRF models whose distances are negative in half of the cube, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from facelab.api import FaceModel
from facelab.config import from_dict
from facelab.methods import load_method

CNERF: dict[str, Any] = {
    "model": {
        "depth": 2, "width": 8, "style_dim": 6, "resolution": 16, "transfer_channels": 6, "channel_max": 8,
        "stage": "full",
    },
    "render": {"resolution": 8, "samples": 6, "inference_samples": 4},
}  # fmt: skip
STYLESDF: dict[str, Any] = {
    "stage": "full",
    "model": {"width": 8, "layers": 2, "style_dim": 6, "latent_dim": 5, "resolution": 16, "channel_max": 8},
    "render": {"resolution": 8, "samples": 6},
}
SETTINGS = {
    "cnerf": CNERF,
    "cnerf_volume": {**CNERF, "model": {**CNERF["model"], "stage": "volume"}},
    "stylesdf": STYLESDF,
    "stylesdf_volume": {**STYLESDF, "stage": "volume"},
}


def make_model(kind: str, folder: Path, **reference: bool) -> Path:
    """A model of :data:`SETTINGS`, with switches of its ``reference`` section."""
    method = load_method(kind.removesuffix("_volume"))
    config = from_dict(method.config_type, {**SETTINGS[kind], "reference": reference}, where="test").at(0)
    generator = method.build_generator(config)
    with torch.no_grad():
        generator.field_net.beta.fill_(0.02)
        net = generator.field_net
        (net.regions if hasattr(net, "regions") else net).rgb.weight.mul_(30)  # heads that differ visibly
        _level_out(generator)
    generator.update_averages()
    model = FaceModel(method, generator.eval(), config, {"step": 0, "images": 0}, folder)
    return model.save(folder / f"{kind}.safetensors")


def _level_out(generator: nn.Module) -> None:
    """Shift the distance so that its median in the head's cube is 0."""
    net = generator.field_net
    head = net.distance if hasattr(net, "distance") else net.base.sdf
    source = torch.Generator().manual_seed(0)
    points = (torch.rand(1, 500, 1, 3, generator=source) - 0.5) * 0.24
    latents = {name: torch.zeros(1, *shape) for name, shape in generator.latent_spec.items()}
    field = generator.field(generator.scene(generator.map(latents)))
    head.bias -= field.distances(points).median()
