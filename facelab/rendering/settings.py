# SPDX-License-Identifier: Apache-2.0
"""How a picture is rendered: everything the camera's 25 numbers do not fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Background = Literal["none", "last", "white", "black"]


@dataclass(frozen=True)
class RenderSettings:
    """Settings of one render.

    Attributes:
        resolution: image side in pixels.
        near, far: range of the ray parameter in scene units.
        samples_coarse: depths per ray of the first pass.
        samples_fine: importance samples per ray of the second pass, 0 for none.
        grid: pixel grid, ``corners`` (pi-GAN, FENeRF, cGOF) or ``centers`` (EG3D, StyleSDF).
        jitter: random depths and importance samples; False uses fixed midpoints, which does not flicker.
        sigma_noise: standard deviation of the normal noise added to raw density; a scalar tensor on the device where
            it changes from step to step.
        density: activation of raw density.
        background: ``last`` gives the missing weight to the last sample, ``white`` and ``black``
            add or subtract it from every channel, ``none`` leaves empty rays at 0.
        lock_view: the field sees the direction (0, 0, -1) instead of the ray's; signed distance fields see the
            ray's direction in the camera's own axes.
        coarse_gradient: keep the graph of the coarse samples; False evaluates them without gradient.
        normals: also compute normals: gradients of density composited over the ray, of a signed distance at the surface.
        max_points: field evaluations per chunk of rays when no gradient is recorded.
        recompute: with gradient, keep nothing between chunks of ``max_points`` and recompute in the backward.
        spacing: depths evenly spaced along the ray, or in ``disparity`` 1 / t (midpoint compositing only).
        box_side: near and far of each ray are where it enters and leaves the cube of this side around the
            origin (midpoint compositing only); None = ``near`` and ``far`` for all.
        reference: midpoint compositing clamps depths to the range of the whole batch and gives rays that miss
            the box EG3D's own limits.
    """

    resolution: int = 64
    near: float = 0.88
    far: float = 1.12
    samples_coarse: int = 24
    samples_fine: int = 24
    grid: Literal["corners", "centers"] = "corners"
    jitter: bool = True
    sigma_noise: float | Tensor = 0.0
    density: Literal["relu", "softplus"] = "relu"
    background: Background = "none"
    lock_view: bool = False
    coarse_gradient: bool = True
    normals: bool = False
    max_points: int = 2_400_000
    recompute: bool = False
    spacing: Literal["depth", "disparity"] = "depth"
    box_side: float | None = None
    reference: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far:
            raise ValueError(f"near and far must satisfy 0 < near < far, got near={self.near}, far={self.far}")
        if self.resolution < 1 or self.samples_coarse < 3 or self.samples_fine < 0:
            raise ValueError(
                "resolution must be >= 1, samples_coarse >= 3 and samples_fine >= 0, got "
                f"{self.resolution}, {self.samples_coarse}, {self.samples_fine}"
            )
        if self.box_side is not None and not self.box_side > 0:
            raise ValueError(f"box_side must be a positive number of scene units or None, got {self.box_side}")

    def replace(self, **changes) -> RenderSettings:
        """A copy with some settings changed."""
        return replace(self, **changes)

    def deterministic(self) -> RenderSettings:
        """The same picture without random numbers: no jitter, no density noise."""
        return replace(self, jitter=False, sigma_noise=0.0)

    @property
    def noisy(self) -> bool:
        """Whether noise is added to raw densities."""
        return isinstance(self.sigma_noise, Tensor) or self.sigma_noise > 0
