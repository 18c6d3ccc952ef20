# SPDX-License-Identifier: Apache-2.0
"""The cumulative product of the integrators against torch's."""

from __future__ import annotations

import pytest
import torch

from facelab.rendering.transmittance import cumulative_product


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_values_and_derivatives(dim: int) -> None:
    factors = (
        0.05 + torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).requires_grad_()
    assert torch.equal(cumulative_product(factors, dim), torch.cumprod(factors, dim))
    assert torch.autograd.gradcheck(lambda x: cumulative_product(x, dim), (factors,))
    assert torch.autograd.gradgradcheck(lambda x: cumulative_product(x, dim), (factors,))


def test_opaque_samples_keep_finite_derivatives() -> None:
    """1 - alpha + 1e-10 with alpha = 1 in fp32, many times over."""
    factors = torch.full((1, 48), 1e-10).requires_grad_()
    weights = cumulative_product(torch.cat([torch.ones(1, 1), factors], dim=1), 1)
    (slope,) = torch.autograd.grad(weights.sum(), factors)
    (theirs,) = torch.autograd.grad(torch.cumprod(torch.cat([torch.ones(1, 1), factors], dim=1), 1).sum(), factors)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope, theirs)
