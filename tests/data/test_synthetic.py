# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads: repeatable, labelled truly, the same from both renderers, and as files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.cli.heads import make_synthetic_heads as main
from facelab.data.synthetic import SyntheticHeads, write_dataset
from facelab.data.synthetic_files import contact_sheet
from facelab.data.synthetic_sampling import choose
from facelab.errors import UserError

SIZE = 48
HEADS = SyntheticHeads(seed=5, size=SIZE)


@pytest.fixture(scope="module")
def batch():
    return HEADS.batch(range(12))


def test_a_head_depends_on_seed_and_number_alone(batch) -> None:
    again = HEADS.head(7)
    for name in ("image", "mask", "depth", "normal", "identity", "light", "landmarks_2d"):
        assert torch.equal(getattr(again, name)[0], getattr(batch, name)[7]), name
    assert torch.equal(again.camera.label()[0], batch.camera.label()[7])
    other = SyntheticHeads(seed=6, size=SIZE).head(7)
    assert not torch.equal(other.image, again.image) and not torch.equal(other.identity, again.identity)


def test_heads_differ(batch) -> None:
    flat = batch.image.float().flatten(1)
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    assert (distance + 1000 * torch.eye(len(flat))).min() > 10  # grey levels, root mean square


@pytest.mark.parametrize("grid", ["corners", "centers"])
def test_compiled_equals_torch(grid: str) -> None:
    one, two = (SyntheticHeads(1, 32, grid=grid, backend=name).batch(range(3)) for name in ("torch", "numba"))
    assert torch.equal(one.mask, two.mask)
    assert (one.image.int() - two.image.int()).abs().max() <= 1
    assert torch.allclose(one.depth, two.depth, atol=1e-6)
    assert torch.allclose(one.normal, two.normal, atol=1e-5)


def test_mixed_precision_around_it_changes_nothing() -> None:
    heads = SyntheticHeads(1, 16)
    plain = heads.head(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = heads.head(0)
    assert torch.equal(plain.image, inside.image) and torch.equal(plain.landmarks_3d, inside.landmarks_3d)


def test_torch_path_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = SyntheticHeads(1, 16, backend="torch")
    whole = heads.batch(range(3))
    monkeypatch.setattr("facelab.data.synthetic.MAX_SAMPLES", 48 * 48)
    parts = heads.batch(range(3))
    assert torch.equal(whole.image, parts.image) and torch.equal(whole.depth, parts.depth)


def test_background_is_black_where_the_mask_says_so(batch) -> None:
    outside = (batch.mask == 0)[:, None].expand_as(batch.image)
    assert batch.image[outside].max() == 0 and outside.float().mean() > 0.1
    assert torch.equal(batch.depth == 0, batch.mask == 0)
    white = SyntheticHeads(5, SIZE, background="white").head(0)
    assert torch.equal(white.mask, batch.mask[:1])
    assert (white.image[(white.mask == 0)[:, None].expand_as(white.image)] == 255).all()


def test_frontal_head_fills_the_frame() -> None:
    """With hair 75 to 95 % of the height, cut below by the shoulders, inside the ray range."""
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 12)
    sample = HEADS.batch(range(20), camera)
    person = (sample.mask > 0) & (sample.mask != 18) & (sample.mask != 17)
    rows = torch.arange(SIZE).view(1, -1, 1).expand_as(person)
    top = torch.where(person, rows, SIZE).amin(dim=(1, 2)).float() / (SIZE - 1)
    assert top.min() >= 0.0 and 0.03 < top.mean() < 0.12
    chin = sample.landmarks_2d[:, 8, 1]
    assert 0.8 < chin.mean() < 0.92
    eyes = sample.landmarks_2d[:, 36:48].mean(dim=1)
    assert abs(eyes[:, 0].mean() - 0.5) < 0.02 and 0.44 < eyes[:, 1].mean() < 0.51
    assert (sample.mask[:, -1] > 0).any(dim=1).all()  # the neck is cut by the frame
    depth = sample.depth[sample.mask > 0]
    assert depth.min() > 0.88 and depth.max() < 1.12


def test_depth_puts_points_on_the_mesh(batch) -> None:
    """Ray plus depth gives the points that the rasteriser sees."""
    rays = make_rays(batch.camera, SIZE, "corners")
    points = rays.origins + batch.depth.flatten(1)[..., None] * rays.directions
    hit = (batch.mask > 0).flatten(1)
    people = HEADS.model.vertices(batch.identity, batch.expression)
    nearest = torch.cdist(points[0, hit[0]], people[0]).min(dim=1).values
    assert nearest.median() < 0.003 and nearest.max() < 0.02
    normals = batch.normal.flatten(1, 2)
    assert torch.allclose(normals[hit].norm(dim=-1), torch.ones(int(hit.sum())), atol=1e-4)
    facing = (normals * rays.directions).sum(-1)[hit] < 0.2
    assert facing.float().mean() > 0.97


def test_landmarks_fall_on_their_classes() -> None:
    sample = SyntheticHeads(5, 128).batch(range(8), Camera.on_sphere(math.pi / 2, math.pi / 2, 12))
    hits = 0
    for n in range(len(sample)):
        for first, last, allowed in ((30, 31, {2}), (37, 39, {1, 3, 4, 5}), (51, 52, {1, 11, 2}), (57, 58, {1, 12})):
            for x, y in (sample.landmarks_2d[n, first:last] * 127).round().long().tolist():
                hits += int(sample.mask[n, y, x]) in allowed
    assert hits >= 0.9 * 8 * 5


def test_classes_appear(batch) -> None:
    classes = set(SyntheticHeads(0, 64).batch(range(40)).mask.unique().tolist())
    assert classes >= {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17, 18}


def test_cameras_follow_the_prior() -> None:
    numbers = HEADS.numbers(torch.arange(400))
    angles = HEADS.cameras(numbers).angles
    assert angles is not None
    assert abs(angles[:, 0].std() - 0.155) < 0.02 and abs(angles[:, 1].std() - 0.3) < 0.04
    assert (angles.mean(dim=0) - math.pi / 2).abs().max() < 0.05
    assert SyntheticHeads(0, 16, yaw_std=0, pitch_std=0).head(3).camera.angles == pytest.approx(math.pi / 2)


def test_as_batch(batch) -> None:
    plain = batch.as_batch()
    assert plain.image is batch.image and plain.light.shape == (12, 9) and len(plain.camera) == 12
    assert plain.coefficients.shape == (
        12,
        HEADS.model.identity_dim + HEADS.model.expression_dim + HEADS.model.albedo_dim,
    )


def test_light_changes_the_picture_only() -> None:
    numbers = HEADS.numbers(torch.tensor([3]))
    from facelab import lighting
    from facelab.data.synthetic_sampling import sample_heads

    person = sample_heads(HEADS.model, numbers)
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 12)
    left, right = (
        HEADS.render(
            person,
            camera,
            (lighting.directional(torch.tensor([[x, 0.2, 0.5]])) + lighting.ambient(0.2))[..., None].expand(-1, -1, 3),
        )
        for x in (-1.0, 1.0)
    )
    assert torch.equal(left.mask, right.mask)
    half = SIZE // 2
    assert left.image[..., :half].float().mean() > 1.2 * right.image[..., :half].float().mean()
    assert right.image[..., half:].float().mean() > 1.2 * left.image[..., half:].float().mean()


def test_choose() -> None:
    shares = torch.tensor([0.2, 0.5, 0.3])
    assert choose(torch.tensor([0.0, 0.19, 0.2, 0.69, 0.71, 0.999]), shares).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1}, "size must be"),
        ({"grid": "corner"}, "Did you mean 'corners'"),
        ({"supersample": 2}, "odd number"),
        ({"fov": 0}, "fov must be"),
        ({"yaw_std": -1.0}, "must not be negative"),
        ({"background": "blak"}, "Did you mean 'black'"),
        ({"background": (0.0, 2.0, 0.0)}, "three numbers"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticHeads(**options)


def test_files(tmp_path) -> None:
    out = write_dataset(tmp_path / "set", count=5, size=32, seed=2, picture_format="png")
    images, masks = (sorted((out / f"celebahq_mask_{name}").iterdir()) for name in ("img", "mask"))
    assert [p.name for p in images] == [f"{k:05d}.png" for k in range(5)] == [p.name for p in masks]
    heads = SyntheticHeads(2, 32).batch(range(5))
    assert np.array_equal(np.array(Image.open(images[3])), heads.image[3].permute(1, 2, 0).numpy())
    assert np.array_equal(np.array(Image.open(masks[3])), heads.mask[3].numpy())
    content = json.loads((out / "dataset.json").read_text())
    name, label = content["labels"][4]
    assert name == "celebahq_mask_img/00004.png" and label == pytest.approx(heads.camera.label()[4].tolist())
    assert len(content["sh"][0][1]) == 9
    truth = np.load(out / "truth.npz")
    assert np.allclose(truth["identity"], heads.identity) and truth["landmarks_2d"].shape == (5, 68, 2)
    with pytest.raises(UserError, match="already holds 5 pictures"):
        write_dataset(out, count=5, size=32)
    write_dataset(tmp_path / "grey", count=1, size=32, seed=2, picture_format="png", background="grey")
    grey = np.array(Image.open(tmp_path / "grey" / "celebahq_mask_img" / "00000.png"))
    assert np.array_equal(grey, SyntheticHeads(2, 32, background="grey").batch([0]).image[0].permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match="background must be one of"):
        write_dataset(tmp_path / "green", count=1, size=32, background="green")
    assert not (tmp_path / "green").exists()
    write_dataset(out, count=2, size=32, overwrite=True)
    assert sorted(p.name for p in (out / "celebahq_mask_img").iterdir()) == ["00000.jpg", "00001.jpg"]


def test_command(tmp_path) -> None:
    run = CliRunner().invoke
    done = run(
        main,
        ["--out", str(tmp_path / "a"), "--count", "2", "--size", "16", "--quiet", "--sheet", str(tmp_path / "s.png"),
         "--background", "white", "--format", "png"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "s.png").size == (128, 16)
    first = np.array(Image.open(tmp_path / "a" / "celebahq_mask_img" / "00000.png"))
    assert (first[0, 0] == 255).all() and np.array_equal(first, np.array(Image.open(tmp_path / "s.png"))[:, :16])
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([], "nothing to do"),
        (["--out", str(tmp_path / "b"), "--count", "0"], "at least 1 head"),
        (["--out", str(tmp_path / "b"), "--format", "jpeg"], "Did you mean 'jpg'"),
        (["--out", str(tmp_path / "b"), "--workers", "0"], "at least 1 process"),
        (["--out", str(tmp_path / "file")], "cannot write"),
        (["--sheet", str(tmp_path / "s.txt")], "contact sheet is a .png"),
    ):
        failed = run(main, arguments)
        assert failed.exit_code == 2 and message in failed.output and failed.output.count("\n") == 1, failed.output


def test_contact_sheet(batch) -> None:
    sheet = contact_sheet(batch, columns=5, masks=True)
    assert sheet.shape == (2 * 3 * SIZE, 5 * SIZE, 3)
    assert torch.equal(sheet[:SIZE, SIZE : 2 * SIZE], batch.image[1].permute(1, 2, 0))


def test_interrupted_heads_go_on_to_the_same_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from facelab.data import synthetic_files as module
    from facelab.errors import Interrupted

    monkeypatch.setattr(module, "CHUNK", 2)
    plain, done = module._write_chunk, []

    def chunk(job: module._Job) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.start)
        plain(job)

    monkeypatch.setattr(module, "_write_chunk", chunk)
    out = tmp_path / "set"
    with pytest.raises(Interrupted, match="give the same command again"):
        write_dataset(out, count=9, size=16, seed=4)
    assert not (out / "dataset.json").exists()
    with pytest.raises(UserError, match="begun with other settings"):
        write_dataset(out, count=9, size=32, seed=4)
    done[:] = [None]  # type: ignore[list-item]
    monkeypatch.setattr(module, "_write_chunk", lambda job: (done.append(job.start), plain(job))[1])
    write_dataset(out, count=7, size=16, seed=4)
    assert done[1:] == [4, 6]
    monkeypatch.undo()
    whole = write_dataset(tmp_path / "whole", count=7, size=16, seed=4)
    files = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.suffix != ".npz"}
    assert files == {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".npz"}
    ours, theirs = np.load(out / "truth.npz"), np.load(whole / "truth.npz")
    assert set(ours.files) == set(theirs.files) and all(np.array_equal(ours[k], theirs[k]) for k in ours.files)
