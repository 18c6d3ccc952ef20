# SPDX-License-Identifier: Apache-2.0
"""Whole-model measures on doubles whose answers are known: balls of known radius, flat boards, encoders off by 2 degrees."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.cameras.pose_sampling import PosePrior
from facelab.cameras.rays import make_rays
from facelab.data.synthetic import SyntheticHeads
from facelab.errors import UserError
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.metrics import evaluate
from facelab.metrics.evaluate import GeneratedHeads, Views
from facelab.metrics.features import RandomFeatureNet
from facelab.rendering.settings import RenderSettings

SIZE = 24
SETTINGS = RenderSettings(resolution=SIZE).deterministic()
FRONT = Camera.on_sphere(math.pi / 2, math.pi / 2, 12.0)


class Balls:
    """A generator double: head z is a grey ball of radius ``0.05 + 0.03 * sigmoid(z)`` with its exact depth."""

    def __init__(self, board: bool = False) -> None:
        self.latent_spec = {"z": (1,)}
        self.board = board  # a flat board through the origin that turns with the camera

    def map(self, latents, conditioning=None, truncation: float = 1.0) -> Codes:
        return Codes({"radius": 0.05 + 0.03 * torch.sigmoid(truncation * latents["z"][:, 0])})

    def scene(self, codes: Codes, noise=None) -> Scene:
        return Scene({"radius": codes.values["radius"]}, len(codes))

    def render(self, scene: Scene, camera: Camera, settings, draws=None, guide=None) -> GeneratorOutput:
        views = ball_views(scene.parts["radius"], camera, settings.resolution)
        depth = evaluate.plane_depth(camera, settings.resolution) if self.board else views.depth
        opacity = views.opacity[:, None]
        return GeneratorOutput(views.image * 2 - 1, depth[:, None] * opacity, opacity)


def ball_views(radius: Tensor, camera: Camera, size: int = SIZE, grey: float | None = None) -> Views:
    """Balls around the origin; their grey is 10 times the radius, on black."""
    camera = Camera.cat([camera] * len(radius)) if len(camera) == 1 else camera
    rays = make_rays(camera, size)
    along = (rays.origins * rays.directions).sum(-1)
    root = along.square() - rays.origins.square().sum(-1) + radius[:, None].square()
    hit = (root > 0).view(-1, size, size)
    depth = torch.where(hit, (-along - root.clamp(min=0).sqrt()).view(-1, size, size), 0)
    shade = (10 * radius if grey is None else torch.full_like(radius, grey))[:, None, None]
    return Views((hit * shade)[:, None].expand(-1, 3, -1, -1), hit.float(), depth)


def heads(generator=None, batch: int = 4, **options) -> GeneratedHeads:
    return GeneratedHeads(generator or Balls(), SETTINGS, PosePrior(), 12.0, batch=batch, **options)  # type: ignore[arg-type]


def chunk(*radii: float):
    return lambda camera: ball_views(torch.tensor(radii), camera)


def test_head_and_camera_do_not_depend_on_the_batch():
    small = [(o.rgb, c.angles) for o, c in heads(batch=2).pictures(5)]
    large = [(o.rgb, c.angles) for o, c in heads(batch=5).pictures(5)]
    assert [len(rgb) for rgb, _ in small] == [2, 2, 1] and len(large) == 1
    for index in (0, 1):
        torch.testing.assert_close(torch.cat([part[index] for part in small]), large[0][index], rtol=0, atol=0)
    assert not heads(seed=1).cameras([0]).angles.equal(heads(seed=0).cameras([0]).angles)


def test_psi_0_is_one_head():
    radii = heads(psi=0.0).codes(range(6)).values["radius"]
    assert radii.unique().numel() == 1 and heads().codes(range(6)).values["radius"].unique().numel() == 6


# ------------------------------------------------------------------ pictures


def noise(count: int, shift: int, batch: int) -> Iterator[Tensor]:
    pictures = torch.randint(0, 156, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)) + shift
    yield from pictures.to(torch.uint8).split(batch)


def test_equal_sets_have_distance_0_and_brighter_ones_have_not():
    net = RandomFeatureNet()
    real = evaluate.collect_features([net], noise(20, 0, 6), [True])[0]
    same = evaluate.collect_features([net], noise(20, 0, 20), [True])[0]
    bright = evaluate.collect_features([net], noise(20, 90, 7), [True])[0]
    equal = evaluate.picture_distances(net, real, same, subsets=3)
    other = evaluate.picture_distances(net, real, bright, subsets=3)
    assert set(equal) == {"frechet_random", "kernel_random"}, "the random network gives no FID"
    assert equal["frechet_random"]["value"] < 1e-3 * other["frechet_random"]["value"]
    assert abs(equal["kernel_random"]["value"]) < 1e-2 * other["kernel_random"]["value"]
    assert equal["frechet_random"]["features"] == "random-conv-v1"
    assert "biased upwards" in equal["frechet_random"]["note"] and equal["frechet_random"]["real_count"] == 20


def test_vectors_are_kept_only_on_request_and_batches_are_read_one_by_one():
    alive = []

    def watched() -> Iterator[Tensor]:
        for batch in noise(12, 0, 3):
            alive.append(len(batch))
            yield batch

    first, second = evaluate.collect_features([RandomFeatureNet(), RandomFeatureNet(1)], watched(), [False, True])
    assert first.vectors is None and second.vectors is not None and second.vectors.shape == (12, 512)
    assert sum(alive) == 12 == first.stats.count, "one pass for all networks"


def test_one_picture_is_refused():
    with pytest.raises(UserError, match="at least 2 pictures"):
        evaluate.collect_features([RandomFeatureNet()], noise(1, 0, 1))


# ------------------------------------------------------------------ poses


def test_pose_errors_in_degrees_with_chance():
    pitch, yaw = torch.full((4,), math.pi / 2), math.pi / 2 + torch.deg2rad(torch.tensor([-10.0, 10, -10, 10]))
    camera = Camera.on_sphere(pitch, yaw, 12.0)
    offset = torch.deg2rad(torch.tensor([0.0, 2.0]))
    done = []
    report = evaluate.pose_report(lambda _: camera.angles + offset, [(torch.zeros(4, 3, 8, 8), camera)], done.append)
    assert report["mean_yaw"] == pytest.approx(2, abs=1e-4) and report["mean_pitch"] == pytest.approx(0, abs=1e-4)
    assert report["mean_direction"] == pytest.approx(2, abs=1e-4) == report["median_direction"]
    assert report["chance_direction"] == pytest.approx(10, abs=1e-4)
    assert report["correlation_yaw"] == pytest.approx(1, abs=1e-6) and report["correlation_pitch"] is None
    assert report["count"] == 4 and done == [4]


def test_a_mirrored_encoder_shows():
    batches = list(evaluate.synthetic_with_cameras(SyntheticHeads(5, 8), 6, batch=4))
    assert [len(picture) for picture, _ in batches] == [4, 2] and batches[0][0].min() == -1
    angles = torch.cat([camera.angles for _, camera in batches])
    report = evaluate.pose_report(_replay(math.pi - angles, 4), batches)
    assert report["correlation_yaw"] == pytest.approx(-1) and report["mean_yaw"] > report["chance_direction"]


def _replay(poses: Tensor, size: int):
    parts = iter(poses.split(size))
    return lambda _picture: next(parts)


# ------------------------------------------------------------------ consistency


def test_exact_balls_are_consistent_and_boards_are_not():
    cameras = evaluate.view_pair(PosePrior(), 12.0)
    turned = (cameras[1].angles - cameras[0].angles)[0]
    assert float(turned[1]) == pytest.approx(0.3, abs=1e-6) and float(turned[0]) == 0
    exact = evaluate.consistency_report(heads().chunks(6), cameras)
    boards = evaluate.consistency_report(heads(Balls(board=True)).chunks(6), cameras)
    assert exact["count"] == 6 and exact["without_overlap"] == 0 and exact["compared"] > 0.5
    assert exact["mean_error"] < 1e-3 < 5e-3 < boards["mean_error"]


def test_heads_that_nobody_sees_are_counted_not_averaged():
    def see(camera: Camera) -> Views:
        views = ball_views(torch.tensor([0.06, 0.06]), camera)
        return Views(views.image, views.opacity * torch.tensor([1.0, 0.0])[:, None, None], views.depth)

    report = evaluate.consistency_report([see], evaluate.view_pair(PosePrior(), 12.0))
    assert report["without_overlap"] == 1 and report["mean_error"] < 1e-3


# ------------------------------------------------------------------ depth


def test_the_plane_faces_the_camera_through_the_origin():
    camera = Camera.on_sphere([1.3, 1.6], [1.2, 1.9], 12.0, radius=1.5)
    plane = evaluate.plane_depth(camera, 5)
    assert plane.shape == (2, 5, 5)
    torch.testing.assert_close(plane[:, 2, 2], torch.full((2,), 1.5), rtol=1e-5, atol=0)
    points = make_rays(camera, 5)
    ends = points.origins + points.directions * plane.flatten(1)[..., None]
    torch.testing.assert_close((ends * camera.cam2world[:, None, :3, 2]).sum(-1), torch.zeros(2, 25), atol=1e-6, rtol=0)


def test_the_nearest_candidate_is_found_and_measured_by_hand():
    radii = torch.tensor([0.05, 0.07])
    cameras = Camera.on_sphere([1.5, 1.6], [1.4, 1.7], 12.0)
    truth = ball_views(radii, cameras)
    ticks = []
    report = evaluate.nearest_depth_report(truth, cameras, [chunk(0.06, 0.05), chunk(0.07)], tick=ticks.append)
    assert report["heads"] == 2 and report["candidates"] == 3 and sum(ticks) == 6
    assert report["rmse"] < 1e-6 and report["mask_iou"] == 1 and report["aligned_rmse"] < 1e-6
    flat = evaluate.plane_depth(cameras, SIZE)
    inside = truth.foreground
    plane = [float((flat[j] - truth.depth[j])[inside[j]].double().square().mean().sqrt()) for j in range(2)]
    constant = [float(truth.depth[j][inside[j]].double().std(correction=0)) for j in range(2)]
    assert report["plane_rmse"] == pytest.approx(sum(plane) / 2, rel=1e-5)
    assert report["constant_rmse"] == pytest.approx(sum(constant) / 2, rel=1e-5)
    random = []
    for j in range(2):
        for radius in (0.06, 0.05, 0.07):
            other = ball_views(torch.tensor([radius]), cameras[j])
            both = other.foreground[0] & inside[j]
            random.append(float((other.depth[0] - truth.depth[j])[both].double().square().mean().sqrt()))
    assert report["random_rmse"] == pytest.approx(sum(random) / 6, rel=1e-5) and report["random_rmse"] > 0.003
    extent = [float(truth.depth[j][inside[j]].max() - truth.depth[j][inside[j]].min()) for j in range(2)]
    assert report["depth_range"] == pytest.approx(sum(extent) / 2, rel=1e-5)


def test_a_shift_is_an_error_that_alignment_removes():
    truth = ball_views(torch.tensor([0.07]), FRONT)

    def shifted(camera: Camera) -> Views:
        views = ball_views(torch.tensor([0.07]), camera)
        return Views(views.image, views.opacity, views.depth + 0.01)

    report = evaluate.nearest_depth_report(truth, FRONT, [shifted])
    assert report["rmse"] == pytest.approx(0.01, rel=1e-4) and report["aligned_rmse"] < 1e-6
    assert report["rmse_share"] == pytest.approx(0.01 / report["depth_range"], rel=1e-4)


def test_candidates_without_foreground_count_as_without_overlap():
    truth = ball_views(torch.tensor([0.06]), FRONT)

    def empty(camera: Camera) -> Views:
        return Views(truth.image, torch.zeros(1, SIZE, SIZE), truth.depth)

    report = evaluate.nearest_depth_report(truth, FRONT, [empty])
    assert report["rmse"] is None and report["without_overlap"] == 1 and report["mask_iou"] == 0


def test_chunks_change_nothing():
    truth = ball_views(torch.tensor([0.055, 0.065]), FRONT)
    camera = Camera.cat([FRONT, FRONT])
    one = evaluate.nearest_depth_report(truth, camera, heads(batch=6).chunks(6))
    many = evaluate.nearest_depth_report(truth, camera, heads(batch=1).chunks(6))
    assert one == pytest.approx(many)
    assert one["rmse"] < one["random_rmse"] < one["plane_rmse"]


def test_a_synthetic_head_is_nearest_to_itself():
    source = SyntheticHeads(3, 20)
    known = source.batch([4, 5])
    truth = evaluate.views_of_synthetic(known)
    itself = evaluate.nearest_depth_report(truth, known.camera, evaluate.synthetic_chunks(source, 6, batch=4))
    others = evaluate.nearest_depth_report(truth, known.camera, evaluate.synthetic_chunks(source, 4, batch=4))
    assert itself["rmse"] < 1e-6 < others["rmse"] < others["plane_rmse"]
