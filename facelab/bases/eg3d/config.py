# SPDX-License-Identifier: Apache-2.0
"""Configuration of EG3D: defaults are those of FFHQ at 512 px, ``PRESETS`` has the other data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from facelab.bases.eg3d import training_config as training
from facelab.cameras.camera import Angles, Camera
from facelab.cameras.orbit import focal_intrinsics, look_at
from facelab.deviations import Deviation
from facelab.errors import UserError, nearest
from facelab.ranges import check_ranges
from facelab.rendering.settings import RenderSettings
from facelab.training.config import CheckpointConfig

if TYPE_CHECKING:
    from facelab.bases.eg3d.model import TriPlaneGeneratorConfig

SUPERRESOLUTION_OF = {512: "8xdc", 256: "4x", 128: "2x"}  # picture side -> what the original takes
SUPERRESOLUTION_SIDES = {"2x": 128, "4x": 256, "8x": 512, "8xdc": 512}


@dataclass(frozen=True)
class ModelConfig:
    """Generator."""

    resolution: int = 512  # side of the picture, pixels
    superresolution: str = "auto"  # 2x, 4x, 8x, 8xdc, none, or auto: by the resolution
    superresolution_half: int = 4  # sr_num_fp16_res: above 0, its blocks in half precision and limited
    superresolution_antialias: bool = True  # sr_antialias: low-pass before a larger rendering is made smaller
    superresolution_noise: Literal["none", "random", "const"] = "none"  # sr_noise_mode
    latent_dim: int = 512
    style_dim: int = 512
    mapping_layers: int = 2  # map-depth
    plane_resolution: int = 256
    plane_channels: int = 32
    axes: Literal["xy_xz_zx", "xy_xz_zy", "xy_yz_zx"] = "xy_xz_zy"  # released weights need xy_xz_zx
    aggregation: Literal["mean", "concat"] = "mean"
    box_side: float = 1.0  # box_warp: cube that the planes cover, scene units
    decoder_hidden: int = 64
    features: int = 32  # channels of the rendering
    decoder_lr_mul: float = 1.0
    channel_base: int = 32768  # cbase
    channel_max: int = 512  # cmax
    half_blocks: int = 0  # g_num_fp16_res
    clamp: float | None = None  # of the backbone's convolutions; the original takes 256 with half_blocks > 0

    def __post_init__(self) -> None:
        check_ranges(
            "model", self,
            counts=(
                "resolution", "latent_dim", "style_dim", "mapping_layers", "plane_channels", "decoder_hidden",
                "channel_base", "channel_max",
            ),
            positive=("box_side", "clamp"),
            not_negative=("superresolution_half", "half_blocks", "decoder_lr_mul"),
            powers_of_two=("plane_resolution",),
        )  # fmt: skip
        if self.features < 3:
            raise ValueError(f"model.features must be at least 3, whose first are the colour, got {self.features}")
        known = ("auto", "none", *SUPERRESOLUTION_SIDES)
        if self.superresolution not in known:
            hint = nearest(self.superresolution, known)
            raise ValueError(f"model.superresolution is one of {', '.join(known)}, got {self.superresolution!r}.{hint}")
        kind = self.superresolution_kind
        side = None if kind is None else SUPERRESOLUTION_SIDES[kind]
        if side not in (None, self.resolution):
            raise ValueError(f"model.resolution is {self.resolution}, but super-resolution {kind} makes {side} pixels")

    @property
    def superresolution_kind(self) -> str | None:
        """Name of the super-resolution, None for none. ValueError where ``auto`` knows none."""
        if self.superresolution == "none":
            return None
        if self.superresolution != "auto":
            return self.superresolution
        if self.resolution not in SUPERRESOLUTION_OF:
            raise ValueError(
                f"model.resolution is {self.resolution}: no super-resolution makes that, use one of "
                f"{', '.join(map(str, SUPERRESOLUTION_OF))}, or model.superresolution=none"
            )
        return SUPERRESOLUTION_OF[self.resolution]


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering."""

    resolution: int = 64  # neural_rendering_resolution at inference, pixels
    near: float = 2.25  # ray_start, scene units along the ray
    far: float = 3.3  # ray_end
    box_limits: bool = False  # ray_start = ray_end = auto: each ray from where it enters the box to where it leaves
    samples: int = 48  # depth_resolution, per ray
    importance: int = 48  # depth_resolution_importance
    spacing: Literal["depth", "disparity"] = "depth"  # disparity_space_sampling
    background: Literal["none", "white"] = "none"  # white_back
    density_noise: float = 0.0  # standard deviation of the noise on raw density, in training only
    max_points: int = 500_000  # field evaluations at a time without gradient
    recompute: bool = False  # keep no activations of the renderer for the backward

    def __post_init__(self) -> None:
        check_ranges("render", self, counts=("resolution", "max_points"), not_negative=("importance", "density_noise"))

    def settings(
        self,
        box_side: float,
        resolution: int | None = None,
        sample_factor: float = 1.0,
        *,
        training: bool = False,
        reference: bool = False,
    ) -> RenderSettings:
        """Settings of one render.

        Args:
            box_side: the model's.
            resolution: side of the rendering in pixels; None: the configured one.
            sample_factor: on the samples per ray (``--sample_mult``).
            training: random depths and density noise; without it depths are fixed and nothing flickers.
            reference: the original's depth clamp and its limits for rays that miss the box.
        """
        return RenderSettings(
            resolution=self.resolution if resolution is None else resolution,
            near=self.near,
            far=self.far,
            samples_coarse=round(self.samples * sample_factor),
            samples_fine=round(self.importance * sample_factor),
            grid="centers",
            jitter=training,
            sigma_noise=self.density_noise if training else 0.0,
            density="softplus",
            background=self.background,
            max_points=self.max_points,
            recompute=self.recompute,
            spacing=self.spacing,
            box_side=box_side if self.box_limits else None,
            reference=reference,
        )


@dataclass(frozen=True)
class ViewConfig:
    """Where the cameras of a data set stand; scene units."""

    radius: float = 2.7  # avg_camera_radius
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # avg_camera_pivot: what the mean camera looks at
    focal: float = 4.2647  # over the image side

    def __post_init__(self) -> None:
        check_ranges("view", self, positive=("radius", "focal"))

    @property
    def fov(self) -> float:
        """Full horizontal field of view in degrees."""
        return 2 * math.degrees(math.atan(0.5 / self.focal))

    def cameras(self, pitch: Angles, yaw: Angles, fov: Tensor | float | None = None) -> Camera:
        """Cameras where :meth:`Camera.on_sphere` places them, looking at the pivot.

        ``fov`` is the full horizontal field of view in degrees, None = that of ``focal``.
        """
        sphere = Camera.on_sphere(pitch, yaw, self.fov if fov is None else fov, self.radius)
        position = sphere.cam2world[:, :3, 3]
        cam2world = look_at(position, torch.tensor(self.pivot, dtype=position.dtype))
        intrinsics = focal_intrinsics(self.focal, len(position)) if fov is None else sphere.intrinsics
        return Camera(cam2world, intrinsics, sphere.angles)


# differences from the defaults: rendering_kwargs of the original's --cfg
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "ffhq": {"model": {}, "render": {}, "view": {}},
    "afhq": {"model": {}, "render": {}, "view": {"pivot": (0.0, 0.0, -0.06)}},
    "shapenet": {
        "model": {"resolution": 128, "box_side": 1.6},
        "render": {"near": 0.1, "far": 2.6, "samples": 64, "importance": 64, "background": "white"},
        "view": {"radius": 1.7, "pivot": (0.0, 0.0, 0.0), "focal": 1.7074},
    },
}


def preset(name: str) -> tuple[ModelConfig, RenderConfig, ViewConfig]:
    """Generator, rendering and cameras of a data set. UserError for an unknown name.

    >>> preset("shapenet")[1].samples
    64
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    values = PRESETS[name]
    return ModelConfig(**values["model"]), RenderConfig(**values["render"]), ViewConfig(**values["view"])


def generator_config(
    model: ModelConfig, view: ViewConfig | None = None, *, pose_conditioning: bool = True, legacy_raw: bool = False
) -> TriPlaneGeneratorConfig:
    """The architecture that a configuration describes."""
    from facelab.bases.eg3d.model import ConditioningCamera, TriPlaneGeneratorConfig
    from facelab.fields.triplane import TriplaneConfig

    view = view or ViewConfig()
    return TriPlaneGeneratorConfig(
        field=TriplaneConfig(
            axes=model.axes,
            aggregation=model.aggregation,
            box_side=model.box_side,
            channels=model.plane_channels,
            hidden=model.decoder_hidden,
            features=model.features,
            decoder_lr_mul=model.decoder_lr_mul,
        ),
        z_dim=model.latent_dim,
        w_dim=model.style_dim,
        mapping_layers=model.mapping_layers,
        plane_resolution=model.plane_resolution,
        channel_base=model.channel_base,
        channel_max=model.channel_max,
        half_blocks=model.half_blocks,
        clamp=model.clamp,
        superresolution=model.superresolution_kind,
        superresolution_half=model.superresolution_half,
        superresolution_antialias=model.superresolution_antialias,
        superresolution_noise=model.superresolution_noise,
        legacy_raw=legacy_raw,
        pose_conditioning=pose_conditioning,
        camera=ConditioningCamera(view.radius, view.pivot, view.focal),
    )


RENDER_DEVIATIONS = [
    Deviation(
        "eg3d",
        "batch_depth",
        "the original clamps depths to the range of the whole batch and gives rays that miss the box the farthest entry "
        "as their end; ours clamps each ray to its own samples and takes the farthest exit",
    ),
    Deviation(
        "eg3d", "random_inference", "the original draws random depths at inference, videos flicker; ours are fixed"
    ),
    Deviation(
        "eg3d", "sheared_lattice", "the original's shape lattice is sheared by up to one voxel; ours is straight"
    ),
    Deviation(
        "eg3d",
        "legacy_raw",
        "the original's 2x and 4x super-resolution add their first RGB into the raw picture in place; ours leaves it",
    ),
]

DEVIATIONS = [*RENDER_DEVIATIONS, *training.TRAINING_DEVIATIONS]


@dataclass(frozen=True)
class Eg3dConfig:
    """An EG3D run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: training.DiscriminatorConfig = field(default_factory=training.DiscriminatorConfig)
    data: training.DataConfig = field(default_factory=training.DataConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    neural: training.ResolutionConfig = field(default_factory=training.ResolutionConfig)
    conditioning: training.ConditioningConfig = field(default_factory=training.ConditioningConfig)
    loss: training.LossConfig = field(default_factory=training.LossConfig)
    augment: training.AugmentationConfig = field(default_factory=training.AugmentationConfig)
    optim: training.OptimConfig = field(default_factory=training.OptimConfig)
    ema: training.EmaConfig = field(default_factory=training.EmaConfig)
    train: training.TrainConfig = field(default_factory=training.TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: training.LogConfig = field(default_factory=training.LogConfig)
    reference: training.ReferenceConfig = field(default_factory=training.ReferenceConfig)
