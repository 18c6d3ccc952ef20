# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos as users of EG3D's own programs expect them: seeds, truncation, views, loops, grids, shapes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import facelab
from facelab.api import FaceModel
from facelab.cameras.orbit import orbit_camera
from facelab.cameras.trajectories import trajectory
from facelab.errors import UserError
from facelab.inference.latent_files import read_codes, save_codes
from facelab.inference.pictures import to_uint8
from facelab.inference.video import read_video
from facelab.mesh.io import load_mesh, load_mrc
from facelab.methods import load_method
from tests.commands.running import invoke, succeed

SMALL = ("--device", "cpu", "--ray-step-multiplier", 1)


@pytest.fixture(scope="module")
def model(eg3d_run: Path) -> FaceModel:
    return facelab.load(eg3d_run)


def video(eg3d_run: Path, out: Path, *options: Any) -> list[np.ndarray]:
    """Frames of render_video, as they were before they were encoded."""
    succeed("render_video", eg3d_run, *SMALL, "--frames", "--out", out, *options)
    (mp4,), (folder,) = out.glob("*.mp4"), out.glob("frames_*")
    frames = [iio.imread(path) for path in sorted(folder.iterdir())]
    assert [f.shape for f in read_video(mp4)] == [f.shape for f in frames]
    return frames


# --- seeds and truncation


def test_seeds_are_those_of_the_original(model: FaceModel) -> None:
    """The legacy generator of numpy: seed 0 of the original is seed 0 here."""
    z = model.latents([0, 7])["z"]
    assert z.shape == (2, model.config.model.latent_dim) and z.dtype == torch.float32
    assert z[0, :3].tolist() == pytest.approx([1.764052, 0.400157, 0.978738], abs=1e-6)
    expected = np.random.RandomState(7).randn(1, z.shape[1])
    assert np.array_equal(z[1].numpy(), expected[0].astype(np.float32))
    with pytest.raises(UserError, match="0..4294967295"):
        model.latents(2**32)


def test_seeds_of_other_methods_stay(fenerf_run: Path, pigan_run: Path) -> None:
    for path in (fenerf_run, pigan_run):
        other = facelab.load(path)
        source = torch.Generator().manual_seed(5)
        for name, code in other.latents(5).items():
            assert torch.equal(code, torch.randn(1, *other.generator.latent_spec[name], generator=source))
        with pytest.raises(UserError, match="no truncation cutoff"):
            other.codes(5, cutoff=3)


def test_codes_are_told_the_camera_in_front(eg3d_run: Path) -> None:
    told = facelab.load(eg3d_run)
    assert told.generator.config.pose_conditioning
    front = orbit_camera(math.pi / 2, math.pi / 2, told.view.radius, told.view.pivot, told.view.focal).label()
    side = orbit_camera(0.8, math.pi / 2, told.view.radius, told.view.pivot, told.view.focal).label()
    codes = told.codes(3, 1.0).values["w"]
    assert torch.equal(codes, told.generator.map(told.latents(3), front).values["w"])
    assert not torch.equal(codes, told.generator.map(told.latents(3), side).values["w"])


def test_cutoff(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    full, half, average = (model.codes(4, psi).values["w"] for psi in (1.0, 0.5, 0.0))
    part = model.codes(4, 0.5, 2).values["w"]
    assert torch.equal(part[:, :2], half[:, :2]) and torch.equal(part[:, 2:], full[:, 2:])
    torch.testing.assert_close(half, (full + average) / 2)
    assert torch.equal(model.codes(4, 0.5, 0).values["w"], full)
    common = ("--seeds", 4, *SMALL, "--out", tmp_path, "--save-latents", "--psi", 0.5)
    succeed("render_images", eg3d_run, *common, "--truncation-cutoff", 2)
    assert torch.equal(read_codes(tmp_path / "codes_4.safetensors", model.generator).values["w"], part)


# --- views


def test_three_views_of_the_original(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    """Its yaws 0.4, 0, -0.4 at pitch -0.2: mirrored here, and 0.1277 rad upwards."""
    views = ("--yaws", "-0.4,0,0.4", "--pitches", "0.12767")
    succeed("render_images", eg3d_run, "--seeds", 1, "--layers", "image", *views, *SMALL, "--out", tmp_path)
    grid = torch.from_numpy(iio.imread(tmp_path / "grid_1.png")).permute(2, 0, 1)
    yaw, pitch = math.pi / 2 + torch.tensor([0.4, 0, -0.4]), math.pi / 2 - 0.2
    cameras = orbit_camera(yaw.tolist(), pitch, model.view.radius, model.view.pivot, model.view.focal)
    expected = to_uint8(model.render(model.codes(1), cameras, settings=model.settings(None, 1)).rgb)
    difference = (torch.cat(list(expected), dim=-1).int() - grid.int()).abs()
    assert difference.max() <= 1 and grid.float().std() > 1
    failed = invoke("render_images", eg3d_run, "--yaws", "0,1", "--pitches", "0,0,0", "--out", tmp_path)
    assert failed.exit_code == 2 and "one for each of the 2 views, got 3" in failed.stderr


def test_camera_path_of_the_original(model: FaceModel) -> None:
    path, frames = trajectory("eg3d", 8, model.view.fov), torch.arange(8) / 8
    yaw = math.pi / 2 + 0.35 * torch.sin(2 * math.pi * frames)
    pitch = math.pi / 2 - 0.05 + 0.25 * torch.cos(2 * math.pi * frames)
    expected = orbit_camera(yaw.tolist(), pitch.tolist(), model.view.radius, model.view.pivot, model.view.focal)
    ours = model.view.cameras(path.pitch, path.yaw, path.fov)
    torch.testing.assert_close(ours.label(), expected.label(), atol=2e-6, rtol=0)


# --- videos


def test_loop_through_seeds(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    """Twice the same frames; those at the keyframes are the heads themselves; the loop closes."""
    options = ("--seeds", "0,5,2", "--w-frames", 2, "--trajectory", "non_rotation", "--psi", 0.9, "--layers", "image")
    frames, again = (video(eg3d_run, tmp_path / name, *options) for name in ("a", "b"))
    assert len(frames) == 6 and all(np.array_equal(a, b) for a, b in zip(frames, again, strict=True))
    for place, seed in ((0, 0), (2, 5), (4, 2)):
        shown = to_uint8(model.render(model.codes(seed, 0.9), settings=model.settings(None, 1)).rgb)[0]
        assert np.abs(shown.permute(1, 2, 0).numpy().astype(int) - frames[place]).max() <= 1
    assert not np.array_equal(frames[5], frames[4]) and not np.array_equal(frames[5], frames[0])


def test_grid_of_layers(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    """Cells are filled one after the other with as many seeds as there are keyframes."""
    options = ("--seeds", "0-3", "--grid", "2x1", "--w-frames", 1, "--trajectory", "non_rotation", "--save-latents")
    frames = video(eg3d_run, tmp_path, *options, "--layers", "image,depth,normals")
    side = model.config.model.resolution
    assert len(frames) == 2 and {f.shape for f in frames} == {(side, 2 * 3 * side, 3)}
    for number, seeds in enumerate(((0, 2), (1, 3))):
        for cell, seed in enumerate(seeds):
            codes = read_codes(tmp_path / f"codes_{seed}.safetensors", model.generator)
            shown = to_uint8(model.render(codes, settings=model.settings(None, 1)).rgb)[0].permute(1, 2, 0).numpy()
            at = 3 * side * cell
            assert np.abs(shown.astype(int) - frames[number][:, at : at + side]).max() <= 1
    for text, words in (("3x1", "multiple of 3 heads, got 4"), ("two", "columns x rows such as 4x3")):
        failed = invoke("render_video", eg3d_run, "--seeds", "0-3", "--grid", text, "--out", tmp_path, *SMALL)
        assert failed.exit_code == 2 and words in failed.stderr and failed.stderr.count("\n") == 1
    failed = invoke("render_video", eg3d_run, "--w-frames", 3, "--num-frames", 3, "--out", tmp_path, *SMALL)
    assert failed.exit_code == 2 and "two ways to count frames" in failed.stderr


def test_a_file_of_several_codes_is_several_heads(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    save_codes(tmp_path / "two.safetensors", model.codes([0, 5], 0.5), "eg3d")
    common = ("--w-frames", 2, "--trajectory", "non_rotation", "--layers", "image")
    frames = video(eg3d_run, tmp_path / "file", "--latents", tmp_path / "two.safetensors", "--save-latents", *common)
    expected = video(eg3d_run, tmp_path / "seeds", "--seeds", "0,5", "--psi", 0.5, *common)
    assert len(frames) == 4
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(frames, expected, strict=True))
    assert {path.name for path in (tmp_path / "file").glob("*.safetensors")} == {
        f"codes_two_{i}.safetensors" for i in range(2)
    }


def test_raw_is_the_rendering_before_it_is_enlarged(
    model: FaceModel, eg3d_run: Path, pigan_run: Path, tmp_path: Path
) -> None:
    """Shown as large as the picture, its pixels repeated; models without super-resolution have none."""
    model_settings = {"resolution": 128, "channel_base": 512, "plane_resolution": 16}
    config = dataclasses.replace(
        model.config, model=dataclasses.replace(model.config.model, superresolution="auto", **model_settings)
    )
    method = load_method("eg3d")
    large = FaceModel(method, method.build_generator(config), config, {"step": 0}, tmp_path)
    large.generator.update_averages()
    path = large.save(tmp_path / "large.safetensors")
    succeed("render_images", path, "--seeds", 0, "--yaws", 0, "--layers", "image,raw", *SMALL, "--out", tmp_path)
    image, raw = np.split(iio.imread(tmp_path / "grid_0.png"), 2)
    side = large.config.render.resolution
    repeat = 128 // side
    assert image.shape == raw.shape == (128, 128, 3) and repeat > 1
    assert np.array_equal(raw, raw[::repeat, ::repeat].repeat(repeat, 0).repeat(repeat, 1))
    small = large.render(large.codes(0), settings=large.settings(None, 1)).raw_rgb
    assert small is not None and small.shape[-1] == side
    assert np.abs(to_uint8(small)[0].permute(1, 2, 0).numpy() - raw[::repeat, ::repeat].astype(int)).max() <= 1
    assert not np.array_equal(image, raw)
    for path in (eg3d_run, pigan_run):
        failed = invoke("render_images", path, "--layers", "image,raw", "--out", tmp_path, *SMALL)
        assert failed.exit_code == 2 and "no raw picture; use image" in failed.stderr


def test_shapes_of_frames(model: FaceModel, eg3d_run: Path, tmp_path: Path) -> None:
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    level = float(model.density(model.codes(0, 0.5))(points).median())
    cut = ("--shapes", "ply,mrc", "--voxel-resolution", 12, "--level", level)
    video(eg3d_run, tmp_path / "loop", "--seeds", "0,1", "--w-frames", 2, *cut)
    folder = tmp_path / "loop" / "shapes_both_0-1"
    names = [f"{i:05d}.{kind}" for i in range(4) for kind in ("mrc", "ply")]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "cameras.npy"]
    volumes = [load_mrc(folder / f"{i:05d}.mrc")[0] for i in range(4)]
    assert len(load_mesh(folder / "00000.ply").faces) > 20 and not np.allclose(volumes[0], volumes[1])
    cameras = np.load(folder / "cameras.npy")
    path = trajectory("front", 4, model.view.fov)
    assert np.allclose(cameras, model.view.cameras(path.pitch, path.yaw, path.fov).label().numpy())
    # one head: the camera alone moves, one shape says all
    video(eg3d_run, tmp_path / "one", "--seeds", "0", "--num-frames", 3, *cut)
    assert len(list((tmp_path / "one" / "shapes_both_0").iterdir())) == 3
    assert np.allclose(load_mrc(tmp_path / "one" / "shapes_both_0" / "00000.mrc")[0], volumes[0])


def test_depth_colours_end_where_the_planes_do(model: FaceModel) -> None:
    near, far = model.depth_range
    half, view, render = model.head_cube / 2, model.view, model.config.render
    assert near == max(render.near, view.radius - half) < view.radius < far == min(render.far, view.radius + half)
    ends = load_method("eg3d").depth_range

    def changed(**render: Any) -> Any:
        return dataclasses.replace(model.config, render=dataclasses.replace(model.config.render, **render))

    assert ends(changed(box_limits=True)) == (view.radius - half, view.radius + half)
    assert ends(changed(near=0.5, far=1.0)) == (0.5, 1.0)  # nothing of the box between them


def test_options_of_shapes_without_shapes_are_refused(eg3d_run: Path, tmp_path: Path) -> None:
    failed = invoke("render_video", eg3d_run, *SMALL, "--level", 3, "--out", tmp_path)
    assert failed.exit_code == 2 and failed.stderr.startswith("error: --level is for shapes, expected --shapes")
