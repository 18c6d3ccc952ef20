# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from facelab.checkpoints import recognise
from facelab.errors import UserError
from facelab.face_model.bfm import FaceCoefficients, alignment_points, face_rotation
from facelab.nn.pretrained.face_reconstruction import (
    FaceRegressor,
    load_face_regressor,
    published_state,
    regressor_from_published,
)
from tests.recon_weights import random_state, write_epoch


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def epoch(state, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_epoch(tmp_path_factory.mktemp("weights") / "epoch_20.pth", state)


def pictures(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_file_is_what_the_manifest_says(epoch: Path) -> None:
    best = recognise.describe(epoch).best
    assert [(match.asset.name, match.certainty) for match in best] == [("deep3d_recon", "structure")]


def test_loading_and_the_way_back(epoch: Path, state) -> None:
    network = load_face_regressor(epoch)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    back = published_state(network)
    assert set(back) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value.float() if value.is_floating_point() else value, rtol=0, atol=0)
    x = pictures()
    together = network(x)
    assert together.shape == (2, 257) and (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(network(x[1:]), together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [50, 18])
def test_backbone_is_torchvisions(depth: int) -> None:
    """An independent implementation of the same architecture, with the same weights under the published names."""
    models = pytest.importorskip("torchvision.models")
    state = {name: value.float() for name, value in random_state(3, depth).items()}
    theirs = getattr(models, f"resnet{depth}")(weights=None).eval()
    theirs.fc = torch.nn.Identity()
    prefix = "backbone."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    ours = regressor_from_published(state)
    with torch.no_grad():
        x = pictures(2, 96)
        features = theirs(x)
        torch.testing.assert_close(ours.features(x), features, rtol=1e-4, atol=1e-4)
        maps = [
            features @ state[f"final_layers.{k}.weight"].flatten(1).T + state[f"final_layers.{k}.bias"]
            for k in range(7)
        ]
        torch.testing.assert_close(ours(x), torch.cat(maps, 1), rtol=1e-3, atol=1e-4)


def test_one_last_map_instead_of_seven() -> None:
    state = random_state(depth=18, dtype=torch.float32)
    seven = regressor_from_published(state)
    rows = {part: torch.cat([state.pop(f"final_layers.{k}.{part}") for k in range(7)]) for part in ("weight", "bias")}
    state |= {"backbone.fc.weight": rows["weight"].flatten(1), "backbone.fc.bias": rows["bias"]}
    one = regressor_from_published(state)
    torch.testing.assert_close(one(pictures()), seven(pictures()), rtol=0, atol=0)


def test_a_new_network_sees_the_mean_face() -> None:
    network = FaceRegressor(18).eval()
    assert network(pictures()).abs().max() == 0
    assert network.features(pictures()).shape == (2, 512)
    with pytest.raises(ValueError, match="depth must be one of 18, 50"):
        FaceRegressor(34)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        network(pictures()[0])


class Intruder:
    def __reduce__(self):
        return (Path.touch, (Path("intruder_was_here"),))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"no file at .*none.pth: expected Deep3DFaceRecon regression network"):
        load_face_regressor(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"deep3d/epoch_20.pth is missing .*README.*weights.py import"):
        load_face_regressor()
    cases = {}
    state = random_state(depth=18)
    cases["unknown tensor backbone.fc2"] = {"net_recon": state | {"backbone.fc2": torch.zeros(1)}}
    cases[r"final_layers.3.weight must be \(3, 512, 1, 1\), got \(4, 512"] = {
        "net_recon": state | {"final_layers.3.weight": torch.zeros(4, 512, 1, 1)}
    }
    cases["backbone.bn1.weight must be .* got nothing of that name"] = {
        "net_recon": {name: value for name, value in state.items() if name != "backbone.bn1.weight"}
    }
    cases["conv1.weight must be"] = {"some.net.weight": torch.zeros(2)}
    cases["'net_recon', got list"] = [torch.zeros(2)]
    cases["'net_recon', got dict"] = {"generator": {"a": torch.zeros(1)}}
    for number, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            load_face_regressor(path)
        assert "\n" not in str(error.value)
    torch.save({"net_recon": state, "extra": Intruder()}, tmp_path / "hostile.pth")
    plain = pickle.dumps({"net_recon": Intruder()}, protocol=2)
    pickle.loads(plain)  # noqa: S301 - it does what it threatens
    (tmp_path / "intruder_was_here").unlink()
    (tmp_path / "plain.pth").write_bytes(plain)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "0.pth").read_bytes()[:5000])
    for name in ("hostile.pth", "plain.pth", "cut.pth"):
        with pytest.raises(UserError, match="damaged or holds more than tensors") as error:
            load_face_regressor(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "intruder_was_here").exists()


def test_coefficients_by_name() -> None:
    numbers = torch.arange(2 * 257.0).view(2, 257)
    parts = FaceCoefficients.split(numbers)
    assert parts.angle[0].tolist() == [224.0, 225.0, 226.0] and parts.translation[0].tolist() == [254.0, 255.0, 256.0]
    assert parts.light.shape == (2, 3, 9) and parts.light[0, 1, 0] == 227 + 9
    torch.testing.assert_close(parts.join(), numbers)
    with pytest.raises(ValueError, match=r"\(N, 257\)"):
        FaceCoefficients.split(numbers[:, :256])


def test_rotation_turns_row_vectors() -> None:
    quarter = torch.tensor([[0.0, torch.pi / 2, 0.0]])
    nose = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    # a positive y angle turns the face towards +x, its own left
    torch.testing.assert_close(nose @ face_rotation(quarter)[0], torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
    both = face_rotation(torch.tensor([[0.3, -0.2, 0.1]]))[0]
    x, y, z = (face_rotation(row[None])[0] for row in torch.diag(torch.tensor([0.3, -0.2, 0.1])))
    torch.testing.assert_close(both, x @ y @ z)  # about x first


def test_alignment_points_are_eye_corners() -> None:
    points = torch.randn(68, 2, generator=torch.Generator().manual_seed(0)).numpy()
    five = alignment_points(points)
    assert five.shape == (5, 2)
    assert abs(five[0] - (points[36] + points[39]) / 2).max() < 1e-6 and (five[3] == points[48]).all()
