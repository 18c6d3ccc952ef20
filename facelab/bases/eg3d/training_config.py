# SPDX-License-Identifier: Apache-2.0
"""Settings of EG3D's training; defaults are those of FFHQ at 512 px (arXiv 2112.07945 and its program)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from facelab.deviations import Deviation
from facelab.nn.augment import AugmentConfig
from facelab.ranges import check_ranges
from facelab.training import config as training


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Discriminator; its resolution is the generator's."""

    dual: bool = True  # judges the raw rendering beside the image
    conditioned: bool = True  # judges pictures with their camera
    channel_base: int = 32768  # channels at resolution r: channel_base / r, at most channel_max
    channel_max: int = 512
    half_blocks: int = 4  # of the highest resolutions in half precision on a GPU
    clamp: float | None = 256.0  # of activations
    group_size: int = 4  # samples of a minibatch statistic; a divisor of train.batch_chunk
    freeze_layers: int = 0  # first layers that are not trained (fine-tuning)
    label_noise: float = 0.0  # noise on the camera labels, in standard deviations of the data's

    def __post_init__(self) -> None:
        check_ranges(
            "discriminator", self, counts=("channel_base", "channel_max", "group_size"), positive=("clamp",),
            not_negative=("half_blocks", "freeze_layers", "label_noise"),
        )  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Training pictures with cameras."""

    path: str = ""  # zip or folder with dataset.json; empty = synthetic heads made on the fly
    mirror: bool = False  # mirror half of the samples, cameras too
    alpha: Literal["black", "white"] = "black"  # ground under transparent pixels, and behind synthetic heads
    cache: str = "auto"  # none, memory, auto, or a folder for memory-mapped arrays
    max_size: int | None = None  # use that many random pictures
    heads: int = 20_000  # synthetic heads when path is empty, seen from view.radius with view.focal
    heads_yaw_std: float = 0.3  # of their cameras around the frontal view, radians
    heads_pitch_std: float = 0.155

    def __post_init__(self) -> None:
        check_ranges("data", self, counts=("max_size", "heads"), not_negative=("heads_yaw_std", "heads_pitch_std"))


@dataclass(frozen=True)
class LossConfig:
    """Losses and what is done to the pictures that the discriminator sees."""

    r1_gamma: float = 1.0  # gamma: times 0.5 |grad D|^2 on real pictures
    r1_every: int = 16  # steps
    r1_raw: bool = True  # the gradient with respect to the raw picture counts too (dual discrimination)
    raw_filter: Literal["antialiased", "classic", "none"] = "antialiased"  # how real pictures become raw ones
    density_weight: float = 0.25  # density_reg; 0 = no regulariser
    density_every: int = 4  # steps
    density_distance: float = 0.004  # standard deviation of the distance between neighbouring points, scene units
    density_type: Literal["l1", "tv", "monotonic-detach", "monotonic-fixed"] = "l1"  # reg_type; tv is ours
    density_points: int = 1000  # pairs per sample
    monotonic_weight: float = 10.0
    monotonic_points: int = 2000
    blur_sigma: float = 10.0  # pixels at the start
    blur_fade_kimg: float = 200.0  # until there is no blur, for a batch of 32, in proportion for others
    style_mixing: float = 0.0  # probability

    def __post_init__(self) -> None:
        check_ranges(
            "loss", self, counts=("r1_every", "density_every", "density_points", "monotonic_points"),
            not_negative=(
                "r1_gamma", "density_weight", "density_distance", "monotonic_weight", "blur_sigma", "blur_fade_kimg",
            ),
            shares=("style_mixing",),
        )  # fmt: skip


@dataclass(frozen=True)
class ResolutionConfig:
    """Side of the neural rendering in training, pixels; ``render.resolution`` is that of inference."""

    initial: int = 64  # neural_rendering_resolution_initial
    final: int | None = None  # neural_rendering_resolution_final; null = constant
    fade_kimg: float = 1000.0  # neural_rendering_resolution_fade_kimg

    def __post_init__(self) -> None:
        check_ranges("neural", self, counts=("initial", "final"), not_negative=("fade_kimg",))


@dataclass(frozen=True)
class ConditioningConfig:
    """What the generator is told of the camera."""

    pose: bool = True  # gen_pose_cond; False = zeros
    swap: float | None = 0.5  # gpc_reg_prob: final probability of a foreign camera; null = never swapped
    swap_fade_kimg: float = 1000.0  # from always swapped to ``swap``

    def __post_init__(self) -> None:
        check_ranges("conditioning", self, shares=("swap",), not_negative=("swap_fade_kimg",))


@dataclass(frozen=True)
class AugmentationConfig:
    """Adaptive augmentation of what the discriminator sees."""

    mode: Literal["none", "fixed", "ada"] = "none"  # aug
    p: float = 0.2  # probability of mode fixed; ada starts at 0
    target: float = 0.6  # of ada: mean sign of D(real)
    kimg: float = 500.0  # of ada: thousand images in which p could go from 0 to 1
    interval: int = 4  # of ada: steps between changes of p
    strengths: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_ranges("augment", self, counts=("interval",), positive=("kimg",), shares=("p",))


@dataclass(frozen=True)
class OptimConfig:
    """Adam."""

    generator_lr: float = 0.0025  # glr
    discriminator_lr: float = 0.002  # dlr
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_ranges(
            "optim", self, positive=("eps",), not_negative=("generator_lr", "discriminator_lr"), decays=("betas",)
        )


@dataclass(frozen=True)
class EmaConfig:
    """Average of the generator."""

    half_life_kimg: float = 10.0  # for a batch of 32, in proportion for others
    rampup: float | None = 0.05  # at most this share of the images so far; null = no ramp (fine-tuning)

    def __post_init__(self) -> None:
        check_ranges("ema", self, not_negative=("half_life_kimg", "rampup"))


@dataclass(frozen=True)
class TrainConfig(training.TrainConfig):
    """How long, how large, how exact."""

    max_steps: int = 781_250  # 25 million images in batches of 32
    batch_per_gpu: int = 4
    batch_chunk: int = 4
    half: Literal["none", "fp16", "bf16"] = "fp16"  # number type of the marked blocks on a GPU
    loss_scale: float = 64.0  # lifts the gradients of 512 px pictures off the smallest halves, far from the largest
    half_everywhere: bool = False  # in all blocks, not in the marked ones alone
    channels_last: bool = False  # memory layout of the convolutions; changes speed, not results
    exact_density: bool = True  # no TF32 in the density regulariser: it takes differences of near-equal densities
    nan: Literal["skip", "stop", "reference"] = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("train", self, positive=("loss_scale",))
        training.check_exact(self.precision, "EG3D lowers chosen blocks only, see train.half")


@dataclass(frozen=True)
class LogConfig(training.LogConfig):
    """What is told, and the sample grids."""

    sample_heads: int = 16  # heads per grid

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("log", self, counts=("sample_heads",))


@dataclass(frozen=True)
class ReferenceConfig:
    """Switches that restore what the original does where it is wrong; see DEVIATIONS in config.py."""

    strided_groups: bool = False
    roll_partners: bool = False
    density_cube: bool = False
    chunk_label_noise: bool = False
    sum_chunks: bool = False
    windowed_order: bool = False
    batch_depth: bool = False
    random_inference: bool = False
    sheared_lattice: bool = False
    legacy_raw: bool = False


TRAINING_DEVIATIONS = [
    Deviation(
        "eg3d",
        "strided_groups",
        "the original's minibatch statistics compare samples that lie batch / group apart; ours compare neighbours, "
        "so that chunks of a batch give what the whole batch gives",
    ),
    Deviation(
        "eg3d",
        "roll_partners",
        "the original swaps the conditioning camera with that of the next sample of the same chunk, which does nothing "
        "for chunks of one; ours draws it from the data set",
    ),
    Deviation(
        "eg3d",
        "density_cube",
        "the original regularises the density at points of the cube of side 2 whatever the box; ours takes points of "
        "the box",
    ),
    Deviation(
        "eg3d",
        "chunk_label_noise",
        "the original scales the label noise by the deviation within a chunk; ours by that of the data set",
    ),
    Deviation(
        "eg3d",
        "sum_chunks",
        "the original adds up the gradients of the chunks of a process, so that their scale grows with their number; "
        "we average",
    ),
    Deviation(
        "eg3d",
        "windowed_order",
        "the original reshuffles the data by exchanging neighbours, reaching a position means replaying all before; "
        "ours permutes each epoch",
    ),
]
