# SPDX-License-Identifier: Apache-2.0
"""Functions of direction -> nine numbers, by a fixed quadrature: one product with a table that is made once.

The lights of FaceDNeRF (arXiv 2306.00783) are functions of the polar angle from +z and the azimuth from +x, in DPR's
axes turned by pi about the vertical (see :mod:`facelab.lighting.frames`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from facelab.errors import UserError, nearest
from facelab.lighting.frames import from_dpr, switch_phase
from facelab.lighting.harmonics import LOBE, basis

PolarFunction = Callable[[Tensor, Tensor], Tensor]  # polar angle, azimuth (radians, any shape) -> light of that shape
REFERENCE_SCALE = 2.5  # FaceDNeRF: target light over projected numbers
REFERENCE_GRID = 100


def polar_directions(theta: Tensor, phi: Tensor) -> Tensor:
    """Polar angle from +z and azimuth from +x towards +y, radians -> (..., 3) unit vectors."""
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], dim=-1)


def polar_basis(theta: Tensor, phi: Tensor, phase: bool = False) -> Tensor:
    """(...,) angles -> (..., 9) basis values; ``phase``: with the Condon-Shortley sign."""
    values = basis(polar_directions(theta, phi))
    return switch_phase(values.reshape(-1, 9)).reshape(values.shape) if phase else values


def project(
    function: PolarFunction,
    offsets: Tensor | Sequence[float] = (0.0, 0.0),
    grid: int = REFERENCE_GRID,
    jitter: Tensor | None = None,
    phase: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Project a light onto the nine basis functions.

    Args:
        function: light of (polar angle, azimuth); called once with float64 tensors (..., grid * grid).
        offsets: (..., 2) polar angle and azimuth added to the directions that the function sees, radians. Added to the
            azimuth they turn the light exactly; added to the polar angle they do not, see
            :func:`facelab.lighting.seen_by`.
        grid: cells in either direction, all of the same area on the sphere.
        jitter: (grid, grid, 2) in 0..1, place in each cell along (1 - cos) and azimuth; None: the middle.
        phase: use the basis with the Condon-Shortley sign.

    Returns:
        (..., 9) float64 coefficients of the incoming light, without cosine lobe.

    Raises:
        ValueError: offsets or jitter of another shape, or a function that gives another shape.
    """
    offset = torch.as_tensor(offsets, dtype=torch.float64, device=device)
    if offset.ndim < 1 or offset.shape[-1] != 2:
        raise ValueError(f"offsets must be (..., 2): polar angle and azimuth, got {tuple(offset.shape)}")
    theta, phi, table = _middles(grid, phase, str(device)) if jitter is None else _table(grid, jitter, phase, device)
    light = function(theta + offset[..., :1], phi + offset[..., 1:])
    if light.shape != (*offset.shape[:-1], grid * grid):
        raise ValueError(f"the light must have the shape of its angles, got {tuple(light.shape)}")
    return light.to(table) @ table


def _table(grid: int, jitter: Tensor, phase: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(G*G,) polar angles, azimuths and (G*G, 9) basis values times the area of a cell."""
    if jitter.shape != (grid, grid, 2):
        raise ValueError(f"jitter must be ({grid}, {grid}, 2), got {tuple(jitter.shape)}")
    cells = torch.arange(grid, dtype=torch.float64, device=device)
    place = jitter.to(cells)
    x, y = (cells[:, None] + place[..., 0]) / grid, (cells[None] + place[..., 1]) / grid
    theta, phi = (2 * torch.acos((1 - x).sqrt())).flatten(), (2 * math.pi * y).flatten()
    return theta, phi, polar_basis(theta, phi, phase) * (4 * math.pi / grid**2)


@functools.lru_cache(maxsize=8)
def _middles(grid: int, phase: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    with torch.inference_mode(False):  # the table outlives whatever mode it was first asked for in
        return _table(grid, torch.full((grid, grid, 2), 0.5), phase, device)


# FaceDNeRF's lights


def _ring(azimuth: float, tilt: float = 0.0) -> PolarFunction:
    return lambda theta, phi: (4 * (theta - tilt).sin() * (phi - azimuth).cos() - 3).clamp(min=0)


def _top_right(theta: Tensor, phi: Tensor) -> Tensor:
    return (5 * theta.cos() - 4).clamp(min=0) + PRESETS["right"](theta, phi)


PRESETS: dict[str, PolarFunction] = {
    "right": _ring(2.5),  # as seen in the picture
    "left": _ring(0.6),
    "below": _ring(math.pi / 2, math.pi / 3),
    "top_right": _top_right,
}


def preset(name: str, device: torch.device | str = "cpu") -> Tensor:
    """(9,) world light of that name (``right``, ``left`` as seen in the picture, ``below``, ``top_right``), float32.

    UserError with the nearest name for another one.
    """
    numbers = reference_light(_named(name), device=device)
    return from_dpr(numbers[None])[0].float()


def reference_light(
    function: PolarFunction | str, offsets: Tensor | Sequence[float] = (0.0, 0.0), device: torch.device | str = "cpu"
) -> Tensor:
    """FaceDNeRF's target: (..., 9) float64 numbers in DPR's terms of a view whose camera moved by ``offsets``.

    Args:
        function: one of :data:`PRESETS` by name, or any.
        offsets: (..., 2) the camera's vertical and horizontal angle from the front, radians.
    """
    chosen = _named(function) if isinstance(function, str) else function
    return REFERENCE_SCALE * project(chosen, offsets, phase=True, device=device)


def _named(name: str) -> PolarFunction:
    if name not in PRESETS:
        raise UserError(f"no light named '{name}'; expected one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]


# Lights of our own


def lobe(
    azimuth: Tensor | float, elevation: Tensor | float, sharpness: float = 4.0, intensity: Tensor | float = 1.0
) -> Tensor:
    """Soft lamps: (N, 9) world lights. Incoming light is proportional to max(0, 1 - sharpness (1 - cos angle)).

    Args:
        azimuth: radians from the front, positive to the right of a frontal picture; a number or (N,).
        elevation: radians, positive upwards.
        sharpness: 0.5 reaches all directions but the opposite one, 1 the half sphere, large ones are small lamps.
        intensity: brightness of a white surface that faces the lamp.

    Raises:
        ValueError: a sharpness below 0.5.
    """
    if not sharpness >= 0.5:
        raise ValueError(f"sharpness must be at least 0.5, got {sharpness}")
    parts = [torch.as_tensor(v, dtype=torch.get_default_dtype()).reshape(-1) for v in (azimuth, elevation, intensity)]
    azimuth_N, elevation_N, intensity_N = torch.broadcast_tensors(*parts)
    flat = elevation_N.cos()
    direction = torch.stack([flat * azimuth_N.sin(), elevation_N.sin(), flat * azimuth_N.cos()], dim=-1)
    order = torch.tensor(_lobe_orders(sharpness), dtype=direction.dtype, device=direction.device)
    return (
        basis(direction) * order.repeat_interleave(torch.tensor([1, 3, 5], device=order.device)) * intensity_N[:, None]
    )


def _lobe_orders(sharpness: float) -> list[float]:
    """Factor of each order's basis values at the lamp, for brightness 1 there: Gauss-Legendre, exact."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    low = 1 - 1 / sharpness
    c, w = (nodes + 1) / 2 * (1 - low) + low, weights
    light = 1 - sharpness * (1 - c)
    legendre = (np.ones_like(c), c, (3 * c * c - 1) / 2)
    orders = [factor * float((w * light * p).sum()) for factor, p in zip(LOBE, legendre, strict=True)]
    facing = sum((2 * l + 1) / (4 * math.pi) * k for l, k in enumerate(orders))
    return [k / facing for k in orders]


def light_from_function(
    function: Callable[[Tensor], Tensor], grid: int = REFERENCE_GRID, device: torch.device | str = "cpu"
) -> Tensor:
    """World light of any function of direction.

    Args:
        function: (P, 3) float64 unit vectors in world axes -> (P,) or (P, 3) incoming light; an even light of 1 gives
            brightness 1.

    Returns:
        (1, 9) or (1, 9, 3) float32.

    Raises:
        ValueError: the function gives another shape or numbers that are not finite.
    """
    theta, phi, table = _middles(grid, False, str(device))
    light = function(polar_directions(theta, phi))
    if light.shape not in ((len(theta),), (len(theta), 3)) or not bool(light.isfinite().all()):
        raise ValueError(f"the light must be finite, ({len(theta)},) or ({len(theta)}, 3), got {tuple(light.shape)}")
    by_order = torch.tensor(LOBE, dtype=table.dtype, device=table.device)
    lobes = by_order.repeat_interleave(torch.tensor([1, 3, 5], device=table.device))
    return torch.einsum("pk,p...->k...", table * lobes, light.to(table))[None].float()
