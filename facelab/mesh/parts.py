# SPDX-License-Identifier: Apache-2.0
"""Connected parts of a mesh."""

from __future__ import annotations

import numpy as np

from facelab.mesh.io import Mesh


def largest_part(mesh: Mesh) -> Mesh:
    """The connected part with the largest area, without what floats beside it and without unused vertices.

    Triangles that share a vertex are connected. A mesh without triangles stays as it is.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(mesh.faces):
        return mesh
    start, end = mesh.faces[:, :2].ravel(), mesh.faces[:, 1:].ravel()
    count = len(mesh.vertices)
    edges = coo_matrix((np.ones(len(start), dtype=bool), (start, end)), shape=(count, count))
    parts, of_vertex = connected_components(edges, directed=False)
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    of_face = of_vertex[mesh.faces[:, 0]]
    faces = mesh.faces[of_face == np.bincount(of_face, weights=areas, minlength=parts).argmax()]
    used, renumbered = np.unique(faces, return_inverse=True)
    colors = None if mesh.colors is None else mesh.colors[used]
    return Mesh(mesh.vertices[used], renumbered.reshape(-1, 3).astype(mesh.faces.dtype), colors)
