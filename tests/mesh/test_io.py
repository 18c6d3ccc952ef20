# SPDX-License-Identifier: Apache-2.0
"""Mesh and volume files: round trips, other programs' readers, damaged files."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from facelab.errors import UserError
from facelab.mesh.io import Mesh, load_mesh, load_mrc, save_mesh, save_mrc

VERTICES = np.array([[0, 0, 0], [0.125, 0, 0], [0, 1 / 3, 0], [0, 0, -0.7]], dtype=np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=np.int32)
COLORS = np.array([[255, 0, 0], [0, 255, 1], [3, 128, 255], [77, 78, 79]], dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
@pytest.mark.parametrize("colors", [None, COLORS])
def test_what_was_written_is_read(tmp_path, suffix, colors):
    path = tmp_path / "new" / f"head{suffix}"
    save_mesh(path, Mesh(VERTICES, FACES, colors))
    back = load_mesh(path)
    np.testing.assert_allclose(back.vertices, VERTICES, atol=1e-7)
    assert np.array_equal(back.faces, FACES)
    assert (back.colors is None) if colors is None else np.array_equal(back.colors, colors)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".ply", ".obj"])
def test_trimesh_understands_our_files(tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    save_mesh(tmp_path / f"a{suffix}", Mesh(VERTICES, FACES, COLORS))
    other = trimesh.load_mesh(tmp_path / f"a{suffix}", process=False)
    np.testing.assert_allclose(other.vertices, VERTICES, atol=1e-6)
    assert np.array_equal(other.faces, FACES)
    assert np.array_equal(other.visual.vertex_colors[:, :3], COLORS)


def test_binary_ply_has_the_exact_bytes():
    from facelab.mesh.io import _ply_bytes

    data = _ply_bytes(Mesh(VERTICES, FACES, COLORS))
    body = data.split(b"end_header\n")[1]
    assert body[:15] == struct.pack("<3f3B", 0, 0, 0, 255, 0, 0)
    assert body[60:73] == struct.pack("<B3i", 3, 0, 2, 1)
    assert len(body) == 4 * 15 + 4 * 13


QUAD_PLY = """ply
format ascii 1.0
comment a square and a triangle
element vertex 5
property double x
property double y
property double z
property float quality
element face 2
property list uchar uint vertex_indices
end_header
0 0 0 9
1 0 0 9
1 1 0 9
0 1 0 9
2 2 0 9
4 0 1 2 3
3 1 4 2
"""


def test_foreign_ply_with_polygons_and_extra_properties(tmp_path):
    (tmp_path / "a.ply").write_text(QUAD_PLY)
    mesh = load_mesh(tmp_path / "a.ply")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [1, 4, 2]]
    assert mesh.vertices[4].tolist() == [2, 2, 0]
    head = QUAD_PLY[: QUAD_PLY.index("0 0 0 9")].replace("ascii", "binary_big_endian").encode()
    rows = b"".join(struct.pack(">3df", x, y, 0, 9) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1), (2, 2)))
    (tmp_path / "b.ply").write_bytes(head + rows + struct.pack(">B4I", 4, 0, 1, 2, 3) + struct.pack(">B3I", 3, 1, 4, 2))
    big = load_mesh(tmp_path / "b.ply")
    assert np.array_equal(big.faces, mesh.faces) and np.array_equal(big.vertices, mesh.vertices)


def test_foreign_obj_with_texture_indices_and_negative_ones(tmp_path):
    (tmp_path / "a.obj").write_text(
        "# quad\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1 4/1\nf -4 -3 -2\n"
    )
    assert load_mesh(tmp_path / "a.obj").faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ply", None, "No such file"),
        ("a.ply", b"", "no ply header"),
        ("a.ply", QUAD_PLY[:-15].encode(), "not a mesh"),
        ("a.ply", QUAD_PLY.replace("3 1 4 2", "3 1 9 2").encode(), "vertex 9"),
        ("a.obj", b"hello", "no vertices"),
        ("a.obj", b"v 0 0 zero", "not a mesh"),
        ("a.glb", b"glTF not really", "not a mesh"),
        ("a.plyy", b"", "Did you mean '.ply'"),
        ("a", b"", "no suffix"),
    ],
)
def test_bad_files_give_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_mesh(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_cut_binary_ply_is_refused(tmp_path):
    save_mesh(tmp_path / "a.ply", Mesh(VERTICES, FACES))
    whole = (tmp_path / "a.ply").read_bytes()
    for length in (len(whole) - 1, len(whole) - 60):
        (tmp_path / "a.ply").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a mesh"):
            load_mesh(tmp_path / "a.ply")


def test_saving_refuses_unknown_kinds_and_missing_folders(tmp_path):
    mesh = Mesh(VERTICES, FACES)
    with pytest.raises(UserError, match=r"Did you mean '\.obj'"):
        save_mesh(tmp_path / "a.ob", mesh)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="file stands where a folder is needed"):
        save_mesh(tmp_path / "taken" / "a.ply", mesh)


def test_meshes_are_checked():
    with pytest.raises(ValueError, match="vertex 4"):
        Mesh(VERTICES, FACES + 1)
    with pytest.raises(ValueError, match="colors must be uint8"):
        Mesh(VERTICES, FACES, COLORS.astype(np.float32))


def test_mrc_round_trip_and_header(tmp_path):
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    save_mrc(tmp_path / "a.mrc", volume, voxel_size=0.01, origin=-0.15)
    data = (tmp_path / "a.mrc").read_bytes()
    assert struct.unpack("<4i", data[:16]) == (4, 3, 2, 2)  # columns (our z), rows, sections (our x), mode
    assert struct.unpack("<2f", data[1024:1032]) == (0.0, 1.0)  # z runs fastest
    assert len(data) == 1024 + 4 * 24
    back, voxel_size, origin = load_mrc(tmp_path / "a.mrc")
    assert np.array_equal(back, volume) and voxel_size == pytest.approx(0.01) and origin == pytest.approx(-0.15)


def test_mrcfile_reads_our_volume_without_complaint(tmp_path):
    mrcfile = pytest.importorskip("mrcfile", reason="mrcfile is not installed")
    volume = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    save_mrc(tmp_path / "a.mrc", volume, voxel_size=0.5, origin=-1.0)
    assert mrcfile.validate(tmp_path / "a.mrc")
    with mrcfile.open(tmp_path / "a.mrc") as file:
        assert np.array_equal(file.data, volume)
        assert file.voxel_size.x == pytest.approx(0.5) and file.header.origin.z == pytest.approx(-1.0)
        assert file.is_volume()


@pytest.mark.parametrize("length", [100, 1024, 1100])
def test_cut_mrc_is_refused(tmp_path, length):
    save_mrc(tmp_path / "a.mrc", np.ones((3, 3, 3), np.float32), 1.0)
    (tmp_path / "a.mrc").write_bytes((tmp_path / "a.mrc").read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut|not a little endian"):
        load_mrc(tmp_path / "a.mrc")
