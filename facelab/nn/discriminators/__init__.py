# SPDX-License-Identifier: Apache-2.0
"""Discriminators: image -> realness, and guesses of latents and pose where the head has them."""

from facelab.nn.discriminators.progressive import DiscriminatorConfig, DiscriminatorOutput, ProgressiveDiscriminator

__all__ = ["DiscriminatorConfig", "DiscriminatorOutput", "ProgressiveDiscriminator"]
