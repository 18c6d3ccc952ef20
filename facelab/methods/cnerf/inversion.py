# SPDX-License-Identifier: Apache-2.0
"""Inversion of photos with CNeRF: what facelab.inversion has to know of it.

Unknown are the codes of shape and texture of every region and the decoder's code, on request the decoder's noise and the
azimuth and elevation of the camera. (The paper shows inversions and publishes no procedure; this one is our own.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facelab.cameras import Camera
from facelab.cameras.sphere import sphere_camera
from facelab.data.regions import REGION_CLASSES, fuse_regions
from facelab.errors import UserError
from facelab.generator import Codes, Scene
from facelab.inversion.start import CodeStatistics, random_latents, start_statistics
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.nn.stylegan2.noise import const_noise

CODES = ("shape", "texture", "decoder")
PARTS = ("mapping", "field_net", "transfer", "decoder")  # of the generator, for tuning


def statistics(generator: CNerfGenerator, count: int = 10_000, seed: int = 0) -> CodeStatistics:
    """Average and spread of the codes of random latents."""
    device = generator.average_w.device
    return start_statistics(generator, random_latents(generator, count, seed, device), repeated=("shape", "texture"))


def make_scene(generator: CNerfGenerator, codes: Codes, noise: Any) -> Scene:
    """A scene through which derivatives reach every code and the camera."""
    return generator.scene(codes, noise).replace(base_gradient=True)


def make_camera(view: Tensor, fov: float) -> Camera:
    """(N, 2) azimuth and elevation in radians -> cameras."""
    return sphere_camera(view[:, 0], view[:, 1], fov)


def free_codes(generator: CNerfGenerator) -> tuple[str, ...]:
    """The codes that change the picture: without a decoder its code does not."""
    return CODES if generator.decoder is not None else CODES[:2]


def noise_maps(generator: CNerfGenerator) -> dict[str, Tensor]:
    """The decoder's stored noise. UserError for a generator without a decoder."""
    if generator.decoder is None:
        raise UserError("this CNeRF model has no decoder, so there is no noise to optimise; drop --noise")
    return const_noise(generator.decoder)


def region_targets(label_maps: NDArray[np.uint8], generator: CNerfGenerator) -> tuple[Tensor, Tensor]:
    """Label maps (N, S, S) of the 19 classes -> what the nine channels should be.

    Returns:
        scores (N, 9, S, S): 2 m - 1 of the widened, overlapping regions that the model was trained with;
        labels (N, S, S): the region of each pixel, not widened.

    Raises:
        UserError: the model has other regions.
    """
    if generator.config.field.regions != len(REGION_CLASSES):
        raise UserError(
            f"a mask fits models of {len(REGION_CLASSES)} regions, this one has {generator.config.field.regions}; "
            "leave the mask out"
        )
    maps = torch.from_numpy(np.ascontiguousarray(label_maps))
    table = torch.zeros(sum(map(len, REGION_CLASSES.values())), dtype=torch.int64)
    for region, classes in enumerate(REGION_CLASSES.values()):
        table[list(classes)] = region
    return 2 * fuse_regions(maps) - 1, table[maps.long()]
