# SPDX-License-Identifier: Apache-2.0
"""A parametric human head made of formulas: one topology, linear bases, CelebAMask-HQ labels, no data file.

Scene units are pi-GAN's: the camera stands at distance 1 with a field of view of 12 degrees, the head
with its hair is about 0.17 high and the eyes are a little above the middle of a frontal picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facelab.face_model import procedural_hair, procedural_parts, procedural_skin
from facelab.face_model.base import LinearHeadModel
from facelab.face_model.curves import Array, Part
from facelab.face_model.procedural_colours import albedo_fields, mean_albedo, occlusion
from facelab.face_model.procedural_fields import RestHead, expression_fields, identity_fields

UNIT = 0.0072  # scene units per centimetre
OPTIONAL = {  # what can be left out -> its mesh parts
    "hair": ("hair",),
    "hat": ("hat",),
    "visor": ("visor",),
    "glasses": ("glasses",),
    "sunglasses": ("lenses",),
    "earrings": ("l_earring", "r_earring"),
}


@dataclass(frozen=True)
class ProceduralHead(LinearHeadModel):
    """The bundled head model. Build it with :meth:`create`; see LinearHeadModel for the inherited attributes.

    Attributes:
        occlusion: (V, 3) share of the light that reaches each vertex by colour channel, 0..1.
        surface: (V, 2) coordinates on each part (hair: angle around the head and place between crown and rim).
        part: (V,) number of the part in ``part_names``.
        part_names: names of the parts.

    >>> model = ProceduralHead.create()
    >>> model.identity_dim, model.expression_dim, model.albedo_dim, len(model.landmarks)
    (52, 23, 30, 68)
    >>> model.vertices(torch.zeros(2, 52), torch.zeros(2, 23)).shape == (2, *model.mean_shape.shape)
    True
    """

    occlusion: Tensor | None = None
    surface: Tensor | None = None
    part: Tensor | None = None
    part_names: tuple[str, ...] = ()

    @staticmethod
    def create(device: torch.device | str = "cpu") -> ProceduralHead:
        """The model on a device; it is computed once per process (about half a second)."""
        model = _build()
        return model if torch.device(device).type == "cpu" else model.to(device)  # type: ignore[return-value]

    def optional_vertices(self, name: str) -> Tensor:
        """(V,) bool: vertices of an optional part (``hair``, ``hat``, ``visor``, ``glasses``, ``sunglasses``, ``earrings``)."""
        ids = torch.tensor([self.part_names.index(part) for part in OPTIONAL[name]], device=self.device)
        assert self.part is not None
        return torch.isin(self.part, ids)

    def hide(self, vertices: Tensor, shown: dict[str, Tensor]) -> Tensor:
        """Collapse the parts that a head does not have, so that their triangles cover no pixel.

        Args:
            vertices: (N, V, 3).
            shown: optional part -> (N,) bool.

        Returns:
            (N, V, 3), hidden vertices moved to one point.
        """
        members = torch.stack([self.optional_vertices(name) for name in shown]).to(vertices)  # (O, V)
        absent = torch.stack([~present for present in shown.values()], dim=1).to(vertices)  # (N, O)
        return vertices * (absent @ members == 0)[..., None]


def _parts() -> tuple[procedural_skin.SkinGrid, list[Part]]:
    grid = procedural_skin.build_skin()
    eye, brow = procedural_parts.eyeball(), procedural_parts.brow(grid.part.points)
    ear, ring = procedural_parts.ear(), procedural_parts.earring()
    parts = [grid.part, eye, procedural_parts.mirrored(eye, "r_eye", procedural_parts.R_EYE)]
    parts += [brow, procedural_parts.mirrored(brow, "r_brow", procedural_parts.R_BROW)]
    parts += [ear, procedural_parts.mirrored(ear, "r_ear", procedural_parts.R_EAR)]
    parts += [procedural_parts.mouth(), procedural_parts.cloth(), procedural_hair.hair()]
    parts += [*procedural_hair.hat(), *procedural_parts.glasses()]
    parts += [ring, procedural_parts.mirrored(ring, "r_earring", procedural_parts.EARRING)]
    return grid, parts


@lru_cache(maxsize=1)
def _build() -> ProceduralHead:
    grid, parts = _parts()
    counts = [len(part.points) for part in parts]
    starts = dict(zip((part.name for part in parts), np.cumsum([0, *counts[:-1]]), strict=True))
    names = tuple(part.name for part in parts)
    below = np.zeros(sum(counts), dtype=bool)
    for _, ids in grid.lower.values():
        below[ids] = True
    head = RestHead(
        points=np.concatenate([part.points for part in parts]),
        part=np.repeat(np.array(names), counts),
        surface=np.concatenate([part.surface for part in parts]),
        below_slit=below,
    )
    identity, expression, albedo = identity_fields(head), expression_fields(head), albedo_fields(head)
    faces = np.concatenate([part.faces + starts[part.name] for part in parts])

    def stack(fields: dict[str, Array], scale: float) -> Tensor:
        return torch.from_numpy(np.stack(list(fields.values())) * scale).float()

    return ProceduralHead(
        mean_shape=torch.from_numpy(head.points * UNIT).float(),
        identity_basis=stack(identity, UNIT),
        expression_basis=stack(expression, UNIT),
        mean_albedo=torch.from_numpy(mean_albedo(head)).float(),
        albedo_basis=stack(albedo, 1.0),
        faces=torch.from_numpy(faces.astype(np.int64)),
        face_labels=torch.from_numpy(np.concatenate([part.labels for part in parts]).astype(np.int64)),
        landmarks=torch.from_numpy(_landmarks(grid, parts, starts)),
        identity_names=tuple(identity),
        expression_names=tuple(expression),
        albedo_names=tuple(albedo),
        occlusion=torch.from_numpy(occlusion(head)).float(),
        surface=torch.from_numpy(head.surface).float(),
        part=torch.from_numpy(np.repeat(np.arange(len(parts)), counts)),
        part_names=names,
    )


def _landmarks(grid: procedural_skin.SkinGrid, parts: list[Part], starts: dict[str, int]) -> NDArray[np.int64]:
    """(68,) vertex ids in 300-W order."""
    rows = procedural_skin.ROWS
    levels = [6.22, 7.0, 7.69, 8.6, 9.8, 10.7, 11.0, 11.0, 11.0]
    columns = [22, 22, 21, 21, 20, 18, 14, 8, 0]
    side = [(int(np.abs(rows - level).argmin()), column) for level, column in zip(levels, columns, strict=True)]
    ids = [grid.vertex(row, -column) for row, column in side]
    ids += [grid.vertex(row, column) for row, column in side[-2::-1]]
    middle = procedural_parts.BROW_SHAPE[1] // 2
    along = [
        round(k * (procedural_parts.BROW_SHAPE[0] - 1) / 4) * procedural_parts.BROW_SHAPE[1] + middle for k in range(5)
    ]
    ids += [starts["r_brow"] + k for k in along[::-1]] + [starts["l_brow"] + k for k in along]
    skin = grid.part.points

    def nearest(x: float, y: float) -> int:
        distance = (skin[:, 0] - x) ** 2 + (skin[:, 1] - y) ** 2 + 100.0 * (skin[:, 2] < 5)
        return int(distance.argmin())

    ids += [nearest(0, y) for y in (0.6, -0.6, -1.7, -2.7)] + [nearest(x, -3.55) for x in (-1.3, -0.65, 0, 0.65, 1.3)]
    eye_row, (inner, outer) = procedural_skin.EYE_ROW, procedural_skin.EYE_COLUMNS
    a, b = inner + 3, outer - 3

    def lower(name: str, column: int) -> int:
        span, new_ids = grid.lower[name]
        return int(new_ids[list(span % grid.columns).index(column % grid.columns)])

    upper = [grid.vertex(eye_row, -c) for c in (outer, b, a, inner)]
    ids += upper + [lower("r_eye", -a), lower("r_eye", -b)]
    ids += [grid.vertex(eye_row, c) for c in (inner, a, b, outer)] + [lower("l_eye", b), lower("l_eye", a)]
    mouth, top, bottom = procedural_skin.MOUTH_ROW, procedural_skin.LIP_TOP_ROW, procedural_skin.LIP_BOTTOM_ROW
    corner = procedural_skin.MOUTH_COLUMN
    ids += [grid.vertex(mouth, -corner)] + [grid.vertex(top, c) for c in (-5, -2, 0, 2, 5)]
    ids += [grid.vertex(mouth, corner)] + [grid.vertex(bottom, c) for c in (5, 3, 0, -3, -5)]
    ids += [grid.vertex(mouth, c) for c in (1 - corner, -3, 0, 3, corner - 1)] + [lower("mouth", c) for c in (3, 0, -3)]
    return np.array(ids, dtype=np.int64)
