# SPDX-License-Identifier: Apache-2.0
"""What every field returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FieldOutput:
    """Values of a field at N x R x S points.

    Attributes:
        sigma: (N, R, S, 1) raw density, before any activation.
        rgb: (N, R, S, 3) in [0, 1].
        semantics: (N, R, S, K) label values about 0..1, or None.
        features: (N, R, S, C) what a network behind the renderer reads, in about [0, 1], or None;
            its first three channels are ``rgb``.
    """

    sigma: Tensor
    rgb: Tensor
    semantics: Tensor | None = None
    features: Tensor | None = None

    def channels(self) -> Tensor:
        """-> (N, R, S, K + 3): what is composited, labels first, then colour."""
        return self.rgb if self.semantics is None else torch.cat([self.semantics, self.rgb], dim=-1)

    def select(self, index: Tensor) -> FieldOutput:
        """Reorder the samples of each ray by ``index`` (N, R, S')."""
        return self._map(lambda x: torch.gather(x, 2, index[..., None].expand(*index.shape, x.shape[-1])))

    @staticmethod
    def cat(parts: list[FieldOutput], dim: int = 2) -> FieldOutput:
        """Concatenate along the samples (2), the rays (1) or the batch (0)."""
        semantics = None
        if parts[0].semantics is not None:
            semantics = torch.cat([p.semantics for p in parts if p.semantics is not None], dim=dim)
        features = None
        if parts[0].features is not None:
            features = torch.cat([p.features for p in parts if p.features is not None], dim=dim)
        rgb = torch.cat([p.rgb for p in parts], dim=dim) if features is None else features[..., :3]
        return FieldOutput(torch.cat([p.sigma for p in parts], dim=dim), rgb, semantics, features)

    def _map(self, function: Callable[[Tensor], Tensor]) -> FieldOutput:
        semantics = None if self.semantics is None else function(self.semantics)
        features = None if self.features is None else function(self.features)
        rgb = function(self.rgb) if features is None else features[..., :3]
        return FieldOutput(function(self.sigma), rgb, semantics, features)


BoundField = Callable[[Tensor, Tensor], FieldOutput]
"""``field(points (N, R, S, 3), directions (N, R, 3)) -> FieldOutput``: a field with its codes filled in."""
