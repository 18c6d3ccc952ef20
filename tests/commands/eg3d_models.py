# SPDX-License-Identifier: Apache-2.0
"""EG3D models of random weights, as files, and crops with cameras for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facelab.api import FaceModel
from facelab.bases.eg3d.config import Eg3dConfig
from facelab.cameras.orbit import orbit_camera
from facelab.methods import load_method

SIDE = 32  # pixels of their pictures


def make_model(path: Path, side: int = SIDE, superresolution: str = "none", rendering: int | None = None) -> Path:
    """A small EG3D; its colours are made strong enough to be seen."""
    config = Eg3dConfig()
    model = dataclasses.replace(
        config.model, resolution=side, superresolution=superresolution, latent_dim=8, style_dim=8, plane_resolution=32,
        plane_channels=4, features=32 if superresolution != "none" else 4, decoder_hidden=8, channel_base=256,
        channel_max=8,
    )  # fmt: skip
    render = dataclasses.replace(config.render, resolution=rendering or side, samples=6, importance=4)
    config = dataclasses.replace(config, model=model, render=render)
    method = load_method("eg3d")
    generator = method.build_generator(config).eval()
    with torch.no_grad():
        generator.field_net.decoder.output_weight.mul_(4)
    generator.update_averages()
    return FaceModel(method, generator, config, {}, path).save(path)


def crop(folder: Path, name: str = "me", seed: int = 0, side: int = SIDE, sideways: float = 0.2) -> Path:
    """A square picture of blocks and beside it its camera of 25 numbers, as FaceDNeRF keeps them."""
    source = np.random.default_rng(seed)
    blocks = Image.fromarray(source.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    blocks.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    label = orbit_camera(np.pi / 2 + sideways, np.pi / 2, 2.7, (0.0, 0.0, 0.2), 4.2647).label()
    np.save(folder / f"{name}.npy", label.double().numpy())
    return folder / f"{name}.png"
