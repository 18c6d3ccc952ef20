# SPDX-License-Identifier: Apache-2.0
"""How a model under measurement is looked at: its cameras, the size of its pictures, real pictures to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from facelab.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from facelab.cameras.pose_sampling import PosePrior

LABEL_HEADS = 4096  # synthetic heads whose cameras stand for the data set's, where a model is told of cameras
PICTURE_SIZE = 128  # pixels, picture distances of models without a size of their own


@dataclass(frozen=True)
class Sight:
    """Cameras and sizes of a model.

    Attributes:
        prior: distribution of the training cameras' angles.
        fov: full field of view in degrees.
        radius: distance of the cameras to the origin, scene units.
        picture_size: side of a picture in pixels if the model makes only one size (super-resolution), else None.
        default_size: side of the pictures that are compared unless something else is asked for.
        conditioned: cameras come from the rows of the data set, and the generator is told of them.
        sphere: StyleSDF's and CNeRF's: rays by depth along the axis; whole pictures without labels of a pose.
        heads_std: deviations of the yaw and pitch of synthetic heads' cameras, radians; None: those of the prior.
        heads_background: what stands behind synthetic heads.
    """

    prior: PosePrior
    fov: float
    radius: float = 1.0
    picture_size: int | None = None
    default_size: int = PICTURE_SIZE
    conditioned: bool = False
    sphere: bool = False
    heads_std: tuple[float, float] | None = None
    heads_background: str = "black"

    @property
    def reads_poses(self) -> bool:
        """Poses are read by a reader fitted on synthetic heads, not by the model's discriminator."""
        return self.conditioned or self.sphere

    def rendered(self, asked: int | None) -> int | None:
        """Side of the rendering for depths, None: as trained. UserError for one that a decoder does not read."""
        if asked is not None and self.sphere and self.picture_size is not None:
            raise UserError(
                f"this model's decoder reads renderings of one size only: leave out --geometry-size {asked}"
            )
        return asked

    def sized(self, asked: int | None) -> int:
        """Side of the pictures to compare. UserError for a size that the model does not make."""
        if self.picture_size is None:
            return asked or self.default_size
        if asked not in (None, self.picture_size):
            raise UserError(f"this model makes pictures of {self.picture_size} pixels: leave out --image-size {asked}")
        return self.picture_size


def sight_of(config: Any) -> Sight:
    """Read it off a model's configuration."""
    from facelab.cameras.pose_sampling import PosePrior

    sphere = _sphere_view(config)
    if sphere is not None:
        return _sphere_sight(config, *sphere)
    if hasattr(config, "camera"):
        c = config.camera
        return Sight(PosePrior(c.distribution, c.yaw_mean, c.yaw_std, c.pitch_mean, c.pitch_std), c.fov)
    d, v = config.data, config.view
    prior = PosePrior("gaussian", math.pi / 2, d.heads_yaw_std, math.pi / 2, d.heads_pitch_std)
    size = config.model.resolution
    fixed = None if config.model.superresolution_kind is None else size
    return Sight(prior, v.fov, v.radius, fixed, size, True, heads_background=d.alpha)


def _sphere_view(config: Any) -> tuple[Any, str, bool] | None:
    """(cameras, mode, whether a decoder draws the pictures) of StyleSDF and CNeRF, None for others."""
    if hasattr(config, "view") and hasattr(config.view, "azimuth"):
        return config.view, config.view.distribution, config.stage == "full"
    if hasattr(config, "camera") and hasattr(config.camera, "azimuth"):
        return config.camera, config.camera.mode, config.model.stage == "full"
    return None


def _sphere_sight(config: Any, view: Any, mode: str, decoded: bool) -> Sight:
    from facelab.cameras.pose_sampling import PosePrior

    prior = PosePrior(mode, math.pi / 2, view.azimuth, math.pi / 2, view.elevation)
    size = config.model.resolution if decoded else config.render.resolution
    deviations = (config.data.heads_azimuth_std, config.data.heads_elevation_std)
    return Sight(
        prior,
        view.fov,
        1.0,
        size if decoded else None,
        size,
        sphere=True,
        heads_std=deviations,
        heads_background=config.data.heads_background,
    )


def synthetic_heads(sight: Sight, seed: int, size: int, grid: str, device: Any) -> Any:
    """Synthetic heads with the model's camera distribution, in its scene units."""
    from facelab.data.synthetic import SyntheticHeads
    from facelab.metrics.known_heads import ScaledHeads

    yaw_std, pitch_std = sight.heads_std or (sight.prior.yaw_std, sight.prior.pitch_std)
    heads = SyntheticHeads(
        seed,
        size,
        device=device,
        grid=grid,
        fov=sight.fov,
        yaw_std=yaw_std,
        pitch_std=pitch_std,
        background=sight.heads_background,
    )
    return ScaledHeads(heads, sight.radius)


def synthetic_labels(sight: Sight, seed: int, grid: str) -> Tensor:
    """(4096, 25) cameras of synthetic heads, without drawing the heads."""
    import torch

    heads = synthetic_heads(sight, seed, 16, grid, "cpu").heads
    camera = heads.cameras(heads.numbers(torch.arange(LABEL_HEADS)))
    return camera.scaled(sight.radius).label()


def real_set(model: Any, sight: Sight, path: str, size: int) -> Any:
    """The data set at ``path`` as the model's method reads it, at a picture size, without its cache."""
    from facelab.methods import load_method

    if sight.conditioned:
        from facelab.data.eg3d_dataset import Eg3dDataset

        # not mirrored, whatever the training did: as the published distances are measured
        return Eg3dDataset(path, size, alpha=model.config.data.alpha, cache="none")
    config = model.config
    if sight.sphere:
        from facelab.data.thumbnails import open_pictures

        return open_pictures(path, size, size, flips=config.data.mirror, cache="none")
    changed = replace(
        config, data=replace(config.data, path=path, cache="none"), render=replace(config.render, resolution=size)
    )
    return load_method(model.method).pictures(changed)
