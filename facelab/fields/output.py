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
        sigma: (N, R, S, 1) raw density, before any activation; of a field with ``sdf`` the density itself.
        rgb: (N, R, S, 3) in [0, 1].
        semantics: (N, R, S, K) label values about 0..1, or None.
        features: (N, R, S, C) what a network behind the renderer reads, or None. Without ``sdf`` they lie in
            about [0, 1] and their first three channels are ``rgb``.
        sdf: (N, R, S, 1) signed distance in scene units, negative inside, or None.
    """

    sigma: Tensor
    rgb: Tensor
    semantics: Tensor | None = None
    features: Tensor | None = None
    sdf: Tensor | None = None

    def channels(self) -> Tensor:
        """-> (N, R, S, K + 3): what is composited, labels first, then colour."""
        return self.rgb if self.semantics is None else torch.cat([self.semantics, self.rgb], dim=-1)

    def select(self, index: Tensor) -> FieldOutput:
        """Reorder the samples of each ray by ``index`` (N, R, S')."""
        return self._map(lambda x: torch.gather(x, 2, index[..., None].expand(*index.shape, x.shape[-1])))

    @staticmethod
    def cat(parts: list[FieldOutput], dim: int = 2) -> FieldOutput:
        """Concatenate along the samples (2), the rays (1) or the batch (0)."""

        def cat(name: str) -> Tensor | None:
            tensors = [getattr(p, name) for p in parts]
            return None if tensors[0] is None else torch.cat(tensors, dim=dim)

        return parts[0]._rebuild(cat)

    def _map(self, function: Callable[[Tensor], Tensor]) -> FieldOutput:
        def mapped(name: str) -> Tensor | None:
            value = getattr(self, name)
            return None if value is None else function(value)

        return self._rebuild(mapped)

    def _rebuild(self, make: Callable[[str], Tensor | None]) -> FieldOutput:
        """The output whose tensors are ``make(name)``; rgb is not made twice where the features hold it."""
        features = make("features")
        rgb = features[..., :3] if features is not None and self.sdf is None else make("rgb")
        sigma = make("sigma")
        assert sigma is not None and rgb is not None
        return FieldOutput(sigma, rgb, make("semantics"), features, make("sdf"))


BoundField = Callable[[Tensor, Tensor], FieldOutput]
"""``field(points (N, R, S, 3), directions (N, R, 3)) -> FieldOutput``: a field with its codes filled in."""
