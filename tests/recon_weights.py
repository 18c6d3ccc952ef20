# SPDX-License-Identifier: Apache-2.0
"""Files in the layout of Deep3DFaceRecon's ``epoch_20.pth`` with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from facelab.nn.pretrained.face_reconstruction import published_shapes


def random_state(seed: int = 0, depth: int = 50, head: float = 0.01, dtype: torch.dtype = torch.float16):
    """Published name -> tensor; activations keep their size through the network. ``head``: deviation of its weights."""
    source = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in published_shapes(depth).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
            continue
        values = torch.randn(shape, generator=source)
        if name.startswith("final_layers"):
            values = values * head
        elif len(shape) == 4:
            values = values * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith(("running_var", ".weight")):
            values = (0.4 if "bn3" in name else 1.0) + 0.1 * values.clamp(-2, 2)
        else:
            values = 0.1 * values
        state[name] = values.to(dtype)
    return state


def constant_state(angle: Sequence[float], translation: Sequence[float], depth: int = 18) -> dict[str, Tensor]:
    """A network that answers every picture with these angles and this translation, all else zero."""
    state = random_state(depth=depth, head=0.0)
    for k in range(7):
        state[f"final_layers.{k}.bias"] = torch.zeros_like(state[f"final_layers.{k}.bias"], dtype=torch.float32)
    state["final_layers.3.bias"] = torch.tensor(angle, dtype=torch.float32)
    state["final_layers.5.bias"] = torch.tensor(translation[:2], dtype=torch.float32)
    state["final_layers.6.bias"] = torch.tensor(translation[2:], dtype=torch.float32)
    return state


def write_epoch(path: Path, state: dict[str, Tensor]) -> Path:
    """The file as the original's training leaves it: the network beside optimiser and schedule."""
    moments = {0: {"step": torch.tensor(20.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    groups = [{"lr": 4e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": [0]}]
    schedule = {"step_size": 10, "gamma": 0.2, "base_lrs": [1e-4], "last_epoch": 20, "_last_lr": [4e-6]}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"net_recon": state, "opt_00": {"state": moments, "param_groups": groups}, "sched_00": schedule}, path)
    return path
