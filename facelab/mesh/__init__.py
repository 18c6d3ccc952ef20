# SPDX-License-Identifier: Apache-2.0
"""Meshes: the z-buffer rasteriser shared by face models, synthetic data and mesh guided rendering."""

from __future__ import annotations

from facelab.mesh.normals import Incidence, vertex_normals
from facelab.mesh.rasterize import Fragments, interpolate, rasterize

__all__ = ["Fragments", "Incidence", "interpolate", "rasterize", "vertex_normals"]
