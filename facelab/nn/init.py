# SPDX-License-Identifier: Apache-2.0
"""Initialisers that take an explicit generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Fill with U(-bound, bound)."""
    return tensor.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def reset_linear_bias(linear: nn.Linear, generator: torch.Generator) -> None:
    """PyTorch's default for the bias of a linear layer: U(+-1/sqrt(fan_in))."""
    if linear.bias is not None:
        uniform_(linear.bias, 1 / math.sqrt(linear.in_features), generator)
