# SPDX-License-Identifier: Apache-2.0
"""Configuration of StyleSDF: defaults are those of FFHQ, stage ``volume``; ``PRESETS`` has the other recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from facelab.bases.stylesdf import training_config as training
from facelab.bases.stylesdf.data import PicturesConfig
from facelab.errors import UserError, nearest
from facelab.ranges import check_ranges
from facelab.rendering.settings import RenderSettings
from facelab.training.config import CheckpointConfig

if TYPE_CHECKING:
    from torch import Tensor

    from facelab.bases.stylesdf.model import SdfGeneratorConfig
    from facelab.cameras.camera import Angles, Camera
    from facelab.cameras.sphere import SpherePrior
    from facelab.nn.skip_decoder import SkipDecoderConfig
    from facelab.rendering.sdf import SdfOptions

Stage = Literal["volume", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """Generator: the field of both stages, the decoder of the full one."""

    latent_dim: int = 256
    style_dim: int = 256
    mapping_layers: int = 3
    width: int = 256  # of the field's layers
    layers: int = 8  # depth: before the signed distance
    density: Literal["sdf", "raw"] = "sdf"  # raw: no_sdf
    normalize_points: bool = True  # False: no_z_normalize
    resolution: int = 1024  # size: side of the decoder's pictures, pixels
    channel_multiplier: int = 2
    channel_max: int | None = None  # limit of the decoder's channel counts; null = the published ones
    decoder_mapping_layers: int = 5
    decoder_lr_mul: float = 0.01  # lr_mapping
    half_blocks: int = 0  # of the decoder's highest resolutions in half precision on a GPU
    clamp: float | None = None  # of the decoder's layers; half precision wants one, 256 is usual

    def __post_init__(self) -> None:
        check_ranges(
            "model", self,
            counts=(
                "latent_dim", "style_dim", "mapping_layers", "width", "layers", "channel_multiplier", "channel_max",
                "decoder_mapping_layers",
            ),
            positive=("decoder_lr_mul", "clamp"), not_negative=("half_blocks",), powers_of_two=("resolution",),
        )  # fmt: skip


@dataclass(frozen=True)
class ViewConfig:
    """Cameras on the unit sphere around the head; angles in radians."""

    distribution: Literal["gaussian", "uniform"] = "gaussian"
    azimuth: float = 0.3  # standard deviation, or half the range of uniform
    elevation: float = 0.15
    fov: float = 12.0  # degrees, full (the original's flag is half of it)
    dist_radius: float = 0.12  # half of far - near, scene units

    def __post_init__(self) -> None:
        check_ranges("view", self, not_negative=("azimuth", "elevation"))
        if not 0 < self.fov < 180:
            raise ValueError(f"view.fov must lie within 0..180 degrees, got {self.fov}")
        if not 0 < self.dist_radius < 1:
            raise ValueError(f"view.dist_radius must lie within 0..1, got {self.dist_radius}")

    @property
    def near(self) -> float:
        """First depth along the axis, scene units."""
        return 1 - self.dist_radius

    @property
    def far(self) -> float:
        """Last depth along the axis, scene units."""
        return 1 + self.dist_radius

    @property
    def prior(self) -> SpherePrior:
        """The distribution of training cameras."""
        from facelab.cameras.sphere import SpherePrior

        return SpherePrior(self.distribution, self.azimuth, self.elevation, self.fov)

    def cameras(self, pitch: Angles, yaw: Angles, fov: Tensor | float | None = None) -> Camera:
        """Cameras where :meth:`Camera.on_sphere` places them; ``fov`` in degrees, None = the configured one."""
        from facelab.cameras.camera import Camera

        return Camera.on_sphere(pitch, yaw, self.fov if fov is None else fov)


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering."""

    resolution: int = 64  # renderer_spatial_output_dim: side of thumbnails and feature maps, pixels
    samples: int = 24  # N_samples, per ray
    sampling: Literal["offset", "stratified"] = "offset"  # stratified: no_offset_sampling
    jitter: bool = True  # perturb, in training only
    density_noise: float = 0.0  # raw_noise_std, with model.density raw and in training only
    background: Literal["none", "last"] = "none"  # force_background, in training
    eval_background: Literal["none", "last"] = "last"  # the same for inference
    static_views: bool = False  # static_viewdirs, in training: the field sees directions in the camera's axes
    eval_static_views: bool = True  # the same for inference
    shape_resolution: int = 128  # lattice points across and along for shapes
    max_points: int = 400_000  # field evaluations at a time without gradient
    recompute: bool = False  # keep no activations of the renderer for the backward
    gradient: Literal["layers", "autograd"] = "layers"  # way to the distance's gradient; same numbers

    def __post_init__(self) -> None:
        check_ranges(
            "render", self, counts=("resolution", "samples", "shape_resolution", "max_points"),
            not_negative=("density_noise",),
        )  # fmt: skip

    def settings(
        self, view: ViewConfig, resolution: int | None = None, sample_factor: float = 1.0, *, training: bool = False
    ) -> RenderSettings:
        """Settings of one render.

        Args:
            view: near and far.
            resolution: side of the rendering in pixels; None: the configured one.
            sample_factor: on the samples per ray.
            training: random depths and density noise; without it depths are fixed and nothing flickers.
        """
        return RenderSettings(
            resolution=self.resolution if resolution is None else resolution,
            near=view.near,
            far=view.far,
            samples_coarse=round(self.samples * sample_factor),
            samples_fine=0,
            grid="centers",
            jitter=training and self.jitter,
            sigma_noise=self.density_noise if training else 0.0,
            density="softplus",
            background=self.background if training else self.eval_background,
            lock_view=self.static_views if training else self.eval_static_views,
            max_points=self.max_points,
            recompute=self.recompute,
        )

    def training_options(self) -> SdfOptions:
        """Sampling, and the values of single samples that the losses on signed distances need."""
        from facelab.rendering.sdf import SdfOptions

        return SdfOptions(self.sampling, samples=True, gradient=self.gradient)


@dataclass(frozen=True)
class StyleSdfConfig:
    """A StyleSDF run: the volume renderer alone, or the decoder on a frozen one."""

    stage: Stage = "volume"
    init_from: str = ""  # stage full: run folder or model of the volume stage
    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: training.DiscriminatorConfig = field(default_factory=training.DiscriminatorConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    sphere: training.SphereConfig = field(default_factory=training.SphereConfig)
    loss: training.LossConfig = field(default_factory=training.LossConfig)
    optim: training.OptimConfig = field(default_factory=training.OptimConfig)
    ema: training.EmaConfig = field(default_factory=training.EmaConfig)
    train: training.TrainConfig = field(default_factory=training.TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: training.LogConfig = field(default_factory=training.LogConfig)
    reference: training.ReferenceConfig = field(default_factory=training.ReferenceConfig)

    @property
    def field_cube(self) -> float:
        """Side of the cube around the origin that holds a head, scene units."""
        return 2 * self.view.dist_radius

    @property
    def near(self) -> float:
        """Distance from the camera at which the field begins, scene units."""
        return self.view.near

    @property
    def far(self) -> float:
        """Distance from the camera at which it ends."""
        return self.view.far


DEVIATIONS = training.volume_deviations("stylesdf")

# differences from the defaults: the released recipes
PRESETS: dict[str, dict[str, Any]] = {
    "ffhq_volume": {"train": {"batch_per_gpu": 12, "batch_chunk": 6}},
    "afhq_volume": {"view": {"azimuth": 0.15}, "train": {"batch_per_gpu": 12, "batch_chunk": 6}},
    "ffhq_full": {
        "stage": "full",
        "train": {"max_steps": training.FULL_STEPS, "batch_per_gpu": 8, "batch_chunk": 2},
    },
    "afhq_full": {
        "stage": "full",
        "model": {"resolution": 512},
        "view": {"azimuth": 0.15},
        "loss": {"r1": 50.0},
        "train": {"max_steps": training.FULL_STEPS, "batch_per_gpu": 8, "batch_chunk": 4},
    },
}


def preset(name: str) -> StyleSdfConfig:
    """The configuration of a released recipe. UserError for an unknown name.

    >>> preset("afhq_full").model.resolution
    512
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    config = StyleSdfConfig()
    changes = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in PRESETS[name].items()
    }
    return dataclasses.replace(config, **changes)


def generator_config(model: ModelConfig, view: ViewConfig, render: RenderConfig) -> SdfGeneratorConfig:
    """The architecture of the volume generator that a configuration describes."""
    from facelab.bases.stylesdf.model import SdfGeneratorConfig
    from facelab.fields.sdf import SdfFieldConfig

    return SdfGeneratorConfig(
        field=SdfFieldConfig(
            width=model.width,
            layers=model.layers,
            style_dim=model.style_dim,
            box_side=2 * view.dist_radius if model.normalize_points else None,
            density=model.density,
        ),
        latent_dim=model.latent_dim,
        mapping_layers=model.mapping_layers,
        sampling=render.sampling,
    )


def decoder_config(model: ModelConfig, render: RenderConfig) -> SkipDecoderConfig:
    """The architecture of the decoder. UserError where the pictures are smaller than the feature maps."""
    from facelab.nn.skip_decoder import SkipDecoderConfig

    try:
        return SkipDecoderConfig(
            size=model.resolution,
            in_resolution=render.resolution,
            in_channels=model.width,
            style_dim=model.style_dim,
            mapping_layers=model.decoder_mapping_layers,
            lr_mapping=model.decoder_lr_mul,
            channel_multiplier=model.channel_multiplier,
            channel_max=model.channel_max,
            half_blocks=model.half_blocks,
            clamp=model.clamp,
        )
    except ValueError as error:
        raise UserError(
            f"model.resolution {model.resolution}, render.resolution {render.resolution}: {error}"
        ) from error
