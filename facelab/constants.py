# SPDX-License-Identifier: Apache-2.0
"""Small constant tensors that stay on their device.

A tensor made of Python's numbers on a GPU is a copy that the CPU waits for; inside a training step it is made once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[float] | Sequence[Sequence[float]]


def constant(numbers: Numbers, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ``numbers`` that all callers share: it is read, never written."""
    key = tuple(tuple(row) if isinstance(row, (tuple, list)) else row for row in numbers)
    if torch.compiler.is_compiling():
        return torch.tensor(key, device=device, dtype=dtype)
    return _made(key, str(device), dtype)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _made(numbers: Numbers, device: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(numbers, device=device, dtype=dtype)
