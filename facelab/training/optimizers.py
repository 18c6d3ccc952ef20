# SPDX-License-Identifier: Apache-2.0
"""Adam for phases: learning rates that follow the curriculum, lazy phases, updates that can be refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from facelab.training.phases import Phase
from facelab.training.protocol import Models, OptimizerSpec


def lazy_factor(phases: Iterable[Phase]) -> float:
    """m of an optimiser that these phases share: 1 / (optimiser steps per iteration), phases of every step as one.

    >>> phase = lambda every: Phase("p", ("g",), "g", lambda ctx: iter(()), every=every)
    >>> lazy_factor([phase(1), phase(4)]), lazy_factor([phase(1), phase(1)]), lazy_factor([phase(16)])
    (0.8, 1.0, 1.0)
    """
    intervals = [phase.every for phase in phases]
    if 1 not in intervals:
        return 1.0
    return 1.0 / (1.0 + sum(1.0 / every for every in intervals if every > 1))


class PhaseOptimizer:
    """One Adam of a run; its update can be refused by a flag on the device, without waiting for it.

    Args:
        name: for error messages.
        spec: what it trains and how fast.
        models: the networks; parameters that were built without ``requires_grad`` are left alone.
        phases: the phases that step it.

    Raises:
        ValueError: the selection is empty, or a phase trains a model that the optimiser does not hold.
    """

    def __init__(self, name: str, spec: OptimizerSpec, models: Models, phases: Sequence[Phase]) -> None:
        self.name = name
        unknown = {m for p in phases for m in p.trains} - set(spec.models)
        if unknown:
            raise ValueError(f"optimizer {name!r} holds {list(spec.models)}, a phase of it trains {sorted(unknown)}")
        named = [(k, p) for k, p in models.named_parameters(spec.models) if p.requires_grad]
        selected = [(k, p) for k, p in named if spec.select is None or spec.select(k)]
        if not selected:
            raise ValueError(f"optimizer {name!r} has no parameters: check its models {list(spec.models)} and select")
        self.parameters = {id(parameter) for _, parameter in selected}
        self.lazy = lazy_factor(phases) if spec.lazy_correction else 1.0
        groups: dict[str, dict[str, Any]] = {}
        for key, parameter in selected:
            prefix = _prefix(key, spec.lr_factors)
            groups.setdefault(prefix, {"params": [], "prefix": prefix, "names": []})
            groups[prefix]["params"].append(parameter)
            groups[prefix]["names"].append(key)
        unused = set(spec.lr_factors) - set(groups)
        if unused:
            raise ValueError(f"optimizer {name!r}: lr_factors for {sorted(unused)} fit no trained parameter")
        betas = (spec.betas[0] ** self.lazy, spec.betas[1] ** self.lazy)
        self.adam = torch.optim.Adam(
            [{"params": g["params"], "prefix": g["prefix"], "param_names": g["names"]} for g in groups.values()],
            lr=spec.lr, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True,
        )  # fmt: skip
        self.configure(spec)

    def configure(self, spec: OptimizerSpec) -> None:
        """Take over the learning rate of a curriculum row; the moments stay."""
        for group in self.adam.param_groups:
            group["lr"] = spec.lr * spec.lr_factors.get(group["prefix"], 1.0) * self.lazy

    def step(self, refuse: Tensor) -> None:
        """Update the parameters that have gradients; not at all if the flag ``refuse`` is 1.0."""
        # the fused kernels read these two attributes and leave parameters, moments and step count alone
        self.adam.grad_scale = None  # type: ignore[attr-defined]
        self.adam.found_inf = refuse  # type: ignore[attr-defined]
        self.adam.step()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> Adam's tensors; learning rates are not state, they follow from the configuration."""
        return {key: dict(self.adam.state[p]) for key, p in self._named() if p in self.adam.state}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """ValueError names the first tensor whose place or shape does not fit."""
        named = dict(self._named())
        for key, entries in state.items():
            if key not in named:
                raise ValueError(f"optimizer {self.name!r} has no parameter {key!r}")
            parameter = named[key]
            loaded = {}
            for field, value in entries.items():
                if field != "step" and value.shape != parameter.shape:
                    shapes = f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                    raise ValueError(f"optimizer {self.name!r}, {key}: expected moments of shape {shapes}")
                target = torch.empty_like(parameter if field != "step" else value, device=parameter.device)
                loaded[field] = target.detach().copy_(value)
            self.adam.state[parameter] = loaded

    def _named(self) -> Iterable[tuple[str, nn.Parameter]]:
        for group in self.adam.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)


def _prefix(key: str, factors: Mapping[str, float]) -> str:
    """The longest prefix of ``key`` in ``factors``, or an empty string."""
    fits = [p for p in factors if key == p or key.startswith(p + ".")]
    return max(fits, key=len, default="")
