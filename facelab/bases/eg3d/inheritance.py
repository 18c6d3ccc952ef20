# SPDX-License-Identifier: Apache-2.0
"""What a run that starts from the weights of a model takes from that model's configuration."""

from __future__ import annotations

from typing import Any

SCENE = ("near", "far", "box_limits", "samples", "importance", "spacing", "background", "density_noise")
JUDGE = ("dual", "conditioned", "channel_base", "channel_max", "half_blocks", "clamp")
# side of the rendering: a curriculum's own, unless no super-resolution makes the picture
SIDES = ("render.resolution", "neural.initial", "neural.final")
CAMERAS = ("view.radius", "view.pivot", "view.focal", "conditioning.swap")


def inherited(config: Any, discriminator: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the settings that come from the file.

    Args:
        config: an ``Eg3dConfig``, that of the model to start from.
        discriminator: whether the discriminator's weights are taken too.

    Returns:
        Those without which the weights mean something else (they replace the curriculum's), and those that describe
        the data (a curriculum that states them keeps its own: fine-tuning may go to other data).
    """
    firm = ["model", *(f"render.{name}" for name in SCENE), "conditioning.pose", "reference.legacy_raw"]
    if discriminator:
        firm += [f"discriminator.{name}" for name in JUDGE]
    if config.model.superresolution_kind is None:
        firm += SIDES
    return tuple(firm), CAMERAS
