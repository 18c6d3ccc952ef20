# SPDX-License-Identifier: Apache-2.0
"""Mesh and volume files: ply, obj, glb (meshes) and mrc (volumes), written atomically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facelab.errors import UserError, nearest
from facelab.files import atomic_path

MESH_SUFFIXES = (".ply", ".obj", ".glb")


@dataclass(frozen=True)
class Mesh:
    """V vertices and F triangles.

    Attributes:
        vertices: (V, 3) float32 x, y, z in scene units.
        faces: (F, 3) integer vertex numbers, counterclockwise seen from outside.
        colors: (V, 3) uint8 RGB, or None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.vertices.ndim != 2 or self.vertices.shape[1] != 3:
            raise ValueError(f"vertices must be (V, 3), got {self.vertices.shape}")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3 or self.faces.dtype.kind not in "iu":
            raise ValueError(f"faces must be (F, 3) integers, got {self.faces.dtype} {self.faces.shape}")
        if self.faces.size and not 0 <= self.faces.min() <= self.faces.max() < len(self.vertices):
            raise ValueError(f"faces name vertex {self.faces.max()} (or a negative one) of {len(self.vertices)}")
        if self.colors is not None and (self.colors.shape != self.vertices.shape or self.colors.dtype != np.uint8):
            raise ValueError(f"colors must be uint8 {self.vertices.shape}, got {self.colors.dtype} {self.colors.shape}")


def save_mesh(path: str | Path, mesh: Mesh) -> None:
    """Write ``.ply`` (binary), ``.obj`` or ``.glb`` by the name of the file, vertex colours included.

    Raises:
        UserError: another suffix (with the nearest one), or the folder cannot be written.
    """
    writer = {".ply": _ply_bytes, ".obj": _obj_bytes, ".glb": _glb_bytes}[_mesh_suffix(path)]
    data = writer(mesh)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_mesh(path: str | Path) -> Mesh:
    """Read a ``.ply`` (ascii or binary), ``.obj`` or ``.glb`` triangle mesh; polygons become fans of triangles.

    Raises:
        UserError: a file that is missing, damaged or of another kind.
    """
    reader = {".ply": _read_ply, ".obj": _read_obj, ".glb": _read_glb}[_mesh_suffix(path)]
    try:
        return reader(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read mesh {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is not a mesh that can be read: {str(error).splitlines()[0]}") from error


def _mesh_suffix(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise UserError(
            f"cannot tell the kind of mesh from the name {path}: "
            f"expected {', '.join(MESH_SUFFIXES)}, got {suffix or 'no suffix'}.{nearest(suffix, MESH_SUFFIXES)}"
        )
    return suffix


# ---------------------------------------------------------------- ply

_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


def _ply_bytes(mesh: Mesh) -> bytes:
    fields = [(axis, "<f4") for axis in "xyz"]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(mesh.vertices)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    if mesh.colors is not None:
        fields += [(name, "u1") for name in ("red", "green", "blue")]
        lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    lines += [f"element face {len(mesh.faces)}", "property list uchar int vertex_indices", "end_header"]
    vertices = np.empty(len(mesh.vertices), dtype=fields)
    for number, axis in enumerate("xyz"):
        vertices[axis] = mesh.vertices[:, number]
    if mesh.colors is not None:
        for number, name in enumerate(("red", "green", "blue")):
            vertices[name] = mesh.colors[:, number]
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("index", "<i4", (3,))])
    faces["count"], faces["index"] = 3, mesh.faces
    return ("\n".join(lines) + "\n").encode() + vertices.tobytes() + faces.tobytes()


@dataclass
class _PlyElement:
    name: str
    count: int
    scalars: list[tuple[str, str]]  # property name, numpy type
    lists: list[tuple[str, str, str]]  # property name, numpy type of the count, of the items


def _ply_header(data: bytes) -> tuple[str, list[_PlyElement], bytes]:
    head, mark, body = data.partition(b"end_header")
    if not data.startswith(b"ply") or not mark:
        raise ValueError("no ply header")
    body = body[2:] if body.startswith(b"\r\n") else body[1:]
    kind, elements = "", []
    for words in (line.split() for line in head.decode("ascii", "replace").splitlines()[1:]):
        if words[:1] == ["format"]:
            kind = words[1]
        elif words[:1] == ["element"]:
            elements.append(_PlyElement(words[1], int(words[2]), [], []))
        elif words[:2] == ["property", "list"]:
            elements[-1].lists.append((words[4], _PLY_TYPES[words[2]], _PLY_TYPES[words[3]]))
        elif words[:1] == ["property"]:
            elements[-1].scalars.append((words[2], _PLY_TYPES[words[1]]))
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"ply format {kind!r} is not known")
    return kind, elements, body


def _read_ply(data: bytes) -> Mesh:
    kind, elements, body = _ply_header(data)
    vertices, colors, faces = None, None, np.empty((0, 3), dtype=np.int32)
    tokens = body.split() if kind == "ascii" else []
    for element in elements:
        if element.name == "vertex" and not element.lists:
            if kind == "ascii":
                width = len(element.scalars)
                flat, tokens = tokens[: width * element.count], tokens[width * element.count :]
                columns = np.array(flat, dtype=np.float64).reshape(element.count, width).T
                table = {name: column for (name, _), column in zip(element.scalars, columns, strict=True)}
            else:
                order = "<" if kind == "binary_little_endian" else ">"
                layout = np.dtype([(name, order + type_) for name, type_ in element.scalars])
                rows = np.frombuffer(body, layout, element.count)
                body = body[rows.nbytes :]
                table = {name: rows[name] for name, _ in element.scalars}
            vertices = np.stack([table[axis] for axis in "xyz"], axis=-1).astype(np.float32)
            if all(name in table for name in ("red", "green", "blue")):
                colors = np.stack([table[name] for name in ("red", "green", "blue")], axis=-1).astype(np.uint8)
        elif element.name == "face" and len(element.lists) == 1 and not element.scalars:
            faces = _ply_faces(element, kind, body, tokens)
            break  # what may follow (edges, materials) is not needed
        else:
            raise ValueError(f"ply element {element.name!r} has properties that are not understood")
    if vertices is None:
        raise ValueError("the ply file has no vertices")
    return Mesh(vertices, faces, colors)


def _ply_faces(element: _PlyElement, kind: str, body: bytes, tokens: list[bytes]) -> np.ndarray:
    _, count_type, item_type = element.lists[0]
    if kind == "ascii":
        polygons, place = [], 0
        for _ in range(element.count):
            size = int(tokens[place])
            polygons.append([int(t) for t in tokens[place + 1 : place + 1 + size]])
            place += 1 + size
        return _fan(polygons)
    order = "<" if kind == "binary_little_endian" else ">"
    layout = np.dtype([("count", order + count_type), ("index", order + item_type, (3,))])
    if len(body) >= element.count * layout.itemsize:
        rows = np.frombuffer(body, layout, element.count)
        if (rows["count"] == 3).all():
            return rows["index"].astype(np.int32)
    polygons, place, item = [], 0, np.dtype(order + item_type)
    for _ in range(element.count):
        size = int(np.frombuffer(body, order + count_type, 1, place)[0])
        place += np.dtype(count_type).itemsize
        polygons.append(np.frombuffer(body, item, size, place).tolist())
        place += size * item.itemsize
    return _fan(polygons)


def _fan(polygons: Sequence[Sequence[int]]) -> np.ndarray:
    if any(len(polygon) < 3 for polygon in polygons):
        raise ValueError("a face has fewer than 3 corners")
    triangles = [(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)]
    return np.array(triangles, dtype=np.int32).reshape(-1, 3)


# ---------------------------------------------------------------- obj and glb


def _obj_bytes(mesh: Mesh) -> bytes:
    """Vertex colours follow the coordinates as three numbers in 0..1, which most programs read."""
    if mesh.colors is None:
        lines = [f"v {x:.8g} {y:.8g} {z:.8g}" for x, y, z in mesh.vertices.tolist()]
    else:
        rows = np.concatenate([mesh.vertices, mesh.colors / 255], axis=1).tolist()
        lines = [f"v {x:.8g} {y:.8g} {z:.8g} {r:.5f} {g:.5f} {b:.5f}" for x, y, z, r, g, b in rows]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()


def _read_obj(data: bytes) -> Mesh:
    rows: list[list[float]] = []
    polygons: list[list[int]] = []
    for line in data.decode("utf-8", "replace").splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "v":
            rows.append([float(number) for number in rest.split()])
        elif kind == "f":
            corners = [int(corner.split("/")[0]) for corner in rest.split()]
            polygons.append([c - 1 if c > 0 else len(rows) + c for c in corners])
    if not rows:
        raise ValueError("the obj file has no vertices")
    table = np.array(rows, dtype=np.float64)
    colors = (table[:, 3:6] * 255 + 0.5).clip(0, 255).astype(np.uint8) if table.shape[1] >= 6 else None
    return Mesh(table[:, :3].astype(np.float32), _fan(polygons), colors)


def _glb_bytes(mesh: Mesh) -> bytes:
    import trimesh
    from trimesh.exchange import gltf

    # process=False: trimesh must not merge or reorder vertices
    model = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=mesh.colors, process=False)
    return bytes(gltf.export_glb(trimesh.Scene(model)))


def _read_glb(data: bytes) -> Mesh:
    import io

    import trimesh

    scene = trimesh.load_scene(io.BytesIO(data), file_type="glb", process=False)
    model = scene.to_mesh()
    colors = None
    if model.visual.kind == "vertex":
        colors = np.ascontiguousarray(model.visual.vertex_colors[:, :3], dtype=np.uint8)
    return Mesh(np.asarray(model.vertices, dtype=np.float32), np.asarray(model.faces, dtype=np.int32), colors)


# ---------------------------------------------------------------- mrc volumes


def save_mrc(path: str | Path, volume: np.ndarray, voxel_size: float, origin: float = 0.0) -> None:
    """Write a volume as MRC2014, mode 2 (float32), little endian, for ChimeraX and the like.

    Args:
        volume: (X, Y, Z) values, x slowest; they are stored in this order, so that the file's
            sections run along our x and its columns along our z (as pi-GAN's files do).
        voxel_size: scene units per voxel.
        origin: coordinate of the first voxel on every axis, scene units.
    """
    if Path(path).suffix.lower() != ".mrc":
        raise UserError(f"a volume is written as .mrc, got {path}")
    if volume.ndim != 3:
        raise ValueError(f"a volume must be (X, Y, Z), got {volume.shape}")
    values = np.ascontiguousarray(volume, dtype="<f4")
    slow, middle, fast = values.shape
    header = np.zeros(256, dtype="<i4")
    floats = header.view("<f4")
    header[0:4] = fast, middle, slow, 2  # columns, rows, sections; mode 2 = float32
    header[7:10] = fast, middle, slow  # sampling along the cell
    floats[10:13] = np.array([fast, middle, slow]) * voxel_size  # cell size
    floats[13:16] = 90.0  # cell angles in degrees
    header[16:19] = 1, 2, 3  # columns, rows, sections are the file's X, Y, Z
    floats[19:22] = values.min(), values.max(), values.mean(dtype=np.float64)
    header[22] = 1  # space group of a volume
    header[27] = 20140  # MRC2014
    floats[49:52] = origin
    header[52] = int.from_bytes(b"MAP ", "little")
    header[53] = 0x4444  # little endian
    floats[54] = values.std(dtype=np.float64)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(values.data)


def load_mrc(path: str | Path) -> tuple[np.ndarray, float, float]:
    """Read a mode 2 volume -> (X, Y, Z) float32 with x slowest, voxel size, origin. UserError if it is not one."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read volume {path}: {error.strerror or error}") from error
    header = np.frombuffer(data[:1024].ljust(1024, b"\0"), dtype="<i4")
    fast, middle, slow, mode = header[:4].tolist()
    start = 1024 + int(header[23])
    if bytes(data[208:211]) != b"MAP" or mode != 2:
        raise UserError(f"{path} is not a little endian MRC volume of mode 2 (float32)")
    if min(fast, middle, slow) < 1 or len(data) < start + 4 * fast * middle * slow:
        raise UserError(f"{path} is cut: expected {fast} x {middle} x {slow} float32 values, got {len(data)} bytes")
    values = np.frombuffer(data, "<f4", fast * middle * slow, start).reshape(slow, middle, fast).copy()
    floats = header.view("<f4")
    return values, float(floats[10] / fast), float(floats[49])
