# SPDX-License-Identifier: Apache-2.0
"""Mixing the codes of two heads along a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from facelab.errors import nearest

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
