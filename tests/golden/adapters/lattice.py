# SPDX-License-Identifier: Apache-2.0
"""Golden case of the query lattice of the original shape extraction (our ``reference`` lattice)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from facelab.mesh.marching_cubes import Lattice


def shape_lattice_original(meta: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sheared lattice, in chunks as the extraction asks for it."""
    lattice = Lattice(meta["config"]["N"], meta["config"]["cube"], reference=True)
    points = torch.cat([part for _, part in lattice.chunks(max_points=100)])
    return {
        "out_points": points[None],
        "out_voxel_origin": torch.full((3,), lattice.origin),
        "out_voxel_size": torch.tensor(lattice.voxel_size),
    }


ADAPTERS = {"pigan/shape_lattice_original": shape_lattice_original}
