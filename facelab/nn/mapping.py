# SPDX-License-Identifier: Apache-2.0
"""Mapping networks: latent code -> modulation."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from facelab.nn.init import reset_linear_bias


class FilmMapping(nn.Module):
    """Latent code -> raw FiLM frequencies and phases (pi-GAN, arXiv 2012.00926, section 3.1).

    ``linears`` Linear layers of ``hidden`` units with LeakyReLU(0.2) between them; the input is not
    normalised. The frequencies a layer uses are ``15 * raw + 30``, phases are used raw.

    Args:
        latent_dim: width of the code.
        hidden: width of the hidden layers.
        film_width: number of modulated channels, the sum over the layers.
        linears: number of linear layers (4 in pi-GAN, 5 in FENeRF).
    """

    def __init__(self, latent_dim: int, hidden: int, film_width: int, linears: int) -> None:
        super().__init__()
        widths = [latent_dim, *[hidden] * (linears - 1), 2 * film_width]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, code: Tensor) -> Tensor:
        """(N, latent_dim) -> (N, 2, film_width): raw frequencies, raw phases."""
        for linear in list(self.linears)[:-1]:
            code = nn.functional.leaky_relu(linear(code), 0.2)
        return self.linears[-1](code).unflatten(-1, (2, -1))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Kaiming normal (a = 0.2, fan in), the last weight times 0.25, default biases."""
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            std = math.sqrt(2 / (1 + 0.2**2) / linear.in_features)
            linear.weight.normal_(0, std, generator=generator)
            reset_linear_bias(linear, generator)
        cast(nn.Linear, self.linears[-1]).weight.mul_(0.25)
