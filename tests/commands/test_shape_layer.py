# SPDX-License-Identifier: Apache-2.0
"""The layer ``shape``: meshes of heads, shaded, in the grids of render_images and the films of render_video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import facelab
from facelab.cli.shapes import ShapePictures
from facelab.inference.video import read_video
from facelab.mesh.shading import PointLight, Surface, shade_mesh
from tests.commands.running import invoke, succeed

SIZE = 16
SMALL = ("--device", "cpu", "--ray-step-multiplier", 1, "--image-size", SIZE)


def middle_density(model: facelab.FaceModel, psi: float) -> float:
    """A level that the field of a barely trained model crosses inside its cube."""
    points = (torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * model.head_cube
    return float(model.density(model.codes(0, psi))(points).median())


def expected_row(
    model: facelab.FaceModel, seed: int, psi: float, level: float, yaws: list[float], size: int
) -> np.ndarray:
    """(S, views * S, 3) shaded views, put together here."""
    mesh = model.extract_mesh(code=model.codes(seed, psi), resolution=14, level=level)
    surface = Surface.of(mesh, colored=False)
    near, far = model.depth_range
    views = []
    for yaw in yaws:
        camera = model.camera(yaw=yaw)
        light = PointLight().scaled(float(camera.cam2world[0, :3, 3].norm()))
        views.append(shade_mesh(surface, camera, size, light=light, supersample=2, near=near, far=far)[0])
    return torch.cat(views, dim=-1).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("method", ["fenerf", "pigan", "eg3d"])
def test_row_of_a_grid(method: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = request.getfixturevalue(f"{method}_run")
    model = facelab.load(run)
    level = middle_density(model, 0.7)
    options = ("--layers", "image,shape", "--yaws", "-0.4,0.3", "--voxel-resolution", 14, "--level", level)
    small = SMALL if method != "eg3d" else SMALL[:4]  # EG3D's networks fix the size
    succeed("render_images", run, "--seeds", "0", *options, *small, "--out", tmp_path)
    with Image.open(tmp_path / "grid_0.png") as file:
        grid = np.asarray(file)
    size = grid.shape[1] // 2
    assert grid.shape == (2 * size, 2 * size, 3)
    shape = grid[size:]
    assert np.array_equal(shape, expected_row(model, 0, 0.7, level, [-0.4, 0.3], size))
    assert (shape != 255).any() and len(np.unique(shape)) > 5
    assert (shape[..., 0] == shape[..., 1]).all()  # white, whatever the head's colours


def test_film_with_two_heads(pigan_run: Path, tmp_path: Path) -> None:
    model = facelab.load(pigan_run)
    level = middle_density(model, 0.5)
    options = ("--seeds", "0,1", "--latent-type", "non", "--grid", "2x1", "--layers", "shape", "--num-frames", 2)
    shape = ("--voxel-resolution", 14, "--level", level)
    succeed("render_video", pigan_run, *options, *shape, *SMALL, "--frames", "--out", tmp_path)
    assert [f.shape for f in read_video(tmp_path / "interp_non_0-1.mp4")] == [(SIZE, 2 * SIZE, 3)] * 2
    with Image.open(tmp_path / "frames_non_0-1" / "00000.png") as file:
        frame = np.asarray(file)
    assert not np.array_equal(frame[:, :SIZE], frame[:, SIZE:])
    assert (frame != 255).any()


def test_heads_that_stand_still_are_cut_out_once(
    pigan_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = middle_density(facelab.load(pigan_run), 0.5)
    made, original = [], ShapePictures.of

    def counted(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(ShapePictures, "of", staticmethod(counted))
    options = ("--layers", "shape", "--num-frames", 3, "--voxel-resolution", 10, "--level", level)
    succeed("render_video", pigan_run, "--seeds", "0", *options, *SMALL, "--out", tmp_path / "one")
    assert len(made) == 1
    succeed("render_video", pigan_run, "--seeds", "0,1", *options, *SMALL, "--out", tmp_path / "two")
    assert len(made) == 1 + 3


def test_options_of_shapes_need_a_shape(pigan_run: Path, tmp_path: Path) -> None:
    for command, needed in (("render_images", "--layers shape"), ("render_video", "--shapes ply")):
        failed = invoke(command, pigan_run, *SMALL, "--cube-size", 0.2, "--layers", "image", "--out", tmp_path)
        assert failed.exit_code == 2
        assert failed.stderr.startswith(f"error: --cube-size is for shapes, expected {needed}")
        assert len(failed.stderr.strip().splitlines()) == 1
    empty = invoke("render_images", pigan_run, *SMALL, "--layers", "shape", "--level", 1e9, "--out", tmp_path)
    assert empty.exit_code == 2 and empty.stderr.startswith("error: no surface at level 1e+09")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("method", ["fenerf", "eg3d"])
def test_a_film_of_the_turning_mesh(method: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = request.getfixturevalue(f"{method}_run")
    level = middle_density(facelab.load(run), 0.5)
    shape = ("--voxel-resolution", 10, "--level", level, "--format", "mrc", "--turntable", 3)
    result = succeed("extract_mesh", run, "--device", "cpu", *shape, "--out", tmp_path)
    assert result.stdout.split() == [str(tmp_path / "0.mrc"), str(tmp_path / "0_turn.mp4")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mrc", "0_turn.mp4"]
    frames = list(read_video(tmp_path / "0_turn.mp4"))
    assert [frame.shape for frame in frames] == [(512, 512, 3)] * 3
    assert all((frame < 200).mean() > 0.05 for frame in frames)  # something is there
    assert not np.array_equal(frames[0], frames[1])  # and turns
