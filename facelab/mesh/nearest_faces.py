# SPDX-License-Identifier: Apache-2.0
"""The K nearest faces of every pixel, with those that pass close by: what soft blending needs.

The z-buffer of :mod:`facelab.mesh.rasterize` keeps one face per pixel. Here plain batched torch (CPU and CUDA) sorts
all candidate (face, pixel) pairs by pixel and depth and keeps the first K of each pixel; a numba kernel (CPU, compiled
on first use) keeps a sorted list per pixel and gives the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.mesh.rasterize import box_pixels, choose_backend, portions, project

# N images, S image size, V vertices, F faces, P (face, pixel) pairs


@dataclass(frozen=True)
class NearFaces:
    """P pairs of pixel and face, sorted by pixel, then depth.

    Attributes:
        pixel: (P,) int64, (image * S + row) * S + column.
        rank: (P,) int64, 0 for the nearest face of the pixel.
        face: (P,) int64.
        barycentric: (P, 3) perspective-correct weights, clamped to 0..1 and made to sum to 1, float64.
        depth: (P,) camera z that these weights give, scene units, float64.
        distance: (P,) squared distance from the pixel to the triangle's border, negative inside; the image is 2 wide
            (normalised device coordinates), float64.
    """

    pixel: Tensor
    rank: Tensor
    face: Tensor
    barycentric: Tensor
    depth: Tensor
    distance: Tensor

    def take(self, index: Tensor) -> NearFaces:
        """Some of the pairs."""
        fields = (self.pixel, self.rank, self.face, self.barycentric, self.depth, self.distance)
        return NearFaces(*(field[index] for field in fields))


def nearest_faces(
    vertices: Tensor,
    faces: Tensor,
    camera: Camera,
    size: int,
    count: int = 5,
    blur_radius: float = 0.0,
    *,
    near: float = 0.0,
    far: float = float("inf"),
    backend: str = "auto",
) -> NearFaces:
    """Up to ``count`` faces per pixel that cover it or come closer to its centre than the blur radius.

    Args:
        vertices: (N, V, 3) world positions (N may be 1 for several cameras).
        faces: (F, 3) integer corner indices.
        camera: N cameras.
        size: pixels per side; pixel i is at (i + 0.5) / size.
        count: most faces of a pixel; of equal depths the lower face number comes first.
        blur_radius: squared distance in an image that is 2 wide.
        near, far: range of camera z in scene units.
        backend: ``torch``, ``numba`` (CPU only) or ``auto`` (numba on the CPU where installed).

    Raises:
        ValueError: shapes that do not fit, a count or size below 1, or an unknown backend.
    """
    if vertices.ndim != 3 or vertices.shape[-1] != 3 or faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(
            f"vertices must be (N, V, 3) and faces (F, 3), got {tuple(vertices.shape)}, {tuple(faces.shape)}"
        )
    if size < 1 or count < 1 or blur_radius < 0:
        raise ValueError(f"size and count must be at least 1 and the blur radius at least 0, got {size}, {count}")
    screen = project(vertices, camera, size, "centers")
    if choose_backend(backend, screen.device) == "numba":
        from facelab.mesh import nearest_faces_numba

        return NearFaces(*nearest_faces_numba.near_faces(screen, faces, size, count, blur_radius, near, far))
    corner = screen[:, faces].reshape(-1, 3, 3)
    margin = blur_radius**0.5 * size / 2
    low = torch.ceil(corner[..., :2].amin(dim=1) - margin).clamp(min=0)
    high = torch.floor(corner[..., :2].amax(dim=1) + margin).clamp(max=size - 1)
    usable = (low <= high).all(dim=1) & (corner[..., 2] > 0).all(dim=1)
    triangle = usable.nonzero()[:, 0]
    low, high = low[triangle].long(), high[triangle].long()
    width = high[:, 0] - low[:, 0] + 1
    pairs = width * (high[:, 1] - low[:, 1] + 1)
    found = [
        _candidates(corner, triangle[part], low[part], width[part], pairs[part], size, len(faces), blur_radius)
        for part in portions(pairs)
    ]
    if not found:
        none = torch.zeros(0, dtype=torch.int64, device=screen.device)
        return NearFaces(none, none, none, none.double()[:, None].expand(0, 3), none.double(), none.double())
    fields = ("pixel", "rank", "face", "barycentric", "depth", "distance")
    whole = found[0] if len(found) == 1 else NearFaces(*(torch.cat([getattr(f, n) for f in found]) for n in fields))
    if near > 0 or far < float("inf"):
        whole = whole.take(((whole.depth >= near) & (whole.depth <= far)).nonzero()[:, 0])
    return _first_of_each_pixel(whole, count)


def _candidates(
    corner: Tensor,
    triangle: Tensor,
    low: Tensor,
    width: Tensor,
    pairs: Tensor,
    size: int,
    faces_count: int,
    blur_radius: float,
) -> NearFaces:
    """All pairs that count, in the order of the faces; ranks are not set."""
    box, column, row = box_pixels(low, width, pairs)
    corners = corner[triangle].double()  # (B, 3, 3), fewer than pairs
    place = torch.stack([column, row], dim=-1).double()
    edges = [_edge(corners[:, a, :2], corners[:, b, :2], box, place) for a, b in ((1, 2), (2, 0), (0, 1))]
    w0, w1, w2 = (cross for cross, _ in edges)
    inside = ((w0 >= 0) & (w1 >= 0) & (w2 >= 0)) | ((w0 <= 0) & (w1 <= 0) & (w2 <= 0))
    squared = torch.minimum(torch.minimum(edges[0][1], edges[1][1]), edges[2][1]) * (2 / size) ** 2
    near = ((inside | (squared < blur_radius)) & (w0 + w1 + w2 != 0)).nonzero()[:, 0]
    box, inside, squared = box[near], inside[near], squared[near]
    z = corners[:, :, 2][box]
    weights = torch.stack([w0[near], w1[near], w2[near]], dim=-1) / z
    weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.clamp(0, 1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    number = triangle[box]
    image = torch.div(number, faces_count, rounding_mode="floor")
    pixel = (image * size + row[near]) * size + column[near]
    distance = torch.where(inside, -squared, squared)
    return NearFaces(pixel, pixel, number % faces_count, weights, (weights * z).sum(dim=-1), distance)


def _edge(start: Tensor, end: Tensor, box: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Edge function (twice the area with the pixel) and squared distance to the edge, both (P,), in pixels.

    Args:
        start, end: (B, 2) ends of one edge of every triangle.
        box: (P,) triangle of each pair.
        place: (P, 2) column and row of the pixel.
    """
    along = end - start
    length = along.square().sum(dim=-1).clamp_min(1e-30)
    offset = place - start[box]
    along_P, length_P = along[box], length[box]
    cross = along_P[:, 0] * offset[:, 1] - along_P[:, 1] * offset[:, 0]
    t = ((along_P * offset).sum(dim=-1) / length_P).clamp(0, 1)
    return cross, (offset - t[:, None] * along_P).square().sum(dim=-1)


def _first_of_each_pixel(pairs: NearFaces, count: int) -> NearFaces:
    # positive floats sort like their bit patterns; the sort is stable, so that equal depths keep the order of the faces
    key = (pairs.pixel << 32) | pairs.depth.float().view(torch.int32).long()
    order = torch.argsort(key, stable=True)
    pixel = pairs.pixel[order]
    position = torch.arange(len(pixel), device=pixel.device)
    first = torch.ones_like(pixel, dtype=torch.bool)
    first[1:] = pixel[1:] != pixel[:-1]
    rank = position - torch.where(first, position, 0).cummax(0).values
    kept = rank < count
    chosen = pairs.take(order[kept])
    return NearFaces(chosen.pixel, rank[kept], chosen.face, chosen.barycentric, chosen.depth, chosen.distance)
