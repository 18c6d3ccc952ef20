# SPDX-License-Identifier: Apache-2.0
"""Golden case of StyleSDF's meshes: all with ``reference`` (the original's warp, places and Delaunay diagonals)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.mesh.aligned_volume import Frustum, align_volume, aligned_mesh
from facelab.mesh.depth_mesh import depth_mesh, merge_equal_vertices
from facelab.mesh.normals import angle_weighted_normals


def mesh(meta: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Aligned volume (1, H, W, D, 1), its surface, and the mesh of a map of points (1, 3, H, W)."""
    config = meta["config"]
    frustum = Frustum(config["near"], config["far"])
    np.testing.assert_allclose(frustum.far - frustum.near, config["cube_size"])
    aligned = align_volume(
        arrays["in_volume"][0, ..., 0], frustum, outside=float(config["outside_value"]), reference=True
    )
    surface = aligned_mesh(aligned, frustum, level=float(config["level"]), reference=True)
    sheet = merge_equal_vertices(depth_mesh(arrays["in_xyz"][0], reference=True))
    return {
        "out_aligned": aligned[None, ..., None],
        "out_mc_verts": surface.vertices,
        "out_mc_faces": torch.from_numpy(surface.faces).long(),
        "out_depth_verts": sheet.vertices,
        "out_depth_normals": angle_weighted_normals(sheet.vertices, sheet.faces),
    }


ADAPTERS = {"stylesdf/mesh": mesh}
