# SPDX-License-Identifier: Apache-2.0
"""Codes of heads that change into each other: straight from one to the next, or on a closed curve through all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from facelab.errors import nearest
from facelab.generator import Codes

LatentType = Literal["geo", "app", "both", "non"]
LATENT_TYPES = ("geo", "app", "both", "non")


def mix_factors(kind: str, t: float, names: Sequence[str]) -> dict[str, float]:
    """How far each code moves from the first head to the second at path parameter ``t`` (FENeRF).

    ``both`` moves all codes by t, ``non`` none, ``geo`` the geometry code by t. ``app`` moves the
    appearance code by ``2 (t - 0.5)``: it runs from -1 (extrapolated) over 0 to 1.

    >>> mix_factors("app", 0.75, ("geo", "app"))
    {'geo': 0.0, 'app': 0.5}
    """
    if kind not in LATENT_TYPES:
        raise ValueError(
            f"unknown interpolation {kind!r}, expected one of {LATENT_TYPES}.{nearest(kind, LATENT_TYPES)}"
        )
    factors = dict.fromkeys(names, t if kind == "both" else 0.0)
    if kind in ("geo", "app"):
        if kind not in factors:
            raise ValueError(
                f"interpolation {kind!r} needs a code {kind!r}, this generator has {list(names)}; use 'both'"
            )
        factors[kind] = t if kind == "geo" else 2 * (t - 0.5)
    return factors


def straight_codes(heads: Sequence[Codes], kind: str, t: Sequence[float]) -> Iterator[Codes]:
    """Codes that go straight from each head to the next: ``t`` for every pair of neighbours.

    One head alone stands still for ``len(t)`` frames. ``kind``: see :func:`mix_factors`.
    """
    pairs = list(itertools.pairwise(heads)) or [(heads[0], heads[0])]
    for first, second in pairs:
        for value in t:
            yield first.mix(second, mix_factors(kind, value, list(first.values)))


def loop_codes(heads: Sequence[Codes], kind: str, frames: int) -> Iterator[Codes]:
    """Codes on a smooth closed curve through all heads and back to the first (EG3D's videos).

    Args:
        heads: K of them, one scene each.
        kind: ``both`` moves all codes, ``geo`` or ``app`` that one, ``non`` none; the others stay the first head's.
        frames: from one head to the next.

    Yields:
        K * ``frames`` codes; number ``k * frames`` is exactly head k.
    """
    moved = {name for name, factor in mix_factors(kind, 1.0, list(heads[0].values)).items() if factor}
    at = np.arange(len(heads) * frames) / frames
    curves = {}
    for name in moved:
        curves[name] = closed_cubic_spline(np.stack([h.values[name].cpu().double().numpy() for h in heads]))
    for number, position in enumerate(at):
        if number % frames == 0:
            place = heads[number // frames]
            yield Codes({name: (place if name in moved else heads[0]).values[name] for name in place.values})
        else:
            yield Codes(
                {
                    name: torch.from_numpy(curves[name](position)).to(value) if name in moved else value
                    for name, value in heads[0].values.items()
                }
            )


def closed_cubic_spline(values: np.ndarray) -> Callable[[float], np.ndarray]:
    """The closed curve, twice continuously differentiable, that is at ``values[k]`` at every k modulo K.

    Args:
        values: (K, ...) float64.

    Returns:
        A function of the place, any real number.

    >>> curve = closed_cubic_spline(np.array([0.0, 1.0]))
    >>> [round(float(curve(place)), 3) for place in (0, 0.5, 1, 1.5, 2)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    from scipy.interpolate import CubicSpline

    closed = np.concatenate([values, values[:1]])
    return CubicSpline(np.arange(len(closed)), closed, bc_type="periodic")
