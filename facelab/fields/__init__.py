# SPDX-License-Identifier: Apache-2.0
"""Fields: 3-D points and codes to density, colour and semantics."""

from facelab.fields.output import BoundField, FieldOutput

__all__ = ["BoundField", "FieldOutput"]
