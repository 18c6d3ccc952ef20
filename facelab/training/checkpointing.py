# SPDX-License-Identifier: Apache-2.0
"""A run's state in and out of checkpoints: networks, averages, optimisers, scale, position, random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facelab.checkpoints.format import (
    Checkpoint,
    checkpoint_folder,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from facelab.config import StagedConfig, diff, from_dict, to_dict
from facelab.errors import UserError
from facelab.training.config import RESUME_MAY_CHANGE, CheckpointConfig, may_change
from facelab.training.distributed import Distributed
from facelab.training.ema import Ema
from facelab.training.optimizers import PhaseOptimizer
from facelab.training.precision import LossScale
from facelab.training.protocol import Models


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: finished iterations.
        images: samples consumed over all processes; the data position.
        warmup_step: finished iterations of the warm-up.
        starts: (step, images) at which each curriculum row so far began.
        processes: number of processes with which the run began; fixes the global batch where only
            ``batch_per_gpu`` is configured.
    """

    step: int = 0
    images: int = 0
    warmup_step: int = 0
    starts: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    processes: int = 1


@dataclass
class Parts:
    """Everything of a run that has state."""

    models: Models
    averages: Mapping[str, Ema]
    averaged: Mapping[str, str]  # name of the average -> name of its network
    optimizers: Mapping[str, PhaseOptimizer]
    scale: LossScale


def save_run(
    run_dir: Path,
    parts: Parts,
    position: Position,
    config: StagedConfig,
    settings: CheckpointConfig,
    distributed: Distributed,
    meta: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of this position and delete old ones; rank 0 writes, all processes must call it.

    Raises:
        UserError: the disk is full, the folder cannot be written, a tensor is not finite; on every process.
    """
    generators = distributed.gather(random_states(distributed.device))

    def write() -> Path:
        weights = {name: model.state_dict() for name, model in parts.models.items()}
        for name, average in parts.averages.items():
            weights[name] = average.averaged_state(parts.models[parts.averaged[name]])
        state = {
            "position": asdict(position),
            "averages": {name: average.updates for name, average in parts.averages.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in parts.optimizers.items()},
            "scale": parts.scale.state_dict(),
            "random": generators,
        }
        described = {**meta, "config": to_dict(config), "step": position.step, "images": position.images}
        folder = save_checkpoint(
            checkpoint_folder(run_dir, position.step), weights, state, described, settings.max_shard_mb
        )
        prune(run_dir, settings.keep_last, settings.keep_every or None)
        return folder

    return distributed.on_main(write)


def find_resume(run_dir: Path, resume: str | Path | None, restarts: int) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run.

    Args:
        run_dir: the run's folder.
        resume: None = start afresh, ``"auto"`` = go on if the folder holds a checkpoint, else the path of a
            checkpoint or run.
        restarts: of torchrun; above 0 means ``"auto"``.

    Raises:
        UserError: a fresh run would write into the folder of another, or there is nothing at the path.
    """
    if resume is None and restarts > 0:
        resume = "auto"
    if resume is None:
        found = list_checkpoints(run_dir)
        if found:
            step = int(found[-1].name)
            raise UserError(
                f"{run_dir} holds a run that reached step {step}: go on with --resume auto, or choose another folder"
            )
        return None
    if str(resume) == "auto":
        return find_checkpoint(run_dir) if list_checkpoints(run_dir) else None
    return find_checkpoint(resume)


def restore_run(
    path: Path,
    parts: Parts,
    config: StagedConfig,
    meta: Mapping[str, Any],
    distributed: Distributed,
    allow_config_change: bool = False,
    extra_changes: tuple[str, ...] = (),
) -> Position:
    """Load a checkpoint into ``parts`` and return its position.

    Raises:
        UserError: not a training checkpoint of this method and stage, another configuration, damaged files.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.state
    if not isinstance(state, dict) or "position" not in state:
        raise UserError(
            f"{path} holds no training state: expected a checkpoint of a run; start from its weights instead"
        )
    for key in ("method", "stage"):
        if checkpoint.meta.get(key) != meta.get(key):
            raise UserError(
                f"{path} was written by {key} {checkpoint.meta.get(key)!r}, this run is {meta.get(key)!r}; "
                "resume it with the same command"
            )
    if not allow_config_change:
        check_config(checkpoint, config, extra_changes)
    try:
        _load_parts(checkpoint, state, parts)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} does not fit the networks of this configuration: {' '.join(' '.join(reason).split())[:300]}; resume with "
            "the settings it was written with, or from an earlier checkpoint"
        ) from error
    stored = dict(state["position"])
    stored["starts"] = [tuple(start) for start in stored["starts"]]
    generators = state["random"]
    if len(generators) == distributed.world:
        restore_random(generators[distributed.rank], distributed.device)
    return Position(**stored)


def check_config(checkpoint: Checkpoint, config: StagedConfig, extra_changes: tuple[str, ...] = ()) -> None:
    """UserError names the first setting that a resumed run may not change."""
    old = from_dict(config.schema, checkpoint.meta["config"], where=str(checkpoint.path))  # type: ignore[arg-type]
    for key, before, now in diff(old, config):
        if not may_change(key, (*RESUME_MAY_CHANGE, *extra_changes)):
            raise UserError(
                f"resume with another configuration: {key} was {before!r}, now {now!r}; set it back, "
                "pass --allow-config-change, or start a new run from the weights"
            )


def _load_parts(checkpoint: Checkpoint, state: Mapping[str, Any], parts: Parts) -> None:
    for name, model in parts.models.items():
        model.load_state_dict(checkpoint.weights[name])
    for name, average in parts.averages.items():
        stored = checkpoint.weights[name]
        shadow = {key: stored[key] for key in average.shadow}
        average.load_state_dict({"updates": state["averages"][name], "shadow": shadow})
    if set(state["optimizers"]) != set(parts.optimizers):
        raise ValueError(f"optimizers {sorted(state['optimizers'])}, expected {sorted(parts.optimizers)}")
    for name, optimizer in parts.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    parts.scale.load_state_dict(state["scale"])


def random_states(device: torch.device) -> dict[str, Any]:
    """The global generators of this process. The loop draws from none of them; a method's library might."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = np.random.get_state()
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(states: Mapping[str, Any], device: torch.device) -> None:
    """Put :func:`random_states` back."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
