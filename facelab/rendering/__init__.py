# SPDX-License-Identifier: Apache-2.0
"""Rays and a field to pictures, depth and opacity."""

from facelab.rendering.integrators import PointAlphaIntegrator, RenderOutput
from facelab.rendering.ray_samplers import HierarchicalSampler, SampleSet, StratifiedSampler
from facelab.rendering.settings import RenderSettings
from facelab.rendering.volume_renderer import render_rays

__all__ = [
    "HierarchicalSampler",
    "PointAlphaIntegrator",
    "RenderOutput",
    "RenderSettings",
    "SampleSet",
    "StratifiedSampler",
    "render_rays",
]
