# SPDX-License-Identifier: Apache-2.0
"""The largest connected part of a mesh."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from facelab.mesh.io import Mesh
from facelab.mesh.parts import largest_part

TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
SIDES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def together(sizes: list[float], order: np.ndarray) -> Mesh:
    """Tetrahedra side by side, their triangles in an order of ours, and a vertex that nobody uses."""
    vertices = np.concatenate([TETRAHEDRON * size + 5 * i for i, size in enumerate(sizes)] + [TETRAHEDRON[:1]])
    faces = np.concatenate([SIDES + 4 * i for i in range(len(sizes))])[order]
    colors = np.repeat(np.arange(len(sizes) + 1), 4)[: len(vertices), None].repeat(3, 1).astype(np.uint8)
    return Mesh(vertices.astype(np.float32), faces, colors)


@given(st.permutations([0.5, 1.0, 2.0]), st.integers(0, 2**31))
def test_the_part_with_the_largest_area_stays_with_its_colors(sizes: list[float], seed: int) -> None:
    mesh = together(sizes, np.random.default_rng(seed).permutation(4 * len(sizes)))
    part, largest = largest_part(mesh), sizes.index(2.0)
    assert len(part.vertices) == len(part.faces) == 4
    assert part.colors is not None and set(part.colors.ravel()) == {largest}
    expected = (TETRAHEDRON * 2 + 5 * largest)[SIDES]
    assert {t.tobytes() for t in part.vertices[part.faces]} == {t.astype(np.float32).tobytes() for t in expected}


def test_many_small_triangles_do_not_outweigh_a_head() -> None:
    fan = Mesh(
        np.concatenate([TETRAHEDRON * 10, 0.01 * np.random.default_rng(0).random((50, 3), dtype=np.float32) + 50]),
        np.concatenate([SIDES, 4 + np.stack([np.zeros(48, int), np.arange(1, 49), np.arange(2, 50)], axis=1)]),
    )
    assert len(largest_part(fan).faces) == 4 and largest_part(fan).colors is None


def test_a_mesh_without_triangles_stays() -> None:
    empty = Mesh(TETRAHEDRON, np.zeros((0, 3), dtype=int))
    assert largest_part(empty) is empty
