# SPDX-License-Identifier: Apache-2.0
"""Discriminators of pi-GAN: the three published networks at several fade-in weights."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.bases.pigan.convert_discriminator import discriminator_from_original, original_shapes, published_config
from facelab.nn.discriminators import DiscriminatorConfig, ProgressiveDiscriminator

from ..harness import Arrays, Meta, case_weights


def load_discriminator(meta: Meta, config: DiscriminatorConfig, seed_offset: int = 0) -> ProgressiveDiscriminator:
    """Our network with the weights of the case, which went through the converter."""
    original = case_weights(meta, original_shapes(config), seed_offset)
    model = ProgressiveDiscriminator(config)
    model.load_state_dict(discriminator_from_original(original, config))
    return model


def judge(meta: Meta, model: ProgressiveDiscriminator, image: Tensor, latent_outputs: dict[str, str]) -> Arrays:
    """Outputs at every alpha of the case; ``latent_outputs`` is our latent name -> output name."""
    results: Arrays = {}
    for alpha in meta["config"]["alphas"]:
        with torch.no_grad():
            output = model(image, alpha)
        results[f"out_prediction_alpha{alpha}"] = output.realness
        for ours, theirs in latent_outputs.items():
            results[f"out_{theirs}_alpha{alpha}"] = output.latents[ours]
        if output.pose is not None:
            results[f"out_position_alpha{alpha}"] = output.pose
    return results


def pigan_discriminator(meta: Meta, arrays: Arrays) -> Arrays:
    """A discriminator by its original class name."""
    config = published_config(meta["config"]["cls"], in_channels=arrays["in_image"].shape[1])
    return judge(meta, load_discriminator(meta, config), arrays["in_image"], {"z": "latent"} if config.latents else {})


ADAPTERS = {
    "pigan/disc_ccs_encoder": pigan_discriminator,
    "pigan/disc_progressive_encoder": pigan_discriminator,
    "pigan/disc_strided": pigan_discriminator,
}
