# SPDX-License-Identifier: Apache-2.0
"""facelab: train, invert, edit, relight and render 3D-aware faces.

``facelab.load(path)`` opens any facelab checkpoint and returns a model with
``sample``, ``render`` and ``extract_mesh``; see :mod:`facelab.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facelab.api import FaceModel, load

__version__ = "0.1.0"
__all__ = ["FaceModel", "__version__", "load"]


def __getattr__(name: str):
    """Import the public API on first use, so that ``import facelab`` stays light."""
    if name in ("load", "FaceModel"):
        from facelab import api

        return getattr(api, name)
    raise AttributeError(f"module 'facelab' has no attribute {name!r}")
