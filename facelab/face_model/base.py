# SPDX-License-Identifier: Apache-2.0
"""What every linear face model has: mean shape, shape and colour bases, triangles, labels, landmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearHeadModel:
    """Vertices and colours that are linear in their coefficients; coefficient 1 is one standard deviation.

    Letters: N batch, V vertices, F faces, I/E/A identity, expression and albedo dimensions.

    Attributes:
        mean_shape: (V, 3) scene units, x to the subject's left, y up, face towards +z.
        identity_basis, expression_basis: (I, V, 3), (E, V, 3) displacements.
        mean_albedo: (V, 3) RGB, 0..1.
        albedo_basis: (A, V, 3).
        faces: (F, 3) int64, anticlockwise seen from outside.
        face_labels: (F,) int64 CelebAMask-HQ classes.
        landmarks: (68,) int64 vertex ids in 300-W order (subject's right side first).
        identity_names, expression_names, albedo_names: what each coefficient does.
    """

    mean_shape: Tensor
    identity_basis: Tensor
    expression_basis: Tensor
    mean_albedo: Tensor
    albedo_basis: Tensor
    faces: Tensor
    face_labels: Tensor
    landmarks: Tensor
    identity_names: tuple[str, ...] = ()
    expression_names: tuple[str, ...] = ()
    albedo_names: tuple[str, ...] = ()

    @property
    def identity_dim(self) -> int:
        return len(self.identity_basis)

    @property
    def expression_dim(self) -> int:
        return len(self.expression_basis)

    @property
    def albedo_dim(self) -> int:
        return len(self.albedo_basis)

    @property
    def device(self) -> torch.device:
        return self.mean_shape.device

    def to(self, device: torch.device | str) -> LinearHeadModel:
        """The same model on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def vertices(self, identity: Tensor, expression: Tensor | None = None) -> Tensor:
        """(N, I) and (N, E) coefficients -> (N, V, 3) positions in scene units. ValueError on another width."""
        shape = self.mean_shape.reshape(1, -1) + _combine(identity, self.identity_basis, "identity")
        if expression is not None:
            shape = shape + _combine(expression, self.expression_basis, "expression")
        return shape.view(-1, *self.mean_shape.shape)

    def albedo(self, coefficients: Tensor) -> Tensor:
        """(N, A) coefficients -> (N, V, 3) RGB, clamped to 0..1. ValueError on another width."""
        return self.linear_albedo(coefficients).clamp(0, 1)

    def linear_albedo(self, coefficients: Tensor) -> Tensor:
        """The same, not clamped."""
        colour = self.mean_albedo.reshape(1, -1) + _combine(coefficients, self.albedo_basis, "albedo")
        return colour.view(-1, *self.mean_albedo.shape)

    def landmark_positions(self, vertices: Tensor) -> Tensor:
        """(N, V, 3) -> (N, 68, 3)."""
        return vertices[:, self.landmarks]


def _combine(coefficients: Tensor, basis: Tensor, name: str) -> Tensor:
    if coefficients.ndim != 2 or coefficients.shape[1] != len(basis):
        raise ValueError(f"{name} coefficients must be (N, {len(basis)}), got {tuple(coefficients.shape)}")
    flat = basis.reshape(len(basis), -1)
    rows = coefficients.to(basis)
    if rows.device.type != "cpu":
        return rows @ flat
    # one product a row: the sum then has the same rounding whatever else is in the batch
    return torch.cat([row[None] @ flat for row in rows]) if len(rows) else rows @ flat
