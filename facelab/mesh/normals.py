# SPDX-License-Identifier: Apache-2.0
"""Smooth vertex normals, summed in a fixed order so that a GPU gives the same bits every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SLOTS = 8  # incident faces summed for every vertex; only vertices with more (poles) need a longer table


@dataclass(frozen=True)
class Incidence:
    """Faces around each vertex, in ascending order, padded with F.

    Attributes:
        table: (V, 8) the first faces of every vertex.
        poles: (P,) vertices with more than 8 faces.
        pole_table: (P, K) their remaining faces.
    """

    table: Tensor
    poles: Tensor
    pole_table: Tensor

    @staticmethod
    def of(faces: Tensor, vertices: int) -> Incidence:
        """From (F, 3) triangles of a mesh with ``vertices`` vertices, on the device of ``faces``."""
        corner = faces.cpu().numpy().reshape(-1)
        order = np.argsort(corner, kind="stable")
        valence = np.bincount(corner, minlength=vertices)
        slot = np.arange(len(corner)) - np.repeat(np.cumsum(valence) - valence, valence)
        full = np.full((vertices, max(SLOTS, int(valence.max(initial=1)))), len(faces), dtype=np.int64)
        full[corner[order], slot] = order // 3
        poles = np.nonzero(valence > SLOTS)[0]
        tables = (full[:, :SLOTS], poles, full[poles, SLOTS:])
        return Incidence(*(torch.from_numpy(np.ascontiguousarray(t)).to(faces.device) for t in tables))


def vertex_normals(vertices: Tensor, faces: Tensor, incidence: Incidence | None = None) -> Tensor:
    """Area weighted unit normals.

    Args:
        vertices: (N, V, 3) positions.
        faces: (F, 3) triangles, anticlockwise seen from outside.
        incidence: what ``Incidence.of`` returns for these faces; computed here if missing.

    Returns:
        (N, V, 3) unit normals; zero where a vertex has no face of positive area.
    """
    around = Incidence.of(faces, vertices.shape[1]) if incidence is None else incidence
    a, b, c = (vertices[:, faces[:, k]] for k in range(3))
    face_NF3 = torch.linalg.cross(b - a, c - a)
    face_NF3 = torch.cat([face_NF3, torch.zeros_like(face_NF3[:, :1])], dim=1)
    summed = face_NF3[:, around.table[:, 0]]
    for k in range(1, SLOTS):
        summed = summed + face_NF3[:, around.table[:, k]]
    if len(around.poles):
        summed[:, around.poles] += face_NF3[:, around.pole_table].sum(dim=2)
    return torch.nn.functional.normalize(summed, dim=-1, eps=1e-20)


def angle_weighted_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Smooth unit normals in which each face counts by its angle at the vertex (Thuermer and Wuethrich 1998).

    Unlike area weights they do not depend on how a flat polygon was cut into triangles.

    Args:
        vertices: (V, 3) positions.
        faces: (F, 3) triangles, anticlockwise seen from outside.

    Returns:
        (V, 3) float64; zero where a vertex has no face of positive area.
    """
    corner = vertices.astype(np.float64)[faces]  # (F, 3, 3)
    edge = np.roll(corner, -1, axis=1) - corner  # from each corner to the next
    face_F3 = np.cross(edge[:, 0], edge[:, 1])
    length = np.linalg.norm(face_F3, axis=-1, keepdims=True)
    face_F3 = np.divide(face_F3, length, out=np.zeros_like(face_F3), where=length > 0)
    cosine = -(edge * np.roll(edge, 1, axis=1)).sum(axis=-1)
    angle = np.arctan2(length, cosine)  # |a x b| is the same at every corner
    number = faces.reshape(-1)
    weighted = (angle[..., None] * face_F3[:, None]).reshape(-1, 3)
    summed = np.stack([np.bincount(number, weighted[:, k], minlength=len(vertices)) for k in range(3)], axis=-1)
    size = np.linalg.norm(summed, axis=-1, keepdims=True)
    return np.divide(summed, size, out=np.zeros_like(summed), where=size > 0)
