# SPDX-License-Identifier: Apache-2.0
"""Linear face models: the procedural head that needs no data file, landmark tables, the common base."""

from __future__ import annotations

from facelab.face_model.base import LinearHeadModel
from facelab.face_model.procedural import ProceduralHead

__all__ = ["LinearHeadModel", "ProceduralHead"]
