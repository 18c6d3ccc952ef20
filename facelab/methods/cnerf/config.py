# SPDX-License-Identifier: Apache-2.0
"""Configuration of CNeRF: defaults are those of the released model and of the authors' recipes (FFHQ at 512 px)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from facelab.bases.stylesdf import training_config as training
from facelab.bases.stylesdf.data import PicturesConfig
from facelab.deviations import Deviation
from facelab.ranges import check_ranges
from facelab.rendering.settings import RenderSettings
from facelab.training.config import CheckpointConfig

if TYPE_CHECKING:
    from torch import Tensor

    from facelab.cameras.camera import Angles, Camera
    from facelab.cameras.sphere import SpherePrior
    from facelab.methods.cnerf.model import CNerfGeneratorConfig

STAGES = ("volume", "full")
SPHERE_OF_RADIUS = 0.5  # radius of the initial sphere over camera.radius


@dataclass(frozen=True)
class ModelConfig:
    """Generator."""

    stage: Literal["volume", "full"] = "volume"  # volume: the rendering is the picture; full: a decoder draws it
    resolution: int = 512  # size: side of the decoder's picture, pixels
    regions: int = 9  # n_render, n_wcode
    depth: int = 3  # shape layers of a local generator
    width: int = 128
    style_dim: int = 256
    mapping_layers: int = 3
    normalize: bool = True  # points are divided by camera.radius; off: no_z_normalize
    sampling: Literal["offset", "stratified"] = "offset"  # stratified: no_offset_sampling
    transfer_channels: int = 256  # what the decoder reads of a rendering
    channel_multiplier: int = 2  # of the decoder
    channel_max: int | None = None  # limit of its channels
    lr_mapping: float = 0.01  # learning rate multiplier of its mapping network
    half_blocks: int = 0  # of its highest resolutions in half precision on a GPU
    clamp: float | None = None  # of its convolutions; half precision wants 256

    def __post_init__(self) -> None:
        check_ranges(
            "model", self,
            counts=(
                "regions", "depth", "width", "style_dim", "mapping_layers", "transfer_channels", "channel_multiplier",
                "channel_max",
            ),
            positive=("lr_mapping", "clamp"), not_negative=("half_blocks",), powers_of_two=("resolution",),
        )  # fmt: skip


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Discriminators: global and of one region in the first stage, of picture and semantics in the second."""

    group_size: int = 4  # samples of a minibatch statistic; a divisor of what is judged in one pass
    chunk: int | None = None  # samples judged in one pass; null = train.batch_chunk
    channel_multiplier: int = 2  # of the second stage's
    channel_max: int | None = None  # limit of all channels
    channels_last: bool = False  # memory layout; changes speed, not results
    half_blocks: int = 0  # second stage: so many of the highest resolutions in half precision on a GPU
    clamp: float | None = None  # second stage: limit of activations; half precision wants one, 256 is usual

    def __post_init__(self) -> None:
        check_ranges(
            "discriminator", self, counts=("group_size", "chunk", "channel_multiplier", "channel_max"),
            positive=("clamp",), not_negative=("half_blocks",),
        )  # fmt: skip


@dataclass(frozen=True)
class CameraConfig:
    """Cameras on the unit sphere around the origin, and the range of depths; radians and scene units."""

    mode: Literal["gaussian", "uniform"] = "gaussian"  # uniform: the flag of that name
    azimuth: float = 0.3  # azim: standard deviation, or half the range
    elevation: float = 0.15  # elev
    fov: float = 12.0  # full, degrees; the original's flag is half of it
    radius: float = 0.12  # dist_radius: near is 1 - radius, far 1 + radius

    def __post_init__(self) -> None:
        check_ranges("camera", self, not_negative=("azimuth", "elevation"))
        if not 0 < self.fov < 180:
            raise ValueError(f"camera.fov must lie within 0..180 degrees, got {self.fov}")
        if not 0 < self.radius < 1:
            raise ValueError(f"camera.radius must lie within 0..1, got {self.radius}")

    def prior(self) -> SpherePrior:
        """The distribution of training cameras."""
        from facelab.cameras.sphere import SpherePrior

        return SpherePrior(self.mode, self.azimuth, self.elevation, self.fov)

    def cameras(self, pitch: Angles, yaw: Angles, fov: Tensor | float | None = None) -> Camera:
        """Cameras as :meth:`Camera.on_sphere` places them; ``fov`` in degrees, None = the configured one."""
        from facelab.cameras.camera import Camera

        return Camera.on_sphere(pitch, yaw, self.fov if fov is None else fov)


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering."""

    resolution: int = 64  # renderer_spatial_output_dim: side of the rendering, pixels
    samples: int = 24  # N_samples, per ray in training
    inference_samples: int = 32  # per ray for pictures, times --ray_step_multiplier (2: the original's 64)
    jitter: bool = True  # perturb: random depths in training
    static_training: bool = False  # static_viewdirs, in training: as static_views
    static_views: bool = True  # at inference the field sees view directions in the camera's own axes
    max_points: int = 2_400_000  # evaluations of a local generator at a time without gradient
    recompute: bool = False  # keep no activations of the field for the backward
    precision: Literal["fp32", "fp16"] = "fp32"  # what the products of the field take; fp16 for tensor cores of a GPU
    fused: bool = False  # compile the passes of the first stage's generator step, for a GPU

    def __post_init__(self) -> None:
        check_ranges("render", self, counts=("resolution", "samples", "inference_samples", "max_points"))

    def settings(
        self, radius: float, resolution: int | None = None, samples: int | None = None, *, training: bool = False
    ) -> RenderSettings:
        """Settings of one render.

        Args:
            radius: the cameras'.
            resolution: side of the rendering in pixels; None: the configured one.
            samples: per ray; None: the configured ones.
            training: random depths and world view directions; without it pictures do not flicker.
        """
        count = self.samples if training else self.inference_samples
        return RenderSettings(
            resolution=self.resolution if resolution is None else resolution,
            near=1 - radius,
            far=1 + radius,
            samples_coarse=count if samples is None else samples,
            samples_fine=0,
            grid="centers",
            jitter=training and self.jitter,
            lock_view=self.static_training if training else self.static_views,
            max_points=self.max_points,
            recompute=self.recompute,
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses."""

    view: float = 15.0  # view_lambda: azimuth and elevation that the global discriminator reads
    eikonal: float = 0.1  # eikonal_lambda
    surface: float = 0.001  # min_surf_lambda
    surface_sharpness: float = 100.0  # min_surf_beta, 1 / scene unit
    sphere: float = 0.0  # of the distance from the first sphere, none in the original; fades over sphere_steps
    sphere_steps: int = 0
    semantic: float = 1.0  # Semantic_D_lambda: all terms of the discriminator of one region
    r1_image: float = 10.0  # r1_img: times 0.5 |grad D|^2
    r1_semantics: float = 1000.0  # r1_seg
    r1_every: int = 16  # d_reg_every: steps, second stage
    path_weight: float = 2.0  # path_regularize, second stage
    path_every: int = 4  # g_reg_every: steps
    path_shrink: int = 2  # path_batch_shrink: the batch is divided by it
    path_decay: float = 0.01  # of the running mean length
    mixing: float = 0.9  # probability that a batch mixes two codes

    def __post_init__(self) -> None:
        weights = ("view", "eikonal", "surface", "sphere", "semantic", "r1_image", "r1_semantics", "path_weight")
        check_ranges(
            "loss", self, counts=("r1_every", "path_every", "path_shrink"),
            positive=("surface_sharpness", "path_decay"), shares=("mixing", "path_decay"),
            not_negative=(*weights, "sphere_steps"),
        )  # fmt: skip


@dataclass(frozen=True)
class SphereConfig:
    """First steps of the first stage: the base shape becomes a sphere."""

    steps: int = 10_000  # 0: no_sphere_init
    beta: float = 0.1  # first width of the surface, scene units; it is learned
    residuals: bool = (
        False  # the regions learn their share too: untrained ones move the surface by more than its radius
    )

    def __post_init__(self) -> None:
        check_ranges("sphere", self, positive=("beta",), not_negative=("steps",))


@dataclass(frozen=True)
class TrainConfig(training.TrainConfig):
    """How long, how large, how exact; defaults of the first stage."""

    max_steps: int = 300_001
    batch_per_gpu: int = 4
    batch_chunk: int = 4


@dataclass(frozen=True)
class ReferenceConfig:
    """Switches that restore what the original does where it is wrong; see DEVIATIONS."""

    residual_eikonal: bool = False
    double_truncation: bool = False
    features_only: bool = False
    lopsided_brows: bool = False
    sum_chunks: bool = False
    strided_groups: bool = False


DEVIATIONS = [
    Deviation(
        "cnerf",
        "residual_eikonal",
        "the original's eikonal term sees the gradient of the regions' residuals without the base shape they are added "
        "to; ours sees that of the whole distance",
    ),
    Deviation(
        "cnerf",
        "double_truncation",
        "the original truncates codes twice (a ratio of 0.7 acts as 0.49) and the decoder's style once more; ours "
        "truncates once",
    ),
    Deviation(
        "cnerf",
        "features_only",
        "with a choice of regions the original restricts the decoder's features only, masks and density stay whole; ours "
        "takes the other regions away",
    ),
    Deviation(
        "cnerf",
        "lopsided_brows",
        "the original widens the brows of the data by an even square, one pixel up and left but two down and right; ours "
        "by a symmetric one",
    ),
    *(entry for entry in training.volume_deviations("cnerf") if entry.switch in ("sum_chunks", "strided_groups")),
]


@dataclass(frozen=True)
class CnerfConfig:
    """A CNeRF run: the volume renderer, or the decoder on a frozen one (``model.stage``)."""

    init_from: str = ""  # stage full: run folder, model or original file of the volume stage; "untrained" = none
    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: training.OptimConfig = field(default_factory=training.OptimConfig)
    ema: training.EmaConfig = field(default_factory=training.EmaConfig)
    sphere: SphereConfig = field(default_factory=SphereConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: training.LogConfig = field(default_factory=training.LogConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


def generator_config(config: CnerfConfig) -> CNerfGeneratorConfig:
    """The architecture that a configuration describes. ValueError where sizes do not fit together."""
    from facelab.methods.cnerf.field import CNerfFieldConfig
    from facelab.methods.cnerf.model import CNerfGeneratorConfig
    from facelab.nn.skip_decoder import SkipDecoderConfig

    m, reference = config.model, config.reference
    decoder = None
    if m.stage == "full":
        decoder = SkipDecoderConfig(
            size=m.resolution,
            in_resolution=config.render.resolution,
            in_channels=m.transfer_channels,
            style_dim=m.style_dim,
            lr_mapping=m.lr_mapping,
            channel_multiplier=m.channel_multiplier,
            channel_max=m.channel_max,
            semantic_channels=m.regions,
            half_blocks=m.half_blocks,
            clamp=m.clamp,
        )
    return CNerfGeneratorConfig(
        field=CNerfFieldConfig(
            regions=m.regions,
            depth=m.depth,
            width=m.width,
            style_dim=m.style_dim,
            box_side=2 * config.camera.radius if m.normalize else None,
        ),
        mapping_layers=m.mapping_layers,
        sampling=m.sampling,
        decoder=decoder,
        residual_eikonal=reference.residual_eikonal,
        double_truncation=reference.double_truncation,
        features_only=reference.features_only,
    )


def sphere_radius(config: CnerfConfig) -> float:
    """Radius of the initial sphere in scene units: a quarter of far minus near.

    >>> sphere_radius(CnerfConfig())
    0.06
    """
    return SPHERE_OF_RADIUS * config.camera.radius
