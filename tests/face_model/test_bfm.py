# SPDX-License-Identifier: Apache-2.0
"""The Basel model's reader and formulas on a small ball in the layout of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.errors import UserError
from facelab.face_model import bfm
from facelab.face_model.bfm import BaselFace, FaceCoefficients

io = pytest.importorskip("scipy.io")
trimesh = pytest.importorskip("trimesh")


@pytest.fixture(scope="module")
def ball() -> dict[str, np.ndarray]:
    """Arrays as in BFM_model_front.mat: a ball of radius 1 around (1, 2, 3), numbers from 1."""
    mesh = trimesh.creation.icosphere(subdivisions=1)
    rng, (vertices, faces) = np.random.default_rng(0), (len(mesh.vertices), mesh.faces)
    around = np.full((vertices, 8), len(faces) + 1)
    for vertex in range(vertices):
        hits = np.nonzero((faces == vertex).any(axis=1))[0]
        around[vertex, : len(hits)] = hits + 1
    return {
        "meanshape": (mesh.vertices + [1.0, 2.0, 3.0]).reshape(1, -1),
        "idBase": rng.normal(size=(3 * vertices, 80)),
        "exBase": rng.normal(size=(3 * vertices, 64)),
        "meantex": rng.uniform(0, 255, (1, 3 * vertices)),
        "texBase": rng.normal(size=(3 * vertices, 80)),
        "tri": faces + 1.0,
        "point_buf": around.astype(float),
        "keypoints": rng.integers(1, vertices + 1, (1, 68)),
        "frontmask2_idx": np.arange(1, 11)[:, None],
        "tri_mask2": faces[:20] + 1,
        "skinmask": np.ones((1, vertices)),
    }


def coefficients(**given: list[float]) -> FaceCoefficients:
    """All zero but for what is given."""
    parts = {name: torch.zeros(1, width) for name, width in bfm.LAYOUT.items()}
    parts |= {name: torch.tensor([values]) for name, values in given.items()}
    return FaceCoefficients.split(torch.cat(list(parts.values()), dim=1))


def test_file(ball, tmp_path: Path) -> None:
    path = tmp_path / "BFM_model_front.mat"
    io.savemat(path, ball)
    model = BaselFace.load(path)
    assert model.mean_shape.shape == (42, 3) and model.mean_shape.mean(dim=0).abs().max() < 1e-6
    assert int(model.faces.min()) == 0 and int(model.around.max()) == len(model.faces) == 80
    one = torch.zeros(1, 80)
    one[0, 7] = 2.0
    moved = (model.vertices(one) - model.mean_shape)[0]
    np.testing.assert_allclose(moved.flatten(), 2 * ball["idBase"][:, 7], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.linear_albedo(torch.zeros(1, 80)).flatten() * 255, ball["meantex"][0], rtol=1e-4)
    assert (model.landmarks + 1).tolist() == ball["keypoints"][0].tolist()
    raw = BaselFace.from_arrays(ball, recentre=False)
    np.testing.assert_allclose(raw.mean_shape.mean(dim=0), [1, 2, 3], atol=1e-5)


def test_refusals(ball, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "BFM_model_front.mat"
    for broken, words in (
        ({k: v for k, v in ball.items() if k != "tri"}, "no array tri"),
        (ball | {"tri": ball["tri"] + 1}, r"tri must hold numbers within 1\.\.42"),
        (ball | {"idBase": ball["idBase"][:-1]}, "does not fit"),
    ):
        io.savemat(path, broken)
        with pytest.raises(UserError, match=words):
            BaselFace.load(path)
    path.write_bytes(b"MATLAB 5.0 nothing")
    with pytest.raises(UserError, match="expected BFM_model_front.mat"):
        BaselFace.load(path)
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="Basel"):
        BaselFace.load(None)


def test_normals_point_outwards(ball) -> None:
    model = BaselFace.from_arrays(ball)
    normals = model.normals(model.vertices(torch.zeros(1, 80)))
    assert torch.nn.functional.cosine_similarity(normals[0], model.mean_shape, dim=1).min() > 0.98
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(1, 42))


def test_light(ball) -> None:
    model = BaselFace.from_arrays(ball | {"meantex": np.full_like(ball["meantex"], 255.0)})
    even = model.shaded(coefficients())
    torch.testing.assert_close(even, torch.full_like(even, 0.8 * np.pi / np.sqrt(4 * np.pi)))
    lamp = [0.0] * 27
    lamp[9 + 1] = -0.3  # green, the first order's y, whose sign is turned
    lit = model.shaded(coefficients(light=lamp)) - even
    assert lit[..., [0, 2]].abs().max() == 0
    expected = 0.3 * np.sqrt(np.pi) * model.normals(model.mean_shape[None])[..., 1]
    torch.testing.assert_close(lit[..., 1], expected.float(), rtol=1e-4, atol=1e-5)
    # the light stays with the camera: a head turned upside down is lit on its chin
    turned = model.shaded(coefficients(light=lamp, angle=[0.0, 0.0, np.pi])) - even
    torch.testing.assert_close(turned[..., 1], -lit[..., 1], rtol=1e-4, atol=1e-5)


def test_camera() -> None:
    points = torch.tensor([[[0.0, 0, 0], [0, 0.5, 0], [0, 0, 1], [1, 0, 0]]])
    placed = bfm.to_camera(points, torch.zeros(1, 3), torch.zeros(1, 3))
    assert placed[0, :, 2].tolist() == [10, 10, 9, 10]
    pixels = bfm.project(placed)[0]
    assert pixels[0].tolist() == [112, 112] and pixels[1, 1] == pytest.approx(112 + 50.75)
    assert pixels[3, 0] == pytest.approx(213.5)
    nearer = bfm.to_camera(points, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    assert nearer[0, 0, 2] == 9
