# SPDX-License-Identifier: Apache-2.0
"""The perceptual network of a command line: published weights from files, or the substitute that needs none."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from facelab import assets
from facelab.errors import UserError
from facelab.losses.perceptual import LpipsVgg, RandomPerceptual
from facelab.metrics.features import read_tensor_file

ASSET = "lpips_vgg16"
AUTO, RANDOM = "auto", "random"


def load_perceptual(choice: str = AUTO, standardise: bool = True) -> nn.Module:
    """A :class:`~facelab.losses.perceptual.PerceptualNet`.

    Args:
        choice: ``auto``: the manifest's LPIPS file if it is there, else the substitute; ``random``: the substitute; else
            a file, or two separated by a comma (VGG16 and the linear weights of the lpips package). Only tensors are
            read.
        standardise: see :class:`LpipsVgg`.

    Raises:
        UserError: no such file, damaged, or another network.
    """
    if choice == RANDOM:
        return RandomPerceptual()
    if choice == AUTO:
        found = assets.locate(ASSET)
        if found is None:
            return RandomPerceptual()
        choice = str(found)
    tensors = {}
    for part in choice.split(","):
        tensors.update(read_tensor_file(Path(part.strip())))
    try:
        return LpipsVgg(tensors, standardise)
    except UserError as error:
        raise UserError(f"{choice}: {error}") from error
