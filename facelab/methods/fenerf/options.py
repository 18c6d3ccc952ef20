# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training command: those of pi-GAN."""

from __future__ import annotations

from facelab.bases.pigan.options import INSTEAD

__all__ = ["INSTEAD"]
