# SPDX-License-Identifier: Apache-2.0
"""Settings of StyleSDF's training; defaults are those of its program (arXiv 2112.11427, section 3.4 and supplement).

``stage`` of the run says which values hold: those named ``volume`` or ``full``, or both stages share them.
"""

from __future__ import annotations

from dataclasses import dataclass

from facelab.deviations import Deviation
from facelab.ranges import check_ranges
from facelab.training import config as training

VOLUME_STEPS, FULL_STEPS = 200_001, 300_000  # of the two stages; the original's --iter counts in the second alone
EMA_DECAY = 0.5 ** (32 / 10_000)  # half-life 10 000 images for a batch of 32, whatever the batch


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminators of both stages; their resolutions are those of thumbnails and pictures."""

    group_size: int = 4  # full: samples of a minibatch statistic; of chunks that it does not divide 3 or 2
    channel_max: int | None = None  # limit of all channel counts; null = the published ones
    clamp: float | None = None  # full: limit of activations; half precision wants one, 256 is usual
    half_blocks: int = 0  # full: so many of the highest resolutions in half precision on a GPU
    channels_last: bool = False  # memory layout; changes speed, not results

    def __post_init__(self) -> None:
        check_ranges(
            "discriminator",
            self,
            counts=("group_size", "channel_max"),
            positive=("clamp",),
            not_negative=("half_blocks",),
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses."""

    r1: float = 10.0  # times 0.5 |grad D|^2 on real pictures
    r1_every: int = 16  # steps, of the full stage; the volume stage takes it every step
    view: float = 15.0  # view_lambda: azimuth and elevation read by the volume stage's discriminator
    eikonal: float = 0.1  # eikonal_lambda: gradients of the signed distance have length 1
    surface: float = 0.05  # min_surf_lambda: few points lie near a surface
    surface_sharpness: float = 100.0  # min_surf_beta, 1 / scene unit
    sphere: float = 0.0  # of the distance from the first sphere, none in the original; fades over sphere_steps
    sphere_steps: int = 0
    path: float = 2.0  # path_regularize, of the full stage; 0 = no regulariser
    path_every: int = 4  # g_reg_every, steps
    path_shrink: int = 2  # path_batch_shrink: the regulariser sees a batch smaller by this factor, at least 1
    path_decay: float = 0.01  # of the running mean length
    mixing: float = 0.9  # probability that a batch has two latents

    def __post_init__(self) -> None:
        check_ranges(
            "loss", self, counts=("r1_every", "path_every", "path_shrink"),
            positive=("surface_sharpness", "path_decay"), shares=("mixing", "path_decay"),
            not_negative=("r1", "view", "eikonal", "surface", "sphere", "sphere_steps", "path"),
        )  # fmt: skip


@dataclass(frozen=True)
class SphereConfig:
    """The start of the volume stage: the field learns a sphere."""

    steps: int = 10_000  # 0 = none (no_sphere_init)
    batch: int = 3  # samples per step over all processes
    beta: float = 0.1  # first width of the surface, scene units; it is learned

    def __post_init__(self) -> None:
        check_ranges("sphere", self, counts=("batch",), positive=("beta",), not_negative=("steps",))


@dataclass(frozen=True)
class OptimConfig:
    """Adam of both stages."""

    volume_generator_lr: float = 2e-5
    volume_discriminator_lr: float = 2e-4
    volume_betas: tuple[float, float] = (0.0, 0.9)
    beta_factor: float = 1.0  # on the generator's rate, for the width of the surface
    full_lr: float = 0.002  # lr, of decoder and discriminator before the correction for lazy phases
    full_betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        rates = ("volume_generator_lr", "volume_discriminator_lr", "beta_factor", "full_lr")
        check_ranges("optim", self, positive=("eps",), not_negative=rates)
        for name in ("volume_betas", "full_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise ValueError(f"optim.{name} must be 0 or more and below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class EmaConfig:
    """Average of the generator, from the first step on."""

    decay: float = EMA_DECAY

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must lie in [0, 1), got {self.decay}")


@dataclass(frozen=True)
class TrainConfig(training.TrainConfig):
    """How long, how large, how exact."""

    max_steps: int = VOLUME_STEPS
    batch_per_gpu: int = 4  # batch
    batch_chunk: int = 4  # chunk

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_exact(
            self.precision,
            "sines of large arguments need it; lower discriminator.half_blocks and model.half_blocks instead",
        )


@dataclass(frozen=True)
class LogConfig(training.LogConfig):
    """What is told, and the sample grids."""

    samples_every: int = 1000  # steps
    sample_heads: int = 8  # heads per grid (val_n_sample)
    sample_views: int = 8  # azimuths of each
    sample_truncation: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("log", self, counts=("sample_views",), not_negative=("sample_heads",))


@dataclass(frozen=True)
class ReferenceConfig:
    """Switches that restore what the original does where it is wrong; see DEVIATIONS in config.py."""

    sum_chunks: bool = False
    strided_groups: bool = False
    double_truncation: bool = False
    random_inference: bool = False
    skewed_shapes: bool = False


def volume_deviations(method: str) -> list[Deviation]:
    """What StyleSDF and CNeRF share."""
    return [
        Deviation(
            method,
            "sum_chunks",
            "the original adds up the gradients of the chunks of a process, so that their scale grows with their "
            "number; we average",
        ),
        Deviation(
            method,
            "strided_groups",
            "the original's minibatch statistics compare samples that lie batch / group apart; ours compare "
            "neighbours, so that chunks of a batch give what the whole batch gives",
        ),
        Deviation(
            method,
            "double_truncation",
            "the original truncates the code and then the decoder's style made of it once more; ours truncates once, so "
            "that the stated ratio is the one that acts",
        ),
        Deviation(
            method,
            "random_inference",
            "the original draws new noise maps for each picture, views of a head differ; ours are the stored ones",
        ),
        Deviation(
            method,
            "skewed_shapes",
            "the original's shapes are off by half a cell and by n / (n - 1), and widen linearly with depth; ours lie "
            "where the field says",
        ),
    ]
