# SPDX-License-Identifier: Apache-2.0
"""DPR's network: loading, norms, the half that sees the light; and what its own weights do on real and known light."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab import lighting
from facelab.errors import UserError
from facelab.losses.lighting import light_in
from facelab.nn.pretrained.light_estimator import (
    DprRelight,
    LightEstimator,
    dpr_from_published,
    light_estimator_from_published,
    load_dpr,
    load_light_estimator,
    published_names,
    published_tensors,
)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Random weights under the published names, statistics as after some training."""
    torch.manual_seed(1)
    net = DprRelight()
    with torch.no_grad():
        net.train()(torch.rand(2, 1, 32, 32), torch.rand(2, 9))
    state = net.state_dict()
    return {theirs: state[ours] for ours, theirs in published_tensors(published_names(), state).items()}


def levels(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(2))


def test_the_narrow_half_sees_the_light_of_the_whole(published) -> None:
    whole = dpr_from_published(published)
    half = light_estimator_from_published(published, side=None)
    relit, seen = whole(levels(), torch.zeros(2, 9))
    assert relit.shape == (2, 1, 32, 32) and float(relit.min()) > 0 and float(relit.max()) < 1
    torch.testing.assert_close(half(levels()), seen)
    other, same = whole(levels(), torch.ones(2, 9))
    assert not torch.allclose(relit, other, atol=1e-4) and torch.equal(same, seen)
    count = sum(p.numel() for p in half.parameters())
    assert count < 0.6 * sum(p.numel() for p in whole.parameters())


def test_norms_agree_for_one_picture_and_a_picture_does_not_see_its_neighbours(published) -> None:
    nets = {
        norm: light_estimator_from_published(published, norm, side=None) for norm in ("running", "picture", "batch")
    }
    one = levels()[:1]
    torch.testing.assert_close(nets["picture"](one), nets["batch"](one), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(nets["running"](one), nets["batch"](one), atol=1e-4)
    for norm in ("running", "picture"):
        torch.testing.assert_close(nets[norm](levels())[:1], nets[norm](one), atol=1e-5, rtol=1e-4)
    mixed = torch.cat([one, 3 * levels()[1:]])
    assert not torch.allclose(nets["batch"](mixed)[:1], nets["batch"](one), atol=1e-4)


def test_a_judge_does_not_move(published) -> None:
    net = light_estimator_from_published(published, "batch", side=None).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net(levels())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_pictures_are_brought_to_the_side_that_was_asked_for(published) -> None:
    net = light_estimator_from_published(published, side=32)
    small = torch.nn.functional.interpolate(levels(), scale_factor=2.0, mode="bilinear")
    plain = light_estimator_from_published(published, side=None)
    assert torch.equal(net(levels()), plain(levels()))
    torch.testing.assert_close(net(small), plain(levels()), atol=0.02, rtol=0.2)
    with pytest.raises(ValueError, match="multiples of 16, got"):
        plain(levels(side=40))
    for arguments, words in (({"side": 40}, "multiple of 16"), ({"norm": "bacth"}, "Did you mean 'batch'")):
        with pytest.raises(ValueError, match=words):
            LightEstimator(**arguments)
    with pytest.raises(ValueError, match=r"light must be \(2, 9\)"):
        DprRelight()(levels(), torch.zeros(1, 9))


def test_files_round_trip_and_foreign_ones_are_refused_in_one_line(published, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save(published, tmp_path / "w.t7")
    save_file({k: v.clone() for k, v in published.items()}, tmp_path / "w.safetensors")
    expected = light_estimator_from_published(published)(levels())
    for name in ("w.t7", "w.safetensors"):
        torch.testing.assert_close(load_light_estimator(tmp_path / name)(levels()), expected)
    name = "HG3.middle.low1.conv2.weight"
    torch.save({**published, name: torch.zeros(2)}, tmp_path / "shape.t7")
    torch.save({k: v for k, v in published.items() if k != name}, tmp_path / "less.t7")
    torch.save([1, 2], tmp_path / "list.t7")
    torch.save({"a": Path("x")}, tmp_path / "code.t7")
    (tmp_path / "cut.t7").write_bytes((tmp_path / "w.t7").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    for file, words in (
        ("shape.t7", f"{name} must be .*got"),
        ("less.t7", "nothing of that name"),
        ("list.t7", "holds no named tensors"),
        ("code.t7", "damaged or holds more than tensors"),
        ("cut.t7", "damaged or holds more than tensors"),
        ("cut.safetensors", "damaged or holds more than tensors"),
        ("none.t7", "no file at"),
    ):
        for load in (load_light_estimator, load_dpr):
            with pytest.raises(UserError, match=words) as error:
                load(tmp_path / file)
            assert "\n" not in str(error.value)


def test_a_missing_file_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facelab.assets.roots", lambda: [tmp_path])
    with pytest.raises(UserError, match=r"trained_model_03\.t7.*by hand"):
        load_light_estimator()


# ---------------------------------------------------------------- DPR's own weights


@pytest.fixture(scope="module")
def own_file() -> Path:
    folder = os.environ.get("FACELAB_WEIGHTS_DIR", "")
    found = sorted(Path(folder).rglob("*trained_model_03.t7")) if folder else []
    if not found:
        pytest.skip("FACELAB_WEIGHTS_DIR holds no trained_model_03.t7")
    return found[0]


def rgb(path: Path) -> torch.Tensor:
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def shipped_light(folder: Path, number: int) -> torch.Tensor:
    """(1, 9) as DPR's demonstration uses them."""
    return 0.7 * torch.tensor([[float(v) for v in (folder / f"rotate_light_{number:02d}.txt").read_text().split()]])


@pytest.mark.weights
@pytest.mark.shared
def test_relit_pictures_are_dprs(own_file: Path, real_data: Path) -> None:
    """Three of DPR's own results: nothing but JPEG and 8-bit Lab is left (the input itself is 12 to 17 dB away)."""
    folder = real_data / "dpr_relight"
    net, portrait = load_dpr(own_file), rgb(folder / "input.png")
    for number in (0, 2, 5):
        with torch.no_grad():
            relit, _ = net(lighting.lightness(portrait), shipped_light(folder, number))
        error = lighting.with_lightness(portrait, relit).clamp(0, 1) - rgb(folder / f"relit_{number:02d}.jpg")
        assert -10 * math.log10(float(error.square().mean())) > 40


@pytest.mark.shared
def test_shipped_balls_are_our_shading_of_the_shipped_numbers(real_data: Path) -> None:
    """Axes, order, signs and the cosine lobe at once: each ball correlates with its own light and with no other."""
    folder = real_data / "dpr_relight"
    balls = torch.cat([rgb(folder / f"light_{k:02d}.png")[:, 0] for k in range(7)])
    side = balls.shape[-1]
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    inside = x * x + y * y < 0.95
    normals = torch.stack([x, y, (1 - x * x - y * y).clamp(min=0).sqrt()], dim=-1)[inside]
    lights = torch.cat([lighting.from_dpr(shipped_light(folder, k)) for k in range(7)])
    shading = lights @ lighting.basis(normals).T
    together = torch.corrcoef(torch.cat([shading, balls[:, inside]]))[:7, 7:]
    assert together.diagonal().min() > 0.999
    assert (together - torch.eye(7)).max() < 0.95


@pytest.mark.weights
@pytest.mark.shared
@pytest.mark.parametrize("norm", ["running", "picture"])
def test_dpr_sees_the_light_that_it_relit_with(own_file: Path, real_data: Path, norm: str) -> None:
    """Its own results of one portrait: the first two numbers are the same in all seven lights, five others follow."""
    folder = real_data / "dpr_relight"
    estimator = load_light_estimator(own_file, norm)
    with torch.no_grad():
        found = torch.cat([light_in(estimator, rgb(folder / f"relit_{k:02d}.jpg") * 2 - 1) for k in range(7)])
    agreement = lighting.light_agreement(found, torch.cat([shipped_light(folder, k) for k in range(7)]))
    assert agreement.correlation[2:6].min() > 0.95 and agreement.correlation[6:].min() > 0.4
    assert math.degrees(agreement.angle) < 25


@pytest.mark.weights
def test_the_light_that_dpr_sees_in_known_light_is_that_light(own_file: Path) -> None:
    """Synthetic heads under known lamps: every number that varies goes along with the truth, as seen by the camera."""
    from facelab.data.synthetic import SyntheticHeads
    from facelab.data.synthetic_sampling import sample_heads

    heads, count = SyntheticHeads(seed=77, size=192, supersample=1, grid="centers", threads=1), 24
    generator = torch.Generator().manual_seed(5)
    azimuth, elevation = (torch.rand(2, count, generator=generator) * 2 - 1) * torch.tensor([[1.4], [0.9]])
    flat = elevation.cos()
    towards = torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], dim=-1)
    light = lighting.directional(towards, 0.6) + lighting.ambient(0.4)
    numbers = heads.numbers(torch.arange(count))
    camera = heads.cameras(numbers)
    people = sample_heads(heads.model, numbers)
    pictures = heads.render(people, camera, light[..., None].expand(-1, -1, 3)).image.float() / 127.5 - 1
    estimator = load_light_estimator(own_file, norm="picture")
    with torch.no_grad():
        found = torch.cat([light_in(estimator, pictures[k : k + 8]) for k in range(0, count, 8)])
    agreement = lighting.light_agreement(found, lighting.to_dpr(light, camera))
    assert agreement.correlation[[2, 3, 4]].min() > 0.6 and agreement.correlation[1:].min() > 0.2
    assert math.degrees(agreement.angle) < 40
