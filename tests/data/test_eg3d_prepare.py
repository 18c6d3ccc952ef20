# SPDX-License-Identifier: Apache-2.0
"""Making EG3D sets: pictures and cameras in every accepted form, synthetic heads, mirroring, rebalancing, recipes."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.cameras.camera import Camera
from facelab.cli.prepare import prepare_data as main
from facelab.data import eg3d_labels, eg3d_recipes
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import mirror_label
from facelab.data.eg3d_prepare import synthetic_items, write_items
from facelab.data.synthetic import SyntheticHeads, project_points
from facelab.errors import UserError
from tests.data.pictures import smooth_picture

FLIP = np.diag([1.0, -1, -1, 1])
FOCAL = 4.0


def camera_of(number: int) -> np.ndarray:
    camera = Camera.on_sphere(1.5 + 0.03 * number, 1.1 + 0.2 * number, 2 * math.degrees(math.atan(0.5 / FOCAL)), 2.7)
    return camera.label()[0].double().numpy()


def pictures_in(folder: Path, count: int = 4, size: tuple[int, int] = (16, 16), suffix: str = "png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"p{number}.{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(smooth_picture(*size, number)).save(folder / name)
    return names


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def matrices(convention: str) -> list[np.ndarray]:
    c2w = [camera_of(k)[:16].reshape(4, 4) for k in range(4)]
    if convention.startswith("opengl"):
        c2w = [m @ FLIP for m in c2w]
    return c2w if convention.endswith("c2w") else [np.linalg.inv(m) for m in c2w]


def write_cameras(folder: Path, names: list[str], form: str) -> list[object]:
    """Camera files in one of the accepted forms; returns the options that say how to read them."""
    label = [camera_of(k).tolist() for k in range(len(names))]
    stems = [Path(name).stem for name in names]
    if form == "npy":
        for stem, value in zip(stems, label, strict=True):
            np.save(folder / f"{stem}.npy", np.array(value)[None])
        return []
    if form == "txt":
        other = folder.parent / "poses"
        other.mkdir()
        for stem, matrix in zip(stems, matrices("opencv_w2c"), strict=True):
            (other / f"{stem}.txt").write_text(" ".join(map(repr, matrix.flatten().tolist())))
        return ["--cameras", other, "--convention", "opencv_w2c", "--focal", FOCAL]
    path = folder.parent / "cameras.json"
    if form == "pairs":
        inner = [[[64.0, 0, 8], [0, 64.0, 8], [0, 0, 1]]] * len(names)
        content: object = {
            s: {"pose": m.tolist(), "intrinsics": i}
            for s, m, i in zip(stems, matrices("opencv_c2w"), inner, strict=True)
        }
        options: list[object] = ["--pixels", 16]
    elif form == "transforms":
        frames = [
            {"file_path": f"./{s}", "transform_matrix": m.tolist()}
            for s, m in zip(stems, matrices("opengl_c2w"), strict=True)
        ]
        content, options = {"camera_angle_x": 2 * math.atan(0.5 / FOCAL), "frames": frames}, []
    else:
        content, options = {"labels": [[n, v] for n, v in zip(names, label, strict=True)][::-1]}, []
    path.write_text(json.dumps(content))
    return ["--cameras", path, *options]


@pytest.mark.parametrize("form", ["labels", "npy", "txt", "pairs", "transforms"])
def test_cameras_of_every_form_become_the_same_labels(tmp_path: Path, form: str) -> None:
    names = pictures_in(tmp_path / "src")
    options = write_cameras(tmp_path / "src", names, form)
    run("eg3d", tmp_path / "src", tmp_path / "set.zip", "--quiet", *options)
    dataset = Eg3dDataset(tmp_path / "set.zip")
    assert dataset.names == tuple(f"00000/img{k:08d}.png" for k in range(4))
    for number in range(4):
        assert (np.asarray(dataset.read_picture(number)) == smooth_picture(16, 16, number)).all()
        np.testing.assert_allclose(dataset.labels[number], camera_of(number), atol=2e-6)  # type: ignore[index]


def test_zip_is_stored_uncompressed_and_the_same_every_time(tmp_path: Path) -> None:
    names = pictures_in(tmp_path / "src")
    options = write_cameras(tmp_path / "src", names, "labels")
    for target in ("a.zip", "b.zip"):
        run("eg3d", tmp_path / "src", tmp_path / target, "--quiet", "--mirror", *options)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {m.compress_type for m in archive.infolist()} == {zipfile.ZIP_STORED}
    dataset = Eg3dDataset(tmp_path / "a.zip")
    assert dataset.names[:2] == ("00000/img00000000.png", "00000/img00000000_mirror.png")
    assert (np.asarray(dataset.read_picture(1)) == smooth_picture(16, 16, 0)[:, ::-1]).all()
    torch.testing.assert_close(dataset.labels[1:2], mirror_label(dataset.labels[:1]))  # type: ignore[index]


def test_center_crop_moves_the_intrinsics_with_the_picture(tmp_path: Path) -> None:
    names = pictures_in(tmp_path / "src", 1, (24, 16))
    options = write_cameras(tmp_path / "src", names, "labels")
    assert "expected a square picture, got 24x16" in run(
        "eg3d", tmp_path / "src", tmp_path / "x", "--quiet", *options, status=2
    )
    run("eg3d", tmp_path / "src", tmp_path / "y", "--quiet", "--center-crop", *options)
    label = Eg3dDataset(tmp_path / "y").labels[0].double()  # type: ignore[index]
    points = torch.randn(1, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2
    before = project_points(points, Camera.from_label(torch.from_numpy(camera_of(0))[None]))[0] * torch.tensor(
        [24.0, 16]
    )
    after = project_points(points, Camera.from_label(label[None]))[0] * 16
    torch.testing.assert_close(after, before - torch.tensor([4.0, 0]), atol=1e-4, rtol=0)


def test_synthetic_heads_come_with_cameras_in_eg3d_units(tmp_path: Path) -> None:
    run("eg3d", "synthetic", tmp_path / "set", "--count", 3, "--size", 32, "--masks", "--quiet", "--seed", 5)
    dataset = Eg3dDataset(tmp_path / "set", masks=True)
    label = dataset.labels
    assert label is not None and dataset.image_size == 32
    torch.testing.assert_close(label[:, [3, 7, 11]].norm(dim=1), torch.full((3,), 2.7))
    torch.testing.assert_close(label[:, 16], torch.full((3,), eg3d_labels.FOCAL))
    fov = math.degrees(2 * math.atan(0.5 / eg3d_labels.FOCAL))
    heads = SyntheticHeads(5, 32, grid="centers", fov=fov, threads=1).batch(range(3))
    batch = dataset.items(range(3))
    assert torch.equal(batch.image, heads.image)  # type: ignore[arg-type]
    assert torch.equal(batch.label_map.long(), heads.mask)  # type: ignore[union-attr]
    place = project_points(heads.landmarks_3d * 2.7, batch.camera)  # type: ignore[arg-type]
    torch.testing.assert_close(place, heads.landmarks_2d, atol=1e-5, rtol=0)


def test_left_out_pictures_are_named_and_do_not_shift_the_labels_of_others(tmp_path: Path) -> None:
    names = pictures_in(tmp_path / "src")
    options = write_cameras(tmp_path / "src", names, "npy")
    (tmp_path / "src/p1.npy").unlink()
    (tmp_path / "src/p2.png").write_bytes(b"no picture")
    text = run("eg3d", tmp_path / "src", tmp_path / "set", "--quiet", *options)
    assert "2 left out" in text and "p1.png: no camera" in text
    dataset = Eg3dDataset(tmp_path / "set")
    np.testing.assert_allclose(dataset.labels[1], camera_of(3), atol=2e-6)  # type: ignore[index]
    assert (np.asarray(dataset.read_picture(1)) == smooth_picture(16, 16, 3)).all()


def test_failed_making_leaves_no_zip_and_a_folder_can_be_made_again(tmp_path: Path) -> None:
    names = pictures_in(tmp_path / "src")
    options = write_cameras(tmp_path / "src", names, "labels")
    Image.fromarray(smooth_picture(8, 8, 3)).save(tmp_path / "src/p3.png")
    assert "every picture of a set has one size" in run(
        "eg3d", tmp_path / "src", tmp_path / "a.zip", *options, status=2
    )
    run("eg3d", tmp_path / "src", tmp_path / "b", "--quiet", *options, status=2)
    assert not [p.name for p in tmp_path.iterdir() if "a." in p.name or p.name.endswith(".tmp.zip")]
    with pytest.raises(UserError, match="no camera labels"):
        Eg3dDataset(tmp_path / "b")
    run("eg3d", tmp_path / "src", tmp_path / "b", "--quiet", "--size", 8, *options)
    assert len(Eg3dDataset(tmp_path / "b")) == 4
    assert "is not empty" in run("eg3d", tmp_path / "src", tmp_path / "b", "--quiet", *options, status=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"p0": [1.0] * 5}, "expected 25 numbers .* got 5 numbers"),
        ({"p0": np.eye(4).tolist()}, "states no focal length; give --focal"),
        ({"p0": [*np.eye(4).flatten(), 512, 0, 256, 0, 512, 256, 0, 0, 1]}, "--pixels"),
        ({"p0": ["a"] * 25}, "expected 25 numbers"),
        ({"p0": [float("nan")] * 25}, "NaN"),
        ({"q": [1.0] * 25}, "none of the 4 pictures"),
        ({"a/p0.png": [1.0] * 25, "b/p0.png": [2.0] * 25}, "several files are called p0"),
        ([3], "expected labels by file name"),
    ],
)
def test_bad_camera_files_are_named_in_one_line(tmp_path: Path, content: object, words: str) -> None:
    pictures_in(tmp_path / "src")
    (tmp_path / "c.json").write_text(json.dumps(content))
    text = run("eg3d", tmp_path / "src", tmp_path / "x.zip", "--quiet", "--cameras", tmp_path / "c.json", status=2)
    import re

    assert re.search(words, text) and text.count("\n") == 1, text
    assert not (tmp_path / "x.zip").exists()


def test_hostile_npy_is_refused_and_not_executed(tmp_path: Path) -> None:
    pictures_in(tmp_path / "src", 1)
    np.save(tmp_path / "src/p0.npy", np.array([print], dtype=object), allow_pickle=True)
    assert "cannot be read as a camera file" in run("eg3d", tmp_path / "src", tmp_path / "x.zip", "--quiet", status=2)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    text = run("eg3d", "synthetic", tmp_path / "x", "--count", 1, "--convention", "opengl_c2w", status=2)
    assert "--convention has no effect on synthetic heads" in text
    write_items(tmp_path / "set.zip", synthetic_items(1, 16, 1))
    assert "--radius has no effect" in run("eg3d", tmp_path / "set.zip", tmp_path / "x", "--radius", 1, status=2)
    run("eg3d", tmp_path / "set.zip", tmp_path / "x", "--size", 8, "--quiet")
    assert Eg3dDataset(tmp_path / "x").image_size == 8


# ------------------------------------------------------------------ recipes


@pytest.fixture
def synthetic_set(tmp_path: Path) -> Path:
    write_items(tmp_path / "set.zip", synthetic_items(5, 16, 1), masks=True)
    return tmp_path / "set.zip"


def test_mirror_command_equals_mirroring_while_reading(synthetic_set: Path, tmp_path: Path) -> None:
    run("eg3d-mirror", synthetic_set, tmp_path / "m.zip", "--quiet")
    made, live = Eg3dDataset(tmp_path / "m.zip", masks=True), Eg3dDataset(synthetic_set, masks=True, mirror=True)
    assert len(made) == len(live) == 10
    for number in range(5):
        a, b = made.items([2 * number + 1]), live.items([5 + number])
        assert torch.equal(a.image, b.image) and torch.equal(a.label_map, b.label_map)  # type: ignore[arg-type]
        torch.testing.assert_close(a.camera.label(), b.camera.label())  # type: ignore[union-attr]
    assert "mirror images already" in run("eg3d-mirror", tmp_path / "m.zip", tmp_path / "n.zip", "--quiet", status=2)


def test_rebalance_repeats_listed_pictures_under_numbered_names(synthetic_set: Path, tmp_path: Path) -> None:
    (tmp_path / "copies.json").write_text('{"3": 2, "0": 1, "4": 0}')
    run("eg3d-rebalance", synthetic_set, tmp_path / "r", "--copies", tmp_path / "copies.json")
    made, source = Eg3dDataset(tmp_path / "r", masks=True), Eg3dDataset(synthetic_set, masks=True)
    assert [Path(n).stem for n in made.names] == ["img00000000_00", "img00000003_00", "img00000003_01"]
    for place, number in enumerate((0, 3, 3)):
        assert torch.equal(made.items([place]).image, source.items([number]).image)  # type: ignore[arg-type]
        assert torch.equal(made.labels[place], source.labels[number])  # type: ignore[index]
    (tmp_path / "copies.json").write_text('{"5": 2}')
    text = run("eg3d-rebalance", synthetic_set, tmp_path / "q", "--copies", tmp_path / "copies.json", status=2)
    assert "picture 5: the set has the pictures 0 to 4" in text
    run("eg3d-rebalance", synthetic_set, tmp_path / "own.zip", "--step", 5, "--most", 3)
    copies = eg3d_recipes.replicas_by_yaw(source.labels, 5, 3)  # type: ignore[arg-type]
    assert len(Eg3dDataset(tmp_path / "own.zip")) == sum(copies) > 5


def test_shapenet_layout(tmp_path: Path) -> None:
    for car in ("a", "b"):
        pictures_in(tmp_path / "src" / car / "rgb", 2)
        (tmp_path / "src" / car / "pose").mkdir()
        for number in range(2):
            text = " ".join(map(repr, camera_of(number)[:16].tolist()))
            (tmp_path / "src" / car / "pose" / f"p{number}.txt").write_text(text)
        (tmp_path / "src" / car / "intrinsics.txt").write_text("874.1888 256 256 0.\n0. 0. 0.\n1.\n")
    (tmp_path / "src/b/pose/p1.txt").unlink()
    text = run("eg3d-shapenet", tmp_path / "src", tmp_path / "set", "--size", 16, "--quiet")
    assert "1 left out" in text and "p1.txt" in text
    labels = Eg3dDataset(tmp_path / "set").labels
    assert labels is not None and len(labels) == 3
    assert labels[0, 16] == pytest.approx(1.7074, abs=1e-5) and labels[0, 18] == 0.5
    np.testing.assert_allclose(labels[1, :16], camera_of(1)[:16], atol=2e-6)


def test_afhq_places_bare_rotations_at_the_radius(tmp_path: Path) -> None:
    pictures_in(tmp_path / "src", 2)
    rotations = [camera_of(k)[:16].reshape(4, 4)[:3, :3] for k in range(2)]
    content = {"labels": [[f"p{k}.png", r.tolist()] for k, r in enumerate(rotations)]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    run("eg3d-afhq", tmp_path / "src", tmp_path / "set", "--labels", tmp_path / "labels.json", "--size", 16, "--quiet")
    dataset = Eg3dDataset(tmp_path / "set")
    assert len(dataset) == 4 and dataset.labels is not None
    np.testing.assert_allclose(dataset.labels[2, [3, 7, 11]], -2.7 * rotations[1][:, 2], atol=1e-5)


def landmark_photo() -> tuple[Image.Image, np.ndarray]:
    """A picture whose only marks are discs at the eyes and mouth corners of a tilted face, with its 68 points."""
    angle, middle, unit = 0.3, np.array([130.0, 110.0]), 30.0
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = np.zeros((68, 2))
    points[36:42], points[42:48] = (-1, -0.5), (1, -0.5)
    points[48], points[54] = (-0.7, 1.2), (0.7, 1.2)
    points = points * unit @ turn.T + middle
    pixels = np.full((240, 300, 3), 90, np.uint8)
    rows, columns = np.mgrid[:240, :300]
    for index, colour in ((36, (255, 0, 0)), (42, (0, 255, 0)), (48, (0, 0, 255)), (54, (255, 255, 0))):
        pixels[(columns - points[index, 0]) ** 2 + (rows - points[index, 1]) ** 2 < 16] = colour
    return Image.fromarray(pixels), points


def centre_of(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    near = np.abs(np.asarray(image, int) - np.array(colour)).sum(-1) < 120
    assert near.any(), colour
    rows, columns = np.nonzero(near)
    return np.array([columns.mean(), rows.mean()])


def test_realign_turns_a_tilted_face_upright_at_the_recipe_scale() -> None:
    photo, points = landmark_photo()
    upright = eg3d_recipes.realign(photo, points, 400)
    red, green, blue, yellow = (centre_of(upright, c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)))
    assert upright.size == (400, 400)
    assert abs(red[1] - green[1]) < 2 and abs(blue[1] - yellow[1]) < 2 and red[0] < green[0]
    # half the side is 1.8 * max(2 * eye distance, 1.8 * eye to mouth) = 1.8 * max(4, 3.06) units
    unit = 400 / (2 * 1.8 * 4)
    assert green[0] - red[0] == pytest.approx(2 * unit, abs=2)
    eyes, mouth = (red + green) / 2, (blue + yellow) / 2
    assert mouth[1] - eyes[1] == pytest.approx(1.7 * unit, abs=2)
    np.testing.assert_allclose(eyes + 0.1 * (mouth - eyes), [200, 200], atol=2)  # the middle of the square


def test_ffhq_command_crops_so_that_landmarks_land_where_the_model_points_do(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    model = np.array([[-0.31, 0.29, 0.3], [0.31, 0.29, 0.3], [0.0, 0.0, 0.6], [-0.26, -0.31, 0.3], [0.26, -0.31, 0.3]])
    scale, middle = 60.0, np.array([150.0, 118.0])
    lm = np.stack([scale * model[:, 0] + middle[0], middle[1] - scale * model[:, 1]], -1)
    pixels = np.full((240, 300, 3), 90, np.uint8)
    rows, columns = np.mgrid[:240, :300]
    for point, colour in zip(lm[:2], ((255, 0, 0), (0, 255, 0)), strict=True):
        pixels[(columns - point[0]) ** 2 + (rows - point[1]) ** 2 < 9] = colour
    Image.fromarray(pixels).save(tmp_path / "src/00000.png")
    entry = {"lm": lm.tolist(), "lm3d_std": model.tolist(), "rescale_factor": 300, "center_crop_size": 700}
    (tmp_path / "crops.json").write_text(json.dumps({"00000.png": entry}))
    (tmp_path / "labels.json").write_text(json.dumps({"labels": [["00000.png", camera_of(0).tolist()]]}))
    options = ("--crops", tmp_path / "crops.json", "--labels", tmp_path / "labels.json", "--size", 512, "--quiet")
    run("eg3d-ffhq", tmp_path / "src", tmp_path / "set", *options)
    dataset = Eg3dDataset(tmp_path / "set")
    assert len(dataset) == 2
    # in the crop the model's origin is in the middle and 1 unit is 300 pixels of 700
    for point, colour in zip(model[:2], ((255, 0, 0), (0, 255, 0)), strict=True):
        expected = 256 + 512 * 300 / 700 * np.array([point[0], -point[1]])
        np.testing.assert_allclose(centre_of(dataset.read_picture(0), colour), expected, atol=3)
    (tmp_path / "crops.json").write_text(json.dumps({"00000.png": {"lm": lm.tolist()}}))
    assert "entry of 00000.png is unusable" in run("eg3d-ffhq", tmp_path / "src", tmp_path / "bad", *options, status=2)


@pytest.mark.shared
def test_real_crops_go_through_every_step(real_data: Path, tmp_path: Path) -> None:
    run("eg3d", real_data / "eg3d_portraits", tmp_path / "set.zip", "--size", 64, "--mirror", "--quiet")
    made = Eg3dDataset(tmp_path / "set.zip")
    source = Eg3dDataset(real_data / "eg3d_portraits")
    assert len(made) == 2 * len(source) == 38
    torch.testing.assert_close(made.labels[::2], source.labels)  # type: ignore[index]
    run("eg3d-rebalance", tmp_path / "set.zip", tmp_path / "flat.zip")
    steep = eg3d_recipes.replicas_by_yaw(made.labels)  # type: ignore[arg-type]
    assert len(Eg3dDataset(tmp_path / "flat.zip")) == sum(steep) > 38


def shapenet_object(home: Path) -> None:
    pictures_in(home / "rgb", 2)
    (home / "pose").mkdir()
    for number in range(2):
        np.savetxt(home / "pose" / f"p{number}.txt", camera_of(number)[None, :16])
    (home / "intrinsics.txt").write_text("525 256 256 0\n")


def test_shapenet_pictures_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shapenet_object(tmp_path / "cars" / name)
    (tmp_path / "cars" / "a" / "pose" / "p1.txt").write_text("1 2 none")
    output = run("eg3d-shapenet", tmp_path / "cars", tmp_path / "one", "--size", 16, "--quiet")
    assert "3 pictures written" in output and "1 left out, the first: a/rgb/p1.png" in output
    assert "expected 16 numbers, got could not convert string to float: 'none'" in output
    (tmp_path / "cars" / "b" / "intrinsics.txt").unlink()
    output = run("eg3d-shapenet", tmp_path / "cars", tmp_path / "two", "--size", 16, "--quiet")
    assert "1 pictures written" in output and "3 left out, the first: b/rgb/p0.png" in output
    assert "intrinsics.txt is missing; restore it or remove b" in output


def test_what_is_no_folder_and_numbers_of_heads_are_refused_for_files(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", 1)
    output = run("eg3d", tmp_path / "in" / "p0.png", tmp_path / "out", status=2)
    assert "expected a folder, got a file" in output
    for option in ("--count", "--seed"):
        output = run("eg3d", tmp_path / "in", tmp_path / "out", "--no-labels", option, 3, status=2)
        assert f"{option} has no effect on pictures from files" in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_a_set_that_is_there_is_not_replaced(tmp_path: Path, name: str) -> None:
    options = ("eg3d", "synthetic", tmp_path / name, "--count", 2, "--size", 16, "--quiet")
    run(*options)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    output = run(*options, "--seed", 1, status=2)
    assert f"{name} " in output and "choose another" in output
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}


def test_pictures_of_an_interrupted_making_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from facelab.data import eg3d_prepare as module

    plain = module.SetWriter.add

    def add(self: module.SetWriter, *arguments: object, **options: object) -> str:
        if len(self.labels) == 5:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module.SetWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        write_items(tmp_path / "set", synthetic_items(4, 16, 1), mirror=True)
    monkeypatch.undo()
    write_items(tmp_path / "set", synthetic_items(2, 16, 1))
    found = sorted(p.relative_to(tmp_path / "set").as_posix() for p in (tmp_path / "set").rglob("*.*") if p.is_file())
    assert found == ["00000/img00000000.png", "00000/img00000001.png", "dataset.json"]
    assert len(Eg3dDataset(tmp_path / "set")) == 2
