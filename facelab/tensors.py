# SPDX-License-Identifier: Apache-2.0
"""Tensors in nests of containers, on their way to a device, and small constant ones that stay there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Numbers = Sequence[float] | Sequence[Sequence[float]]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A copy of ``value`` with the function applied to every tensor inside tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in fields})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a nest, in the order of :func:`map_tensors`."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def moved(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device`` without waiting for the work queued there (a plain ``.to`` would)."""
    target = torch.device(device)
    if target.type != "cuda" or value.device.type == "cuda":
        return value.to(target)
    return value.contiguous().pin_memory().to(target, non_blocking=True)


def constant(numbers: Numbers, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ``numbers`` that all callers share: it is read, never written.

    A tensor made of Python's numbers on a GPU is a copy that the CPU waits for; in a training step it is made once.
    """
    key = tuple(tuple(row) if isinstance(row, (tuple, list)) else row for row in numbers)
    if torch.compiler.is_compiling():
        return torch.tensor(key, device=device, dtype=dtype)
    return _made(key, str(device), dtype)  # type: ignore[arg-type]


@functools.cache  # never dropped: recorded CUDA graphs read them where they lie
def _made(numbers: Numbers, device: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(numbers, device=device, dtype=dtype)
