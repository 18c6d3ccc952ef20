# SPDX-License-Identifier: Apache-2.0
"""Configuration of pi-GAN; FENeRF extends it. Defaults are those of the paper's CelebA model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from facelab.deviations import Deviation
from facelab.ranges import check_ranges
from facelab.training import config as training
from facelab.training.config import CheckpointConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from facelab.cameras.camera import Angles, Camera


@dataclass(frozen=True)
class ModelConfig:
    """Generator."""

    variant: str = "SPATIALSIRENBASELINE"  # named architecture, see facelab/bases/pigan/variants.py
    hidden: int | None = None  # width of the field; None = the variant's
    grid_size: list[int] | None = None  # cells of the latent grid along z, y, x; None = the variant's
    latent_dim: int = 256  # width of each latent code
    mapping_hidden: int = 256
    mapping_linears: int = 4  # one for the output, at least one before it

    def __post_init__(self) -> None:
        check_ranges("model", self, counts=("hidden", "grid_size", "latent_dim", "mapping_hidden"))
        if self.mapping_linears < 2:
            raise ValueError(f"model.mapping_linears must be at least 2, got {self.mapping_linears}")
        if self.grid_size is not None and len(self.grid_size) != 3:
            raise ValueError(
                f"model.grid_size must be three counts (z, y, x), such as [16,16,16], got {self.grid_size}"
            )


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Discriminators; all of a method share the architecture and differ in their input channels."""

    kind: str = "CCSEncoderDiscriminator"  # named architecture
    channels: list[int] | None = None  # channels after fromRGB and each block; None = the named architecture's
    channels_last: bool = False  # memory layout; changes speed, not results
    chunk: int | None = None  # samples per pass of a discriminator's phase; null = train.batch_chunk

    def __post_init__(self) -> None:
        check_ranges("discriminator", self, counts=("channels", "chunk"))
        if self.channels is not None and len(self.channels) < 2:
            raise ValueError(f"discriminator.channels must be two counts or more, or null, got {self.channels}")


@dataclass(frozen=True)
class DataConfig:
    """Training pictures."""

    path: str = ""  # folder (or glob for pi-GAN); empty = synthetic heads made on the fly
    chain: Literal["celeba", "cats", "carla"] = "celeba"  # pi-GAN's preprocessing
    crop: float | None = None  # middle square over the picture's short side; None = stated by the data, or the chain's
    background_mask: bool = True  # blacken the background (data sets with masks)
    cache: str = "auto"  # none, memory, auto, or a folder for memory-mapped arrays
    heads: int = 20_000  # synthetic heads when path is empty

    def __post_init__(self) -> None:
        check_ranges("data", self, counts=("heads",), positive=("crop",), shares=("crop",))


@dataclass(frozen=True)
class CameraConfig:
    """Camera prior on the unit sphere; angles in radians, the field of view in degrees."""

    distribution: Literal[
        "uniform", "gaussian", "normal", "hybrid", "truncated_gaussian", "spherical_uniform", "fixed"
    ] = "gaussian"
    yaw_mean: float = math.pi / 2
    yaw_std: float = 0.3
    pitch_mean: float = math.pi / 2
    pitch_std: float = 0.155
    fov: float = 12.0

    def __post_init__(self) -> None:
        check_ranges("camera", self, positive=("fov",), not_negative=("yaw_std", "pitch_std"))
        if self.fov >= 180:
            raise ValueError(f"camera.fov must be below 180 degrees, got {self.fov}")

    def cameras(self, pitch: Angles, yaw: Angles, fov: Tensor | float | None = None) -> Camera:
        """Cameras as :meth:`Camera.on_sphere` places them; ``fov`` in degrees, None = the configured one."""
        from facelab.cameras.camera import Camera

        return Camera.on_sphere(pitch, yaw, self.fov if fov is None else fov)


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering in training; inference starts from these too."""

    resolution: int = 64  # pixels
    near: float = 0.88  # scene units along the ray
    far: float = 1.12
    samples: int = 12  # per ray in the first pass
    hierarchical: bool = True  # as many importance samples again
    density: Literal["relu", "softplus"] = "relu"  # activation of raw density
    background: Literal["none", "last", "white", "black"] = "none"  # where rays meet nothing
    eval_background: Literal["none", "last", "white", "black"] = "none"  # the same for inference
    noise_steps: int = 5000  # steps over which the density noise falls from 1 to 0
    coarse_gradient: bool = True  # False evaluates coarse samples without gradient
    precision: Literal["fp32", "tf32", "fp16", "autocast"] = "fp32"  # of the field (fp16 fused, autocast the run's)
    max_points: int = 2_400_000  # field evaluations at a time without gradient
    recompute: bool = False  # keep no activations for the backward

    def __post_init__(self) -> None:
        check_ranges(
            "render", self, counts=("resolution", "max_points"), positive=("near",), not_negative=("noise_steps",)
        )
        if self.samples < 3:
            raise ValueError(f"render.samples must be at least 3, got {self.samples}")
        if self.far <= self.near:
            raise ValueError(
                f"render.near and render.far must satisfy 0 < near < far, got near={self.near}, far={self.far}"
            )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses (pi-GAN section 3.3, supplement)."""

    r1: float = 0.2  # times 0.5 |grad D|^2 on real pictures
    latent: dict[str, float] = field(default_factory=lambda: {"z": 0.0})  # reconstruction of each code by D
    pose: float = 15.0  # reconstruction of pitch and yaw by D
    real_pose: float = 0.0  # the same on real pictures whose cameras are known (ours; not in the original)
    topk_interval: int = 2000  # steps per factor 0.99 of the kept share of fakes
    topk_floor: float = 0.6  # least share of fakes that train the generator
    fade_steps: int = 10_000  # steps of fading in after each change of resolution

    def __post_init__(self) -> None:
        check_ranges(
            "loss",
            self,
            counts=("topk_interval",),
            not_negative=("r1", "latent", "pose", "real_pose", "fade_steps"),
            positive=("topk_floor",),
            shares=("topk_floor",),
        )


@dataclass(frozen=True)
class OptimConfig:
    """Adam."""

    generator_lr: float = 6e-5
    image_lr: float = 2e-4  # image discriminator
    betas: tuple[float, float] = (0.0, 0.9)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_ranges("optim", self, not_negative=(name for name in vars(self) if name != "betas"), decays=("betas",))


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving averages of the generator."""

    decay: float = 0.999  # `ema`, the one that inference uses
    slow_decay: float = 0.9999  # `ema_slow`

    def __post_init__(self) -> None:
        check_ranges("ema", self, decays=("decay", "slow_decay"))


@dataclass(frozen=True)
class LogConfig(training.LogConfig):
    """What is told, and the sample grids."""

    sample_heads: int = 25  # heads per grid
    sample_size: int | None = None  # pixels; null = as trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("log", self, counts=("sample_heads", "sample_size"))


@dataclass(frozen=True)
class ReferenceConfig:
    """Switches that restore what the original does where it is wrong; see DEVIATIONS."""

    sum_chunks: bool = False
    data_chain: bool = False
    sheared_lattice: bool = False
    random_inference: bool = False


@dataclass(frozen=True)
class PiganConfig:
    """A pi-GAN run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(grad_clip=10.0))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


DATA_CHAIN = "the original resizes training pictures without antialiasing; we average over each pixel's area"


def siren_deviations(method: str, data_chain: str = DATA_CHAIN) -> list[Deviation]:
    """What pi-GAN and FENeRF share; ``data_chain`` says what the original's preprocessing does wrong."""
    return [
        Deviation(
            method,
            "sum_chunks",
            "the original sums the generator loss over its chunks, so that its scale grows with their number; "
            "we average",
        ),
        Deviation(method, "data_chain", data_chain),
        Deviation(
            method,
            "sheared_lattice",
            "the original's shape lattice is sheared by up to one voxel; ours is straight",
        ),
        Deviation(
            method,
            "random_inference",
            "the original draws random depths at inference, videos flicker; ours are fixed",
        ),
    ]


DEVIATIONS = siren_deviations("pigan")
