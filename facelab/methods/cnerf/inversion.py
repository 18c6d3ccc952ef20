# SPDX-License-Identifier: Apache-2.0
"""Inversion of photos with CNeRF: what facelab.inversion has to know of it.

Unknown are the codes of shape and texture of every region and the decoder's code, on request the decoder's noise and the
azimuth and elevation of the camera. (The paper shows inversions and publishes no procedure; this one is our own.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facelab.cameras import Camera
from facelab.cameras.sphere import sphere_camera
from facelab.data.regions import REGION_CLASSES, fuse_regions
from facelab.errors import UserError
from facelab.generator import Codes, Scene
from facelab.inversion import terms
from facelab.inversion.loop import Inversion, InversionSettings, Solution, advance_until
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.inversion.schedules import ramped_rate
from facelab.inversion.start import CodeStatistics, random_latents, start_statistics
from facelab.losses.perceptual import PerceptualNet
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.nn.stylegan2.noise import const_noise
from facelab.rendering.settings import RenderSettings

CODES = ("shape", "texture", "decoder")


@dataclass(frozen=True)
class InvertOptions:
    """What decides an inversion. Weights of 0 leave a loss out."""

    steps: int = 500
    lr: float = 0.05  # per step, in standard deviations of the codes (and of noise)
    refine_camera: bool = False
    camera_lr: float = 0.1  # per step, degrees
    noise: bool = False  # also find the decoder's noise
    picture_weight: float = 1.0
    perceptual_weight: float = 1.0
    mask_weight: float = 1.0  # where the target has a segmentation
    mask_loss: Literal["mse", "cross_entropy"] = "mse"  # of the channels, or of the region of each pixel
    prior_weight: float = 0.01  # mean square of the codes in standard deviations
    noise_weight: float = 1e5

    def aims(self, has_mask: bool) -> bool:
        """Whether any loss looks at the photo."""
        return bool(self.picture_weight or self.perceptual_weight or (has_mask and self.mask_weight))


def make_problem(
    generator: CNerfGenerator,
    target: Target,
    views: Tensor,
    fov: float,
    settings: RenderSettings,
    net: PerceptualNet,
    spread: CodeStatistics,
    options: InvertOptions,
) -> Problem:
    """Losses and cameras of N photos.

    Args:
        generator: of any stage, on the target's device.
        target: pictures of the generator's side; see :func:`region_targets` for its segmentation.
        views: (N, 2) azimuth and elevation in radians, where the target's cameras stand.
        fov: full field of view in degrees.
        settings: of the renderings.
        net: of the perceptual loss.
        spread: see :func:`statistics`.
        options: weights.
    """
    o = options
    weighted = {
        "picture": (o.picture_weight, lambda: terms.picture_term),
        "perceptual": (o.perceptual_weight, lambda: terms.perceptual_term(net, target)),
        "mask": (
            o.mask_weight if target.scores is not None else 0.0,
            lambda: terms.scores_term if o.mask_loss == "mse" else terms.labels_term(),
        ),
        "prior": (o.prior_weight, lambda: terms.prior_term(spread)),
        "noise": (o.noise_weight if o.noise else 0.0, lambda: terms.noise_term),
    }
    return Problem(
        generator,
        target,
        {name: Weighted(weight, make()) for name, (weight, make) in weighted.items() if weight},
        settings,
        make_scene=functools.partial(make_scene, generator),
        make_camera=functools.partial(make_camera, fov=fov),
        start_view=views,
    )


def make_inversion(
    generator: CNerfGenerator, problem: Problem, spread: CodeStatistics, options: InvertOptions
) -> Inversion:
    """The optimisation, from the average; learning rates are in standard deviations of what they move."""
    free = free_codes(generator)
    scale = float(torch.cat([spread.spread.values[name].flatten() for name in free]).square().mean().sqrt())
    rate = options.lr * scale
    settings = InversionSettings(
        options.steps,
        functools.partial(ramped_rate, steps=options.steps, base=rate),
        noise_factor=1 / scale,
        view_factor=math.radians(options.camera_lr) / rate,
    )
    noise = noise_maps(generator) if options.noise else None
    return Inversion(problem, spread.average, settings, free=free, noise=noise, move_view=options.refine_camera)


def invert(
    generator: CNerfGenerator,
    target: Target,
    views: Tensor,
    fov: float,
    settings: RenderSettings,
    net: PerceptualNet,
    options: InvertOptions | None = None,
) -> Solution:
    """Codes of N photos in one call; arguments as in :func:`make_problem`."""
    chosen, spread = options or InvertOptions(), statistics(generator)
    problem = make_problem(generator, target, views, fov, settings, net, spread, chosen)
    inversion = make_inversion(generator, problem, spread, chosen)
    advance_until(inversion)
    return inversion.solution()


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
