# SPDX-License-Identifier: Apache-2.0
"""Cameras, pose distributions, rays and trajectories."""

from facelab.cameras.camera import Camera

__all__ = ["Camera"]
