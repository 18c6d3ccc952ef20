# SPDX-License-Identifier: Apache-2.0
"""Settings of the training loop, the same for every method.

A method's configuration holds ``train: TrainConfig``, ``checkpoint: CheckpointConfig`` and ``log: LogConfig`` (or
subclasses with fields of its own). Rows of a curriculum may change any of them, except those of
:data:`RUN_CONSTANTS`, which hold for the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from facelab.errors import UserError
from facelab.ranges import check_ranges

RUN_CONSTANTS = (
    "seed",
    "precision",
    "loss_scale",
    "max_steps",
    "cuda_graphs",
    "nan",
    "nan_limit",
)  # of TrainConfig: read once, from the first stage
RESUME_MAY_CHANGE = (
    "train.max_steps",
    "train.workers",
    "train.cuda_graphs",
    "train.nan_limit",
    "checkpoint",
    "log",
)  # dotted keys or groups


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, for configurations that describe an optimiser in YAML."""

    lr: float = 2e-4  # per step
    betas: tuple[float, float] = (0.0, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lazy_correction: bool = True  # lr * m, beta ** m when a lazy phase shares the optimiser


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how exact."""

    seed: int = 0
    max_steps: int = 200_000  # iterations, counted from the start of the run
    batch_per_gpu: int = 24  # samples per process and step, used while batch_size is null
    batch_size: int | None = None  # samples per step over all processes; null = batch_per_gpu * processes
    batch_chunk: int = 6  # samples per forward and backward pass (less memory, same result)
    precision: Literal["fp32", "tf32", "tf32_convolutions", "fp16", "bf16"] = "fp32"
    loss_scale: float = 1.0  # constant factor on losses, taken out of their gradients; fp16 adapts its own instead
    grad_clip: float | None = None  # largest gradient norm of a phase; null = no clipping
    nan: Literal["skip", "stop", "reference"] = "skip"  # not finite: skip the update | stop | NaN 0, inf 1e5
    nan_limit: int = 3  # skipped steps in a row after which the run stops
    workers: int = 2  # processes or threads that read data, per process
    cuda_graphs: bool = False  # queue the kernels of a phase at once, and play them back at every step
    compile: bool = False  # methods compile the parts that are differentiated once

    def __post_init__(self) -> None:
        check_ranges(
            "train", self, counts=("max_steps", "batch_per_gpu", "batch_size", "batch_chunk", "nan_limit"),
            positive=("grad_clip",), not_negative=("workers",),
        )  # fmt: skip
        if abs(self.seed) >= 2**63:
            raise ValueError(f"train.seed must lie between -2^63 and 2^63, got {self.seed}")
        if not 0 < self.loss_scale < 2**24:
            raise ValueError(f"train.loss_scale must lie above 0 and below 2^24, got {self.loss_scale}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 1000  # steps
    keep_last: int = 3  # newest checkpoints that stay
    keep_every: int = 0  # steps; checkpoints at multiples stay for good, 0 = none
    max_shard_mb: int = 512  # MiB per file of optimiser state

    def __post_init__(self) -> None:
        check_ranges("checkpoint", self, counts=("every", "keep_last", "max_shard_mb"), not_negative=("keep_every",))


@dataclass(frozen=True)
class LogConfig:
    """What is told, and how often."""

    every: int = 50  # steps between lines; the only moments at which the loop waits for the device
    samples_every: int = 500  # steps between sample grids, 0 = none
    progress: bool = True  # a bar on the terminal
    tensorboard: bool = False  # needs the package tensorboard
    wandb: bool = False  # needs the package wandb
    wandb_project: str = "facelab"
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"

    def __post_init__(self) -> None:
        check_ranges("log", self, counts=("every",), not_negative=("samples_every",))


def check_exact(precision: str, remedy: str) -> None:
    """ValueError where a method whose networks need single precision (or choose for themselves) is to run in halves."""
    exact = ("fp32", "tf32", "tf32_convolutions")
    if precision not in exact:
        raise ValueError(f"train.precision is {precision}, expected {', '.join(exact[:-1])} or {exact[-1]}: {remedy}")


def global_batch(train: TrainConfig, processes: int) -> int:
    """Samples per step over all processes."""
    return train.batch_per_gpu * processes if train.batch_size is None else train.batch_size


def check_shares(batch_size: int, chunk: int, processes: int, what: str = "train.batch_chunk") -> None:
    """UserError unless every process gets the same whole number of chunks of a step."""
    if batch_size % (chunk * processes):
        raise UserError(
            f"a batch of {batch_size} in chunks of {chunk} cannot be shared by {processes} processes: expected a "
            f"multiple of {chunk * processes}; change train.batch_size, {what} or the number of processes"
        )


def may_change(key: str, allowed: tuple[str, ...] = RESUME_MAY_CHANGE) -> bool:
    """True for settings that a resumed run may have changed; ``stages[i].`` in front is ignored.

    >>> may_change("stages[1].log.every"), may_change("train.seed")
    (True, False)
    """
    if key.startswith("stages["):
        key = key.partition("].")[2]
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def sections(config: Any) -> tuple[TrainConfig, CheckpointConfig, LogConfig]:
    """The three groups of a method's configuration. TypeError names a group that is missing."""
    for name, kind in (("train", TrainConfig), ("checkpoint", CheckpointConfig), ("log", LogConfig)):
        if not isinstance(getattr(config, name, None), kind):
            raise TypeError(f"{type(config).__name__} must have a field '{name}' of type {kind.__name__}")
    return config.train, config.checkpoint, config.log
