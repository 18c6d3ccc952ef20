# SPDX-License-Identifier: Apache-2.0
"""Who the synthetic people are: from uniform random numbers to face model coefficients.

Everything is a vectorised function of a (N, NUMBERS) table of uniform numbers, one row a head, so a head depends
on its row alone. Population facts here are plain choices for variety, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.face_model.procedural import ProceduralHead
from facelab.face_model.procedural_colours import MIDDLE, STEP

NUMBERS = 192  # uniform numbers per head
SHAPE, EXPRESSION, STYLE, COLOUR, LIGHT, POSE, PHASE = 0, 64, 96, 128, 160, 170, 174  # where each group starts

# shift of the mean in standard deviations: feminine faces (the masculine ones get the opposite)
FEMININE = {
    "jaw_width": -0.8,
    "jaw_angle": -0.5,
    "brow_ridge": -0.8,
    "chin_width": -0.5,
    "upper_lip": 0.5,
    "lower_lip": 0.4,
}
FEMININE |= {"neck_width": -0.9, "nose_width": -0.45, "brow_thickness": -0.45, "eye_size": 0.5, "brow_height": 0.35}
FEMININE |= {"nose_forward": -0.3, "face_length": -0.3, "brow_arch": 0.4, "nose_tip_up": 0.4, "chin_length": -0.3}
HAIR_COLOURS = torch.tensor(
    [[0.085, 0.075, 0.075], [0.17, 0.115, 0.085], [0.30, 0.195, 0.125], [0.46, 0.32, 0.20], [0.76, 0.60, 0.38]]
    + [[0.88, 0.78, 0.60], [0.55, 0.25, 0.12], [0.58, 0.57, 0.57], [0.86, 0.85, 0.84], [0.45, 0.10, 0.16]]
)
HAIR_SHARES = torch.tensor([0.24, 0.20, 0.15, 0.11, 0.10, 0.04, 0.06, 0.05, 0.03, 0.02])
IRIS_COLOURS = torch.tensor(
    [
        [0.22, 0.13, 0.08],
        [0.36, 0.22, 0.11],
        [0.42, 0.36, 0.18],
        [0.30, 0.45, 0.28],
        [0.30, 0.47, 0.66],
        [0.45, 0.50, 0.55],
    ]
)
IRIS_SHARES = torch.tensor([0.30, 0.24, 0.12, 0.10, 0.17, 0.07])
STYLES = ("short", "buzz", "bald", "quiff", "bob", "long", "tied", "afro")
STYLE_SHARES = {
    "feminine": [0.10, 0.01, 0.0, 0.04, 0.26, 0.42, 0.10, 0.07],
    "masculine": [0.44, 0.15, 0.10, 0.17, 0.03, 0.04, 0.01, 0.06],
}


@dataclass(frozen=True)
class HeadCoefficients:
    """N heads. ``identity`` (N, I), ``expression`` (N, E), ``albedo`` (N, A) in standard deviations,
    ``shown`` optional part -> (N,) bool, ``phase`` (N, 2) radians of the hair strands."""

    identity: Tensor
    expression: Tensor
    albedo: Tensor
    shown: dict[str, Tensor]
    phase: Tensor

    def to(self, device: torch.device | str) -> HeadCoefficients:
        shown = {name: value.to(device) for name, value in self.shown.items()}
        identity, expression, albedo = (t.to(device) for t in (self.identity, self.expression, self.albedo))
        return HeadCoefficients(identity, expression, albedo, shown, self.phase.to(device))

    def flat(self) -> Tensor:
        """(N, I + E + A): identity, expression, albedo."""
        return torch.cat([self.identity, self.expression, self.albedo], dim=1)


def normal(numbers: Tensor, limit: float = 2.3) -> Tensor:
    """Uniform -> standard normal numbers, cut at +-limit."""
    return torch.special.ndtri(numbers.clamp(1e-6, 1 - 1e-6)).clamp(-limit, limit)


def choose(numbers: Tensor, shares: Tensor) -> Tensor:
    """(N,) uniform numbers -> (N,) indices with probabilities ``shares`` (K,) or (N, K), which sum to one."""
    edges = shares.cumsum(-1).expand(len(numbers), -1)
    return (numbers[:, None] >= edges).sum(dim=1).clamp(max=edges.shape[1] - 1)


def sample_heads(model: ProceduralHead, numbers: Tensor) -> HeadCoefficients:
    """(N, NUMBERS) uniform numbers -> N people with expressions."""
    feminine = numbers[:, STYLE] < 0.5
    style = choose(numbers[:, STYLE + 1], _style_shares(feminine))
    dark = _skin_darkness(numbers)
    hat = numbers[:, STYLE + 2] < 0.07
    identity = _identity(model, numbers, feminine, style, hat)
    shown = {
        "hair": style != STYLES.index("bald"),
        "hat": hat,
        "visor": hat & (numbers[:, STYLE + 3] < 0.5),
        "glasses": numbers[:, STYLE + 4] < 0.15,
        "sunglasses": numbers[:, STYLE + 4] < 0.025,
        "earrings": feminine & (numbers[:, STYLE + 5] < 0.3),
    }
    albedo = _albedo(model, numbers, feminine, dark)
    phase = 2 * torch.pi * numbers[:, PHASE : PHASE + 2]
    return HeadCoefficients(identity, _expression(model, numbers), albedo, shown, phase)


def _style_shares(feminine: Tensor) -> Tensor:
    both = torch.tensor([STYLE_SHARES["masculine"], STYLE_SHARES["feminine"]])
    return both[feminine.long()]


def _skin_darkness(numbers: Tensor) -> Tensor:
    """(N,) coefficient of ``skin_dark``: mostly light to olive, a third brown to very dark."""
    light = -0.75 + 1.35 * numbers[:, COLOUR + 1]
    deep = 0.6 + 2.3 * numbers[:, COLOUR + 1]
    return torch.where(numbers[:, COLOUR] < 0.66, light, deep)


def _set(table: Tensor, names: tuple[str, ...], name: str, value: Tensor | float, where: Tensor | None = None) -> None:
    column = names.index(name)
    value = torch.as_tensor(value, dtype=table.dtype).expand(len(table))
    table[:, column] = value if where is None else torch.where(where, value, table[:, column])


def _identity(model: ProceduralHead, numbers: Tensor, feminine: Tensor, style: Tensor, hat: Tensor) -> Tensor:
    names = model.identity_names
    identity = 0.9 * normal(numbers[:, SHAPE : SHAPE + len(names)])
    sign = feminine.float() * 2 - 1
    for name, shift in FEMININE.items():
        identity[:, names.index(name)] += shift * sign
    u = numbers[:, STYLE + 8 : STYLE + 20]

    def is_style(*which: str) -> Tensor:
        return torch.isin(style, torch.tensor([STYLES.index(name) for name in which]))

    long, bob = is_style("long"), is_style("bob")
    for name in ("ear_size", "ear_flare"):  # ears stay below hanging hair
        column = names.index(name)
        identity[:, column] = torch.where(long | bob, identity[:, column].clamp(max=-0.3), identity[:, column])
    covered = is_style("buzz", "tied") | hat
    _set(identity, names, "hair_long", 0.0)
    _set(identity, names, "hair_long", 0.75 + 0.25 * u[:, 0], long)
    _set(identity, names, "hair_bob", 0.0)
    _set(identity, names, "hair_bob", 0.85 + 0.25 * u[:, 0], bob)
    fringe = (u[:, 1] < 0.28) & ~covered & ~is_style("quiff")
    _set(identity, names, "hair_fringe", 0.0)
    _set(identity, names, "hair_fringe", 0.55 + 0.4 * u[:, 2], fringe)
    _set(identity, names, "hair_volume", (1.1 * u[:, 3] - 0.15) * ~covered)
    _set(identity, names, "hair_volume", 1.4 + 0.7 * u[:, 3], is_style("afro") & ~hat)
    _set(identity, names, "hair_recede", torch.where(feminine | fringe, 0.25, 1.1) * (u[:, 4] ** 2) - 0.1)
    _set(identity, names, "hair_waves", (u[:, 5] ** 1.5) * 1.3 * ~covered)
    _set(identity, names, "hair_waves", 0.9 + 0.6 * u[:, 5], is_style("afro") & ~hat)
    _set(identity, names, "hair_sweep", 1.6 * (u[:, 6] - 0.5) * ~covered)
    _set(identity, names, "hair_flat", torch.where(is_style("buzz"), 0.55 + 0.25 * u[:, 7], 0.55 * hat.float()))
    _set(identity, names, "hair_quiff", (0.5 + 0.6 * u[:, 8]) * is_style("quiff") * ~hat)
    _set(identity, names, "hair_flip", (1.4 * u[:, 9] - 0.6) * (long | bob))
    return identity


def _expression(model: ProceduralHead, numbers: Tensor) -> Tensor:
    names = model.expression_names
    u = numbers[:, EXPRESSION : EXPRESSION + len(names) + 4]
    expression = 0.22 * normal(u[:, : len(names)])
    extra = u[:, len(names) :]
    for one_sided in (
        "jaw_open",
        "lips_part",
        "upper_lip_up",
        "lower_lip_down",
        "blink_left",
        "blink_right",
        "cheek_puff",
        "pucker",
    ):
        column = names.index(one_sided)
        expression[:, column] = 0.5 * expression[:, column].clamp(min=0)

    def add(name: str, value: Tensor) -> None:
        expression[:, names.index(name)] += value

    smiling = (extra[:, 0] < 0.5).float()
    add("smile", smiling * 2.4 * extra[:, 0])
    add("lips_part", smiling * (extra[:, 1] < 0.55) * extra[:, 1] / 0.55)
    add("squint", smiling * 0.8 * extra[:, 0])
    add("jaw_open", (extra[:, 1] > 0.78) * (extra[:, 1] - 0.78) * 6.0)
    add("brow_inner_up", (extra[:, 2] > 0.85) * 1.0)
    add("brow_outer_up", (extra[:, 2] > 0.80) * 1.0)
    add("brow_lower", (extra[:, 2] < 0.08) * 0.9)
    closed = (extra[:, 3] < 0.03).float()
    add("blink_left", closed)
    add("blink_right", closed)
    add("gaze_left", 0.15 * normal(u[:, names.index("gaze_left")]))
    return expression


def _albedo(model: ProceduralHead, numbers: Tensor, feminine: Tensor, dark: Tensor) -> Tensor:
    names = model.albedo_names
    u = numbers[:, COLOUR : COLOUR + 32]
    albedo = torch.zeros(len(u), len(names))
    _set(albedo, names, "skin_dark", dark)
    _set(albedo, names, "skin_warm", (0.6 * normal(u[:, 2]) + 0.35 * dark.clamp(min=0)).clamp(min=-0.6))
    _set(albedo, names, "skin_pink", (0.6 * normal(u[:, 3]) + 0.2 * dark.clamp(min=0)).clamp(min=-0.6))
    _set(albedo, names, "blush", 0.5 + 0.5 * normal(u[:, 4]))
    makeup = (feminine & (u[:, 5] < 0.6)).float()
    _set(albedo, names, "lip_red", 0.4 * normal(u[:, 6]) + makeup * 2.2 * u[:, 7])
    _set(albedo, names, "lip_dark", 0.75 * dark.clamp(min=0) + 0.6 * makeup * u[:, 8])
    _set(albedo, names, "eye_shadow", makeup * 1.5 * u[:, 10])
    _set(albedo, names, "eye_liner", makeup * 1.5 * u[:, 11] + 0.3)
    _set(albedo, names, "eye_bags", u[:, 12] ** 2)
    _set(albedo, names, "freckles", (u[:, 13] < 0.12) * 0.7 * (dark < 0.3))
    _set(albedo, names, "cloth_stripes", (u[:, 14] < 0.2) * 1.0)
    hair = HAIR_COLOURS[choose(u[:, 15], HAIR_SHARES)]
    deep = (dark > 0.7) & (u[:, 16] < 0.88)
    hair = torch.where(deep[:, None], HAIR_COLOURS[0], hair) * (0.85 + 0.3 * u[:, 17:18])
    beard = torch.where(feminine, torch.zeros_like(u[:, 9]), (u[:, 9] - 0.45).clamp(min=0) * 4.2)
    _set(albedo, names, "stubble", beard * (1.15 - hair.mean(dim=1)))
    skin = torch.tensor([0.88, 0.67, 0.555]) - dark[:, None] * torch.tensor([0.155, 0.140, 0.128])
    brow = (0.62 * hair + 0.22 * skin) * 0.80
    iris = IRIS_COLOURS[choose(u[:, 18], IRIS_SHARES)]
    iris = torch.where((dark > 0.7)[:, None], IRIS_COLOURS[0], iris)
    cloth = 0.08 + 0.84 * u[:, 19:22]
    cloth = cloth + (cloth.mean(1, keepdim=True) - cloth) * 0.55 * u[:, 22:23]
    hat = 0.08 + 0.72 * u[:, 23:26]
    frame = torch.where(u[:, 26:27] < 0.6, torch.tensor([0.07, 0.07, 0.08]), 0.15 + 0.5 * u[:, 27:30])
    for name, colour in {"hair": hair, "brow": brow, "iris": iris, "cloth": cloth, "hat": hat, "frame": frame}.items():
        for channel, part in enumerate(("red", "green", "blue")):
            _set(albedo, names, f"{name}_{part}", (colour[:, channel] - MIDDLE) / STEP)
    return albedo
