# SPDX-License-Identifier: Apache-2.0
"""What a run that starts from the weights of a model takes from that model's configuration."""

from __future__ import annotations

from typing import Any

JUDGE = ("channel_multiplier", "channel_max")
CAMERAS = ("camera.mode", "camera.azimuth", "camera.elevation", "camera.fov")


def inherited(config: Any, discriminator: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the settings that come from the file.

    Args:
        config: a ``CnerfConfig``, that of the model to start from.
        discriminator: whether the weights of discriminators are taken too.

    Returns:
        Those without which the weights mean something else (they replace the curriculum's), and those that describe
        the data (a curriculum that states them keeps its own: fine-tuning may go to other data).
    """
    firm = ["model", "camera.radius"]
    if discriminator:
        firm += [f"discriminator.{name}" for name in JUDGE]
    if discriminator or config.model.stage == "full":
        firm.append("render.resolution")
    return tuple(firm), CAMERAS
