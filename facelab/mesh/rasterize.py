# SPDX-License-Identifier: Apache-2.0
"""Z-buffer rasteriser: mesh + Camera -> depth, face id, perspective-correct barycentrics.

Two implementations give the same result: plain batched torch (CPU and CUDA) and a numba kernel
(CPU, compiled on first use). Pixel grids are those of the volume renderer, so that mesh depth and
ray depth meet pixel by pixel: ``centers`` has pixel i at (i + 0.5) / size, ``corners`` at i / (size - 1).

Letters: N batch, V vertices, F faces, S image size, P candidate (triangle, pixel) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.errors import nearest

GRIDS = ("centers", "corners")
BACKENDS = ("auto", "torch", "numba")
EMPTY = torch.iinfo(torch.int64).max
MAX_PAIRS = 1 << 23  # candidate pairs handled at once, bounds memory to about 3 GB


@dataclass(frozen=True)
class Fragments:
    """What each pixel of N square images sees.

    Attributes:
        depth: (N, S, S) distance along the camera's z axis in scene units, 0 where nothing is hit.
        face: (N, S, S) int64 face id, -1 where nothing is hit.
        barycentric: (N, S, S, 3) perspective-correct weights of the face's corners, 0 where nothing is hit.
    """

    depth: Tensor
    face: Tensor
    barycentric: Tensor

    @property
    def hit(self) -> Tensor:
        """(N, S, S) bool."""
        return self.face >= 0


def rasterize(
    vertices: Tensor,
    faces: Tensor,
    camera: Camera,
    size: int,
    grid: str = "centers",
    *,
    near: float = 1e-6,
    far: float = float("inf"),
    supersample: int = 1,
    backend: str = "auto",
) -> Fragments:
    """Rasterise one mesh topology from N cameras.

    The nearest surface wins, either side is visible, equal depths go to the lower face id. Triangles
    with a corner behind the camera are dropped whole (there is no clipping); fragments outside
    [near, far] are dropped one by one. There is no gradient.

    Args:
        vertices: (N, V, 3) world positions (N may be 1 for several cameras).
        faces: (F, 3) integer corner indices.
        camera: N cameras (one camera is shared by all meshes).
        size: pixels per side S.
        grid: ``centers`` or ``corners``.
        near, far: range of camera z in scene units.
        supersample: k renders k*S pixels a side, k x k of them spread evenly around each pixel of ``grid``.
        backend: ``torch``, ``numba`` (CPU only) or ``auto`` (numba on the CPU where installed).

    Raises:
        ValueError: shapes that do not fit, an unknown grid or backend.

    >>> square = torch.tensor([[[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]])
    >>> faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    >>> camera = Camera.on_sphere(torch.pi / 2, torch.pi / 2, fov=12)
    >>> rasterize(square, faces, camera, 2).depth
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    _check(vertices, faces, size, grid, supersample)
    screen = project(vertices, camera, size, grid, supersample)
    if choose_backend(backend, screen.device) == "numba":
        from facelab.mesh import rasterize_numba

        face = rasterize_numba.face_ids(screen, faces, size * supersample, near, far)
    else:
        face = _face_ids_torch(screen, faces, size * supersample, near, far)
    return _fragments(screen, faces, face)


def pixel_map(size: int, grid: str, supersample: int = 1) -> tuple[float, float]:
    """(scale, offset) from normalised image coordinates u in [0, 1] to pixel numbers: scale * u + offset."""
    if grid == "corners":
        return supersample * (size - 1.0), (supersample - 1) / 2
    return float(supersample * size), -0.5


def project(vertices: Tensor, camera: Camera, size: int, grid: str, supersample: int = 1) -> Tensor:
    """(N, V, 3) world points -> (N, V, 3) pixel column, pixel row, camera z.

    Whole numbers are pixel positions of ``grid``: column 0 of ``centers`` is u = 0.5 / size.
    """
    world2cam = torch.linalg.inv(camera.cam2world.to(vertices))
    rotation, shift = world2cam[:, :3, :3], world2cam[:, :3, 3]
    in_camera = _transform(vertices, rotation) + shift[:, None]
    image = _transform(in_camera, camera.intrinsics.to(vertices))
    scale, offset = pixel_map(size, grid, supersample)
    z = in_camera[..., 2:]
    depth = torch.where(z.abs() < 1e-12, torch.full_like(z, 1e-12), z)
    return torch.cat([image[..., :2] / depth * scale + offset, z], dim=-1)


def _transform(points: Tensor, matrices: Tensor) -> Tensor:
    """(N, V, 3) points by (N, 3, 3) matrices; no matmul, which may round to TF32 or half precision."""
    return sum(points[..., k : k + 1] * matrices[:, None, :, k] for k in range(3))  # type: ignore[return-value]


def interpolate(values: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """Vertex values (N, V, C) or (V, C) -> (N, S, S, C), zero where nothing is hit."""
    corners = faces[fragments.face.clamp(min=0)]  # (N, S, S, 3)
    if values.ndim == 2:
        picked = values[corners]
    else:
        rows = torch.arange(len(values), device=values.device).view(-1, 1, 1, 1)
        picked = values[rows, corners]
    return (picked * fragments.barycentric.to(values.dtype)[..., None]).sum(dim=-2)


def _check(vertices: Tensor, faces: Tensor, size: int, grid: str, supersample: int) -> None:
    if vertices.ndim != 3 or vertices.shape[-1] != 3:
        raise ValueError(f"vertices must be (N, V, 3), got {tuple(vertices.shape)}")
    if faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(f"faces must be (F, 3), got {tuple(faces.shape)}")
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {GRIDS}, got {grid!r}.{nearest(grid, GRIDS)}")
    if size < (2 if grid == "corners" else 1) or supersample < 1:
        raise ValueError(f"size and supersample must be positive (size >= 2 with corners), got {size}, {supersample}")


def choose_backend(backend: str, device: torch.device) -> str:
    """``auto`` -> ``numba`` or ``torch``. ValueError for an unknown backend, or numba away from the CPU."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.{nearest(backend, BACKENDS)}")
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"the numba backend works on the CPU, got tensors on {device}; use backend='torch'")
    if backend != "auto":
        return backend
    return "numba" if device.type == "cpu" and has_numba() else "torch"


def has_numba() -> bool:
    """Whether the compiled CPU path can be used; looks for the package without importing it."""
    import importlib.util

    return importlib.util.find_spec("numba") is not None


def _edge_weights(corner: Tensor, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edge functions (twice the signed sub-triangle areas) of (P, 3, 3) corners at (P,) pixels, float64."""
    x, y = corner[:, :, 0], corner[:, :, 1]
    weights = []
    for a, b in ((1, 2), (2, 0), (0, 1)):
        weights.append((x[:, b] - x[:, a]) * (row - y[:, a]) - (y[:, b] - y[:, a]) * (column - x[:, a]))
    return weights[0], weights[1], weights[2]


def _face_ids_torch(screen: Tensor, faces: Tensor, size: int, near: float, far: float) -> Tensor:
    """(N, V, 3) screen points -> (N, size, size) int64 ids of the nearest face, -1 for none."""
    count, faces_count = len(screen), len(faces)
    corner = screen[:, faces].reshape(-1, 3, 3)  # (N * F, 3 corners, 3)
    low = torch.ceil(corner[..., :2].amin(dim=1)).clamp(min=0)
    high = torch.floor(corner[..., :2].amax(dim=1)).clamp(max=size - 1)
    usable = (low <= high).all(dim=1) & (corner[..., 2] > 0).all(dim=1)
    triangle = usable.nonzero()[:, 0]
    low, high = low[triangle].long(), high[triangle].long()
    width = high[:, 0] - low[:, 0] + 1
    pairs = width * (high[:, 1] - low[:, 1] + 1)
    keys = torch.full((count * size * size,), EMPTY, dtype=torch.int64, device=screen.device)
    for part in portions(pairs):
        _splat(keys, corner, triangle[part], low[part], width[part], pairs[part], size, faces_count, (near, far))
    return torch.where(keys == EMPTY, -1, keys & 0xFFFFFFFF).view(count, size, size)


def portions(pairs: Tensor) -> Iterator[slice]:
    """Slices of triangles with at most :data:`MAX_PAIRS` candidate pixels together (or one triangle with more)."""
    ends = pairs.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    start = 0
    while start < len(pairs):
        done = int(ends[start - 1]) if start else 0
        stop = len(pairs)
        if total - done > MAX_PAIRS:
            stop = max(start + 1, int(torch.searchsorted(ends, done + MAX_PAIRS)))
        yield slice(start, stop)
        start = stop


def box_pixels(low: Tensor, width: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of bounding boxes: (P,) number of the box, column and row.

    Args:
        low: (B, 2) first column and row of each box.
        width: (B,) columns.
        pairs: (B,) pixels.
    """
    box = torch.repeat_interleave(torch.arange(len(pairs), device=pairs.device), pairs)
    local = torch.arange(len(box), device=pairs.device) - (pairs.cumsum(0) - pairs)[box]
    column = low[box, 0] + local % width[box]
    row = low[box, 1] + torch.div(local, width[box], rounding_mode="floor")
    return box, column, row


def _splat(
    keys: Tensor,
    corner: Tensor,
    triangle: Tensor,
    low: Tensor,
    width: Tensor,
    pairs: Tensor,
    size: int,
    faces_count: int,
    depth_range: tuple[float, float],
) -> None:
    """Test every pixel of some bounding boxes; lower ``keys`` (depth bits, face id) where a triangle covers it."""
    box, column, row = box_pixels(low, width, pairs)
    triangle = triangle[box]
    corners = corner[triangle].double()
    w0, w1, w2 = _edge_weights(corners, column.double(), row.double())
    area = w0 + w1 + w2
    inside = ((w0 >= 0) & (w1 >= 0) & (w2 >= 0)) | ((w0 <= 0) & (w1 <= 0) & (w2 <= 0))
    inverse = (w0 / corners[:, 0, 2] + w1 / corners[:, 1, 2] + w2 / corners[:, 2, 2]) / area
    depth = (1.0 / inverse).float()
    covered = inside & (area != 0) & (depth >= depth_range[0]) & (depth <= depth_range[1])
    pixel = torch.div(triangle, faces_count, rounding_mode="floor") * size * size + row * size + column
    # positive floats sort like their bit patterns, so one integer minimum compares depth, then face id
    key = (depth.view(torch.int32).long() << 32) | (triangle % faces_count)
    keys.scatter_reduce_(0, pixel[covered], key[covered], reduce="amin")


def _fragments(screen: Tensor, faces: Tensor, face: Tensor) -> Fragments:
    count, size = face.shape[:2]
    hit = face >= 0
    image, row, column = hit.nonzero(as_tuple=True)
    corners = screen[image[:, None], faces[face[hit]]].double()
    flat = torch.stack(_edge_weights(corners, column.double(), row.double()), dim=-1)
    weights = flat / corners[..., 2]
    total, area = weights.sum(dim=-1, keepdim=True), flat.sum(dim=-1)
    barycentric = torch.zeros(count, size, size, 3, dtype=screen.dtype, device=screen.device)
    barycentric[hit] = (weights / total).to(screen.dtype)
    depth = torch.zeros(count, size, size, dtype=screen.dtype, device=screen.device)
    depth[hit] = (area / total[:, 0]).to(screen.dtype)
    return Fragments(depth, face, barycentric)
