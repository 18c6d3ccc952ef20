# SPDX-License-Identifier: Apache-2.0
"""Identity, estimated depth, scaled heads and the pose reader: on heads whose truth is known."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from facelab.cameras.camera import Camera
from facelab.cameras.pose_sampling import PosePrior
from facelab.cameras.rays import make_rays
from facelab.data.synthetic import SyntheticHeads
from facelab.errors import UserError
from facelab.metrics import vgg
from facelab.metrics.estimated_depth import estimated_depth_report
from facelab.metrics.evaluate import GeneratedHeads, Views, consistency_report, synthetic_chunks, view_pair
from facelab.metrics.geometry import normalised_depth_error
from facelab.metrics.identity import identity_report
from facelab.metrics.known_heads import PoseReader, ScaledHeads
from facelab.rendering.settings import RenderSettings

SIZE = 24


def heads(seed: int = 0) -> SyntheticHeads:
    return SyntheticHeads(seed, SIZE, grid="centers", threads=1)


def two_cameras(start: int, count: int) -> tuple[Camera, Camera]:
    def camera(yaw: float) -> Camera:
        return Camera.cat([Camera.on_sphere(math.pi / 2, math.pi / 2 + yaw, 12.0)] * count)

    return camera(-0.2), camera(0.2)


def mean_colour(pictures: Tensor) -> Tensor:
    """A poor identity network: colours of the middle, which tell people apart and hardly change with the view."""
    return pictures[:, :, 6:18, 6:18].mean((2, 3)) + 1


def test_identity_is_one_for_a_network_that_sees_the_person_alone() -> None:
    seen: list[int] = []

    def person(pictures: Tensor) -> Tensor:
        """Number of the head, whatever the view: cosine 1 with itself, 0 with others."""
        start = len(seen) // 2 * 2
        seen.append(0)
        return torch.eye(6)[start : start + len(pictures)]

    found = identity_report(synthetic_chunks(heads(), 6, 2), 6, 2, two_cameras, person)
    assert found["value"] == pytest.approx(1) and found["between_heads"] == pytest.approx(0)
    assert found["count"] == 6 and found["std"] == pytest.approx(0)


def test_identity_by_hand_and_above_that_of_different_heads() -> None:
    found = identity_report(synthetic_chunks(heads(), 5, 2), 5, 2, two_cameras, mean_colour)
    first, second = (heads().batch(range(5), camera).image.float() / 127.5 - 1 for camera in two_cameras(0, 5))
    expected = nn.functional.cosine_similarity(mean_colour(first), mean_colour(second))
    assert found["value"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert found["value"] > found["between_heads"] and found["count"] == 5
    with pytest.raises(ValueError, match="finite"):
        identity_report(synthetic_chunks(heads(), 2, 2), 2, 2, two_cameras, lambda x: x.mean((1, 2, 3)))


def test_normalised_depth_error_ignores_scale_and_shift_and_sees_the_rest() -> None:
    truth = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert normalised_depth_error(truth * 5 - 7, truth).item() == pytest.approx(0, abs=1e-12)
    assert normalised_depth_error(-truth, truth).item() == pytest.approx(4)  # (2 z)^2 with z^2 = 1 on average
    spoiled = truth.clone()
    spoiled[0, 0, 0] = torch.nan
    mask = torch.tensor([[[False, True], [True, True]]])
    assert normalised_depth_error(spoiled, truth * 2, mask).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        normalised_depth_error(truth, truth, torch.zeros_like(truth, dtype=torch.bool))
    assert normalised_depth_error(torch.ones_like(truth), truth).isnan()


def test_estimated_depth_report_finds_the_true_depth_perfect_and_another_heads_worse() -> None:
    batch = heads().batch(range(4))
    views = [Views(batch.image.float() / 255, (batch.depth > 0).float(), batch.depth)]
    exact = estimated_depth_report(views, lambda image: (batch.depth * 3 - 1, batch.depth > 0))
    assert exact == {"value": pytest.approx(0, abs=1e-9), "count": 4, "without_face": 0}
    other = heads().batch(range(4, 8)).depth
    wrong = estimated_depth_report(views, lambda image: (other, other > 0))
    assert wrong["value"] > 0.02 and wrong["count"] == 4
    small = nn.functional.interpolate(batch.depth[:, None], scale_factor=2, mode="nearest")[:, 0]  # of another size
    assert estimated_depth_report(views, lambda image: (small, small > 0))["value"] == pytest.approx(0, abs=1e-9)
    none = estimated_depth_report(views, lambda image: (batch.depth, batch.depth < 0))
    assert none == {"value": None, "count": 0, "without_face": 4}
    with pytest.raises(ValueError, match="an estimator gives"):
        estimated_depth_report(views, lambda image: (batch.depth[:1], batch.depth[:1] > 0))


def test_scaled_heads_are_the_same_pictures_of_a_larger_scene() -> None:
    small, large = heads().batch([3, 4]), ScaledHeads(heads(), 2.7).batch([3, 4])
    assert torch.equal(small.image, large.image)
    rays = make_rays(large.camera, SIZE, "centers")
    points = rays.origins + rays.directions * large.depth.flatten(1)[..., None]
    rays = make_rays(small.camera, SIZE, "centers")
    expected = rays.origins + rays.directions * small.depth.flatten(1)[..., None]
    inside = (small.depth > 0).flatten(1)
    torch.testing.assert_close(points[inside], 2.7 * expected[inside], atol=1e-5, rtol=1e-5)
    again = ScaledHeads(heads(), 2.7).batch([3, 4], large.camera)
    assert torch.equal(again.mask, small.mask)
    torch.testing.assert_close(small.camera.scaled(2.7).sphere_angles(), small.camera.sphere_angles())


def test_consistency_of_scaled_heads_scales_with_the_scene() -> None:
    prior = PosePrior()

    def error(scale: float) -> float:
        cameras = view_pair(prior, 12.0, radius=scale)
        chunks = synthetic_chunks(ScaledHeads(heads(), scale), 2, 2)
        return consistency_report(chunks, cameras, "centers", occlusion=0.02 * scale)["mean_error"]

    assert error(2.7) == pytest.approx(2.7 * error(1.0), rel=0.02)


def test_pose_reader_reads_heads_that_it_was_not_fitted_on() -> None:
    source = ScaledHeads(heads(9), 2.7)
    reader = PoseReader(source, range(100, 228))
    fresh = source.batch(range(32))
    read = reader(fresh.image.float() / 127.5 - 1)
    truth = fresh.camera.sphere_angles().double()
    yaw = torch.corrcoef(torch.stack([read[:, 1], truth[:, 1]]))[0, 1]
    assert reader.count == 128 and yaw > 0.8
    assert (read[:, 1] - truth[:, 1]).abs().mean() < 0.5 * (truth[:, 1] - math.pi / 2).abs().mean()


def test_a_ground_that_is_a_little_greyer_moves_no_pose() -> None:
    """On a plain ground some features are the same for all heads: no model hits them to the last digit."""
    source = ScaledHeads(heads(9), 2.7)
    reader = PoseReader(source, range(100, 228))
    made = source.batch(range(16))
    picture = made.image.float() / 127.5 - 1
    ground = (made.mask == 0)[:, None]
    greyer = torch.where(
        ground, picture + (0.04 if float(picture[ground.expand_as(picture)].mean()) < 0 else -0.04), picture
    )
    assert (reader(greyer) - reader(picture)).abs().max() < math.radians(4)


class Recorder(nn.Module):
    """A generator double that records what it is told of cameras."""

    latent_spec: ClassVar = {"z": (2,)}

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Tensor | None] = []

    def map(self, latents: dict[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> dict:
        self.told.append(conditioning)
        return latents


def test_heads_with_labels_are_told_of_the_camera_that_they_are_seen_from() -> None:
    labels = heads().cameras(heads().numbers(torch.arange(7))).label()
    double = Recorder()
    settings = RenderSettings(resolution=8, near=0.88, far=1.12)
    made = GeneratedHeads(double, settings, None, None, labels=labels)  # type: ignore[arg-type]
    made.codes([4, 5])
    seen = made.cameras([4, 5])
    assert double.told[0] is not None and torch.equal(double.told[0], seen.label())
    assert seen.angles is not None and (seen.label()[0] == labels).all(1).any()
    assert torch.equal(made.cameras([5]).label(), seen.label()[1:]), "a head's camera does not hang on the batch"
    rows = {tuple(row) for row in made.cameras(range(60)).label().tolist()}
    assert len(rows) == 7, "every row is drawn"
    with pytest.raises(ValueError, match="need cameras"):
        GeneratedHeads(double, settings, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be"):
        GeneratedHeads(double, settings, None, None, labels=labels[:, :24])  # type: ignore[arg-type]


@pytest.fixture
def tiny_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layout, narrow: the real one has 138 million parameters."""
    monkeypatch.setattr(vgg, "WIDTHS", (4, 4, 0, 6, 6, 0, 8, 8, 8, 0, 8, 8, 8, 0, 8, 8, 8, 0))
    monkeypatch.setattr(vgg, "FEATURES", 10)


@pytest.mark.parametrize("torchscript", [False, True])
def test_vgg_reads_both_naming_schemes(tiny_vgg: None, tmp_path, torchscript: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [w for w in vgg.WIDTHS if w]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision's convolutions
    tensors, width = {}, 3
    for number, (place, channels) in enumerate(zip(places, widths, strict=True), start=1):
        name = f"layers.conv{number}" if torchscript else f"features.{place}"
        tensors[f"{name}.weight"] = torch.randn(channels, width, 3, 3, generator=generator) * 0.3
        tensors[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.1
        width = channels
    for name, inputs in (("fc1", width * 49), ("fc2", 10)):
        name = f"layers.{name}" if torchscript else {"fc1": "classifier.0", "fc2": "classifier.3"}[name]
        tensors[f"{name}.weight"] = torch.randn(10, inputs, generator=generator) * 0.1
        tensors[f"{name}.bias"] = torch.randn(10, generator=generator) * 0.1
    torch.save(tensors, tmp_path / "vgg.pth")
    net = vgg.VggFeatures(tmp_path / "vgg.pth")
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    features = net(pictures)
    x = nn.functional.interpolate(pictures.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor(vgg.MEAN).view(3, 1, 1)) / torch.tensor(vgg.DEVIATION).view(3, 1, 1)
    values = list(tensors.values())
    for number in range(13):
        x = nn.functional.conv2d(x, values[2 * number], values[2 * number + 1], padding=1).relu()
        x = nn.functional.max_pool2d(x, 2) if number in (1, 3, 6, 9, 12) else x
    for number in (13, 14):
        x = nn.functional.linear(x.flatten(1), values[2 * number], values[2 * number + 1]).relu()
    assert features.shape == (2, 10)
    torch.testing.assert_close(features, x)
    del tensors[next(iter(tensors))]
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="is not VGG16"):
        vgg.VggFeatures(tmp_path / "bad.pth")
