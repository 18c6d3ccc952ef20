# SPDX-License-Identifier: Apache-2.0
"""How much light passes all samples before one: the product that all integrators are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cumulative_product(factors: Tensor, dim: int) -> Tensor:
    """``torch.cumprod`` of factors that are not 0, differentiable any number of times.

    The derivative of torch's own asks the device whether a factor is 0 and waits for the answer, at every step. Factors
    here are 1 - alpha + 1e-10 (or larger); where one is 0 nevertheless, the derivative is not finite.
    """
    return _CumulativeProduct.apply(factors, dim)


class _CumulativeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.dim = dim
        return torch.cumprod(factors, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        parts = grad * cumulative_product(factors, ctx.dim)
        after = parts.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim)
        return after / factors, None
