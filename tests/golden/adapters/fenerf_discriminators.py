# SPDX-License-Identifier: Apache-2.0
"""Image and semantic discriminator of FENeRF at several fade-in weights."""

from __future__ import annotations

from facelab.bases.pigan.convert_discriminator import published_config
from facelab.nn.discriminators import DiscriminatorConfig

from ..harness import Arrays, Meta
from .pigan_discriminators import judge, load_discriminator


def double_config(in_channels: int, z_geo: int, z_app: int) -> DiscriminatorConfig:
    """FENeRF's discriminator: two latent guesses and the pose."""
    latents = {"z_geo": z_geo, "z_app": z_app}
    return published_config("CCSDoubleEncoderDiscriminator", in_channels=in_channels, latents=latents)


def fenerf_discriminator(meta: Meta, arrays: Arrays) -> Arrays:
    """Either discriminator: they differ in the number of channels only."""
    case = meta["config"]
    model = load_discriminator(meta, double_config(case["channels"], case["lg"], case["la"]))
    return judge(meta, model, arrays["in_image"], {"z_geo": "latent_geo", "z_app": "latent_app"})


ADAPTERS = {"fenerf/disc_img": fenerf_discriminator, "fenerf/disc_seg": fenerf_discriminator}
