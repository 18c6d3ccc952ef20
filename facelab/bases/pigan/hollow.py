# SPDX-License-Identifier: Apache-2.0
"""The hollow mask: what a GAN over a narrow field of view may learn instead of a face, and the way back.

Seen through a long lens, a face turned by an angle and its inside-out cast turned by the opposite angle
give nearly the same picture, and a symmetric pose prior does not tell them apart. A discriminator whose
pose head reads real pictures with known cameras does (``loss.real_pose``). For a model that went the
wrong way already, reflecting depth at the plane z = 0 gives the face: exactly so for parallel rays and
thin surfaces, so the result wants some more training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from facelab.fields.siren import SirenConfig


def mirror_depth_of_field(state: Mapping[str, Tensor], config: SirenConfig) -> dict[str, Tensor]:
    """The generator whose field at (x, y, z) is the given one's at (x, y, -z).

    The same lines of sight then belong to poses mirrored at the frontal one, so the view direction's x and y
    change their sign where the colour branch sees them. ValueError for fields with a latent grid.
    """
    if config.grid_branch != "none":
        raise ValueError("depth cannot be mirrored in the weights of a field with a latent grid")
    mirrored = {key: value.clone() for key, value in state.items()}
    mirrored["field_net.geometry.0.weight"][:, 2] *= -1
    if config.use_direction:
        mirrored["field_net.color.0.weight"][:, :2] *= -1
    return mirrored


def mirror_pose_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The discriminator whose pose guess is pi minus the given one's (pitch and yaw are the last two outputs)."""
    mirrored = {key: value.clone() for key, value in state.items()}
    mirrored["head.weight"][-2:] *= -1
    mirrored["head.bias"][-2:] = math.pi - mirrored["head.bias"][-2:]
    return mirrored
