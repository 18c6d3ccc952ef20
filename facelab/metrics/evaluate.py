# SPDX-License-Identifier: Apache-2.0
"""Numbers of a whole model: picture distances, poses, depth and view consistency, against the Generator protocol.

Everything streams: pictures are made in batches and forgotten, what stays are statistics (and, for
kernel distances, feature vectors). Head and camera ``i`` of a seed are the same whatever the batch.

Pictures are judged as rendered, without a filled background: it is what discriminators see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.cameras.pose_sampling import PosePrior
from facelab.cameras.rays import Grid, make_depth_rays, make_rays
from facelab.data.synthetic import SyntheticBatch
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes, Generator, GeneratorOutput, sample_latents
from facelab.inference.pictures import to_uint8
from facelab.metrics.features import FeatureNet
from facelab.metrics.frechet import FeatureStats, frechet_distance
from facelab.metrics.geometry import depth_error, masked_deviation, pose_error, view_consistency
from facelab.metrics.kernel import kernel_distance
from facelab.metrics.manifold import precision_recall
from facelab.rendering.settings import RenderSettings

SURFACE = 0.5  # opacity from which a pixel counts as foreground
VIEW_ANGLE = 0.3  # radians of yaw between the two views of the consistency measure
LEAST_OVERLAP = 2  # pixels that two depth maps must share to be compared

Tick = Callable[[int], Any]  # told how many pictures were done


@dataclass(frozen=True)
class Views:
    """N heads seen by cameras.

    Attributes:
        image: (N, 3, T, T) in [0, 1]; T is S unless the picture is super-resolved.
        opacity: (N, S, S) in [0, 1].
        depth: (N, S, S) distance along unit rays, scene units; meaningless outside the foreground.
    """

    image: Tensor
    opacity: Tensor
    depth: Tensor

    @property
    def foreground(self) -> Tensor:
        """(N, S, S) boolean."""
        return self.opacity > SURFACE


HeadChunk = Callable[[Camera], Views]  # some heads, all seen by one camera, or each by its own


@dataclass(frozen=True)
class GeneratedHeads:
    """Numbered heads of a generator.

    Attributes:
        generator: the model.
        settings: how pictures are rendered.
        prior, fov: cameras of :meth:`pictures`; the field of view in degrees. Not looked at where there are labels.
        psi: truncation, 1 = none.
        seed: of heads and cameras.
        batch: pictures at a time.
        device: where the generator is.
        labels: (L, 25) cameras of the data set; each head takes a random row as its camera, and the generator is told
            of it where it is conditioned on cameras (EG3D: the same row for both).
        axis_depth: the generator's depth is measured along the camera's axis (StyleSDF, CNeRF), not along rays.
    """

    generator: Generator
    settings: RenderSettings
    prior: PosePrior | None
    fov: float | None
    psi: float = 1.0
    seed: int = 0
    batch: int = 8
    device: torch.device | str = "cpu"
    labels: Tensor | None = None
    axis_depth: bool = False

    def __post_init__(self) -> None:
        if self.labels is None and (self.prior is None or self.fov is None):
            raise ValueError("heads need cameras: expected labels, or a prior and a field of view")
        if self.labels is not None and (self.labels.ndim != 2 or self.labels.shape[1] != 25 or len(self.labels) == 0):
            raise ValueError(f"labels must be (L, 25) cameras, got {tuple(self.labels.shape)}")

    def draws(self, index: int) -> Draws:
        """The random numbers of head ``index``."""
        return Draws(self.seed).at(step=index, phase="evaluate")

    @torch.no_grad()
    def codes(self, indices: Sequence[int]) -> Codes:
        """Mapped codes of some heads."""
        spec = self.generator.latent_spec
        rows = [sample_latents(spec, self.draws(i), 1) for i in indices]
        latents = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in spec}
        told = None if self.labels is None else self._labels_of(indices).to(self.device)
        return self.generator.map(latents, told, truncation=self.psi)

    def _labels_of(self, indices: Sequence[int]) -> Tensor:
        assert self.labels is not None
        places = [float(self.draws(i).uniform("camera_row", (), dtype=torch.float64)) for i in indices]
        return self.labels[[int(place * len(self.labels)) for place in places]]

    def cameras(self, indices: Sequence[int]) -> Camera:
        """The camera of each head: its row of the labels, or from the prior. They have angles."""
        if self.labels is not None:
            camera = Camera.from_label(self._labels_of(indices))
            return Camera(camera.cam2world, camera.intrinsics, camera.sphere_angles()).to(self.device)
        assert self.prior is not None and self.fov is not None
        return Camera.cat([self.prior.sample(self.draws(i), 1, self.fov) for i in indices]).to(self.device)

    @torch.no_grad()
    def pictures(self, count: int) -> Iterator[tuple[GeneratorOutput, Camera]]:
        """Heads 0 .. count - 1, each from its own camera, in batches."""
        for indices in _batches(count, self.batch):
            camera = self.cameras(indices)
            yield self._render(self.generator.scene(self.codes(indices)), camera, indices[0]), camera

    def chunks(self, count: int) -> Iterator[HeadChunk]:
        """Heads 0 .. count - 1 in batches that can be seen from any camera; a scene is computed once."""
        for see in self.outputs(count):
            yield lambda camera, see=see: self.views(see(camera), camera)

    @torch.no_grad()
    def outputs(self, count: int) -> Iterator[Callable[[Camera], GeneratorOutput]]:
        """The same batches, as the generator renders them."""
        for indices in _batches(count, self.batch):
            scene = self.generator.scene(self.codes(indices))

            def see(camera: Camera, scene: Any = scene, first: int = indices[0]) -> GeneratorOutput:
                camera = camera.to(self.device)
                camera = Camera.cat([camera] * scene.count) if len(camera) == 1 else camera
                return self._render(scene, camera, first)

            yield see

    def picture(self, codes: Codes, camera: Camera, first: int) -> GeneratorOutput:
        """Given codes by given cameras, with the random depths (if any) of the batch that begins with head ``first``."""
        return self._render(self.generator.scene(codes), camera, first)

    def views(self, output: GeneratorOutput, camera: Camera) -> Views:
        """A render by these cameras, or one camera, as :class:`Views`."""
        found = views_of(output)
        if not self.axis_depth:
            return found
        rays = make_depth_rays(camera.to(output.depth.device), output.depth.shape[-1], self.settings.grid)
        lengths = rays.directions.norm(dim=-1).view(-1, *output.depth.shape[2:])
        return replace(found, depth=found.depth * lengths)

    def _render(self, scene: Any, camera: Camera, first: int) -> GeneratorOutput:
        return self.generator.render(scene, camera, self.settings, self.draws(first).at(phase="evaluate_rays"))


def views_of(output: GeneratorOutput) -> Views:
    """A render with depths along unit rays as :class:`Views`; the depth is that of the rendered part of each ray."""
    opacity = output.opacity[:, 0]
    return Views(output.rgb.clamp(-1, 1) / 2 + 0.5, opacity, output.depth[:, 0] / opacity.clamp_min(1e-4))


def views_of_synthetic(batch: SyntheticBatch) -> Views:
    """Synthetic heads with their exact depth as :class:`Views`."""
    return Views(batch.image.float() / 255, (batch.depth > 0).float(), batch.depth)


class KnownHeads(Protocol):
    """Numbered heads whose truth is known: :class:`SyntheticHeads`, or scaled ones."""

    def batch(self, indices: Sequence[int], camera: Camera | None = None) -> SyntheticBatch: ...


def synthetic_chunks(heads: KnownHeads, count: int, batch: int, start: int = 0) -> Iterator[HeadChunk]:
    """Synthetic heads ``start`` .. ``start + count - 1``, to be measured as a generator is."""
    for indices in _batches(count, batch):
        yield lambda camera, indices=indices: views_of_synthetic(heads.batch([start + i for i in indices], camera))


def _batches(count: int, size: int) -> Iterator[list[int]]:
    for first in range(0, count, size):
        yield list(range(first, min(first + size, count)))


# ------------------------------------------------------------------ picture distances


@dataclass(frozen=True)
class SetFeatures:
    """Features of a picture set by one network; ``vectors`` (N, D) only where they were asked for."""

    stats: FeatureStats
    vectors: Tensor | None = None


def collect_features(
    nets: Sequence[FeatureNet], pictures: Iterable[Tensor], keep: Sequence[bool] | None = None
) -> list[SetFeatures]:
    """Read a stream of uint8 (N, 3, H, W) batches once and give it to every network.

    Args:
        keep: for each network, whether to keep the vectors (4 bytes x dimension a picture); default none.

    Raises:
        UserError: fewer than two pictures.
    """
    keep = [False] * len(nets) if keep is None else keep
    stats, vectors = [FeatureStats(net.dimension) for net in nets], [[] for _ in nets]
    for batch in pictures:
        for place, net in enumerate(nets):
            features = net(batch).cpu()
            stats[place].add(features)
            if keep[place]:
                vectors[place].append(features)
    count = min((s.count for s in stats), default=0)
    if nets and count < 2:
        raise UserError(f"a picture distance needs at least 2 pictures of each set, got {count}")
    return [SetFeatures(s, torch.cat(v) if v else None) for s, v in zip(stats, vectors, strict=True)]


def picture_distances(
    net: FeatureNet, real: SetFeatures, fake: SetFeatures, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Distances of two sets under the names that the network gives them; the kernel's where vectors were kept."""
    common: dict[str, Any] = {"features": net.name, "real_count": real.stats.count, "fake_count": fake.stats.count}
    found = {net.frechet_name: {"value": frechet_distance(real.stats, fake.stats), **common}}
    fewest = min(real.stats.count, fake.stats.count)
    if fewest <= net.dimension:
        found[net.frechet_name]["note"] = (
            f"{fewest} pictures for {net.dimension} features: the covariance is singular, the distance biased upwards"
        )
    if real.vectors is not None and fake.vectors is not None:
        size = min(subset_size, fewest)
        distance = kernel_distance(real.vectors, fake.vectors, subsets, size, seed)
        found[net.kernel_name] = {"value": distance.mean, "std": distance.std, "subsets": subsets, "subset_size": size}
        found[net.kernel_name] |= common
    return found


def precision_recall_of(net: FeatureNet, real: SetFeatures, fake: SetFeatures, neighbours: int = 3) -> dict[str, Any]:
    """Precision and recall of two sets whose vectors were kept. UserError where they are too few for k neighbours."""
    if real.vectors is None or fake.vectors is None:
        raise ValueError("precision and recall need the feature vectors of both sets")
    fewest = min(real.stats.count, fake.stats.count)
    if fewest <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} pictures of each set, got {fewest}")
    found = precision_recall(real.vectors, fake.vectors, neighbours)
    counts = {"real_count": real.stats.count, "fake_count": fake.stats.count}
    return {
        "precision": found.precision,
        "recall": found.recall,
        "neighbours": neighbours,
        "features": net.name,
        **counts,
    }


def uint8_pictures(heads: GeneratedHeads, count: int) -> Iterator[Tensor]:
    """The pictures of :meth:`GeneratedHeads.pictures` as (N, 3, S, S) uint8."""
    for output, _ in heads.pictures(count):
        yield to_uint8(output.rgb)


# ------------------------------------------------------------------ poses


@torch.no_grad()
def pose_report(
    encoder: Callable[[Tensor], Tensor], pictures: Iterable[tuple[Tensor, Camera]], tick: Tick | None = None
) -> dict[str, Any]:
    """Errors, in degrees, of the poses that an encoder reads off pictures whose cameras are known.

    Args:
        encoder: (N, 3, S, S) in [-1, 1] -> (N, 2) pitch and yaw in radians.
        pictures: batches with their cameras, which must have angles.

    Returns:
        ``mean_direction`` and ``median_direction``: angle between the true and the predicted view direction;
        ``mean_pitch``, ``mean_yaw``: absolute errors; ``correlation_pitch``, ``correlation_yaw``;
        ``chance_direction``: the mean angle if the mean true pose were predicted every time; ``count``.
    """
    predicted, true = [], []
    for picture, camera in pictures:
        if camera.angles is None:
            raise ValueError("a pose error needs cameras with angles")
        predicted.append(encoder(picture).double().cpu())
        true.append(camera.angles.double().cpu())
        if tick is not None:
            tick(len(picture))
    if not true:
        raise ValueError("a pose error needs at least one picture")
    guess, truth = torch.cat(predicted), torch.cat(true)
    error = pose_error(guess, truth)
    chance = pose_error(truth.mean(dim=0, keepdim=True).expand_as(truth), truth)
    centred = guess - guess.mean(0), truth - truth.mean(0)
    correlation = (centred[0] * centred[1]).sum(0) / (centred[0].norm(dim=0) * centred[1].norm(dim=0))
    return {
        "mean_direction": _degrees(error.direction.mean()),
        "median_direction": _degrees(error.direction.quantile(0.5)),
        "mean_pitch": _degrees(error.pitch.mean()),
        "mean_yaw": _degrees(error.yaw.mean()),
        "correlation_pitch": _finite(correlation[0]),
        "correlation_yaw": _finite(correlation[1]),
        "chance_direction": _degrees(chance.direction.mean()),
        "count": len(truth),
    }


def generated_with_cameras(heads: GeneratedHeads, count: int) -> Iterator[tuple[Tensor, Camera]]:
    """Generated pictures in [-1, 1] with the cameras they were rendered from."""
    for output, camera in heads.pictures(count):
        yield output.rgb, camera


def synthetic_with_cameras(heads: KnownHeads, count: int, batch: int) -> Iterator[tuple[Tensor, Camera]]:
    """Synthetic heads 0 .. count - 1 in [-1, 1] with their true cameras."""
    for indices in _batches(count, batch):
        made = heads.batch(indices)
        yield made.image.float() / 127.5 - 1, made.camera


# ------------------------------------------------------------------ view consistency


@torch.no_grad()
def consistency_report(
    chunks: Iterable[HeadChunk],
    cameras: tuple[Camera, Camera],
    grid: Grid = "corners",
    tick: Tick | None = None,
    occlusion: float = 0.02,
) -> dict[str, Any]:
    """Depth of each head carried from one view to another and compared with the depth rendered there.

    Args:
        chunks: the heads.
        cameras: two single cameras, see :func:`view_pair`.
        occlusion: a point this much behind the other view's surface counts as hidden, scene units.

    Returns:
        ``mean_error`` (scene units, means over heads of the mean over pixels), ``compared`` and ``hidden``
        (shares of the foreground, see :class:`facelab.metrics.geometry.ViewConsistency`), ``count`` of heads,
        ``without_overlap``: heads of which no pixel could be compared; they do not count in ``mean_error``.
    """
    errors, compared, hidden = [], [], []
    for see in chunks:
        first, second = (see(camera) for camera in cameras)
        a, b = (Camera.cat([camera.to(first.depth.device)] * len(first.depth)) for camera in cameras)
        masks = (first.foreground, second.foreground)
        result = view_consistency(first.depth, a, second.depth, b, *masks, occlusion=occlusion, grid=grid)
        for table, values in ((errors, result.error), (compared, result.compared), (hidden, result.hidden)):
            table.append(values.cpu())
        if tick is not None:
            tick(len(first.depth))
    error = torch.cat(errors)
    return {
        "mean_error": _finite(error.nanmean()),
        "compared": _finite(torch.cat(compared).mean()),
        "hidden": _finite(torch.cat(hidden).mean()),
        "count": len(error),
        "without_overlap": int(error.isnan().sum()),
    }


def view_pair(prior: PosePrior, fov: float, angle: float = VIEW_ANGLE, radius: float = 1.0) -> tuple[Camera, Camera]:
    """Two cameras at the mean pose, ``angle`` radians of yaw apart."""
    yaws = (prior.yaw_mean + s * angle / 2 for s in (-1, 1))
    left, right = (Camera.on_sphere(prior.pitch_mean, yaw, fov, radius) for yaw in yaws)
    return left, right


# ------------------------------------------------------------------ depth against known heads


@torch.no_grad()
def nearest_depth_report(
    truth: Views, cameras: Camera, chunks: Iterable[HeadChunk], grid: Grid = "corners", tick: Tick | None = None
) -> dict[str, Any]:
    """Depth of the candidates that look most like heads whose depth is known.

    Nothing is inverted. Each candidate is rendered from the exact camera of each known head; their distance is
    the mean |difference| of the pictures (values in 0..1) plus the mean |difference| of opacity and foreground.
    Of the nearest candidate the depth is compared where both have a foreground, in the scene's own units
    without any alignment; ``aligned_rmse`` is that after the best scale and shift.

    Levels to compare with: ``random_rmse``, what a candidate picked at random gives on average; ``plane_rmse``,
    the plane through the origin that faces the camera; ``constant_rmse``, the best constant distance (it knows
    the true mean; no aligned depth is worse). Both flat ones are taken over the nearest candidate's pixels.

    Args:
        truth: J known heads.
        cameras: their J cameras.
        chunks: the candidates.

    Returns:
        Means over the J heads, scene units: the four above and ``rmse``; ``rmse_share`` and ``random_rmse_share``,
        as shares of the known head's depth range over its foreground; ``mask_iou`` of the nearest candidate;
        ``depth_range``; ``heads``, ``candidates``; ``without_overlap``: heads whose nearest candidate shares
        fewer than 2 pixels, which do not count.
    """
    plane = plane_depth(cameras.to(truth.depth.device), truth.depth.shape[-1], grid)
    columns: list[Tensor] = []
    for see in chunks:
        rows = []
        for j in range(len(truth.depth)):
            known = Views(truth.image[j : j + 1], truth.opacity[j : j + 1], truth.depth[j : j + 1])
            seen = see(cameras[j])
            rows.append(_compare(known, seen, plane[j : j + 1]).cpu())
            if tick is not None:
                tick(len(seen.depth))
        columns.append(torch.stack(rows))
    table = torch.cat(columns, dim=1)  # (J, K, number of measures)
    nearest = table[torch.arange(len(table)), table[..., 0].argmin(dim=1)]
    _, rmse, aligned, constant, flat, iou = nearest.unbind(-1)
    spread = _depth_range(truth).cpu()
    random = table[..., 1].nanmean(dim=1)
    return {
        "rmse": _finite(rmse.nanmean()),
        "rmse_share": _finite((rmse / spread).nanmean()),
        "random_rmse": _finite(random.nanmean()),
        "random_rmse_share": _finite((random / spread).nanmean()),
        "plane_rmse": _finite(flat.nanmean()),
        "constant_rmse": _finite(constant.nanmean()),
        "aligned_rmse": _finite(aligned.nanmean()),
        "mask_iou": _finite(iou.mean()),
        "depth_range": _finite(spread.mean()),
        "heads": table.shape[0],
        "candidates": table.shape[1],
        "without_overlap": int(rmse.isnan().sum()),
    }


def plane_depth(cameras: Camera, size: int, grid: Grid = "corners") -> Tensor:
    """(N, S, S) distance along each ray to the plane through the origin that faces the camera."""
    rays = make_rays(cameras, size, grid)
    forward = cameras.cam2world[:, None, :3, 2]
    distance = -(rays.origins * forward).sum(-1) / (rays.directions * forward).sum(-1)
    return distance.view(-1, size, size)


def _compare(known: Views, seen: Views, plane: Tensor) -> Tensor:
    """One known head and K candidates -> (K, 6): distance, rmse, aligned, constant and plane rmse, mask IoU."""
    inside, foreground = known.foreground, seen.foreground
    both = foreground & inside
    union = (foreground | inside).flatten(1).sum(1).clamp(min=1)
    iou = both.flatten(1).sum(1) / union
    result = torch.full((len(seen.depth), 6), float("nan"), dtype=torch.float64, device=seen.depth.device)
    result[:, 0], result[:, 5] = likeness(known, seen), iou.double()
    enough = both.flatten(1).sum(1) >= LEAST_OVERLAP
    if bool(enough.any()):
        where, depth = both[enough], seen.depth[enough]
        true = known.depth.expand_as(depth)
        result[enough, 1] = depth_error(depth, true, where).rmse
        result[enough, 3] = masked_deviation(true, where)
        # a candidate without relief has no best scale: its best fit is the constant
        aligned = depth_error(depth, true, where, "scale_shift").rmse
        result[enough, 2] = torch.where(aligned.isfinite(), aligned, result[enough, 3])
        result[enough, 4] = depth_error(plane.to(depth).expand_as(depth), true, where).rmse
    return result


def likeness(known: Views, seen: Views) -> Tensor:
    """(K,) how far K candidates are from one known head: see :func:`nearest_depth_report`; float64."""
    # a super-resolved picture is compared at the size at which its depth is known
    image = torch.nn.functional.adaptive_avg_pool2d(seen.image, known.image.shape[-1])
    picture = (image - known.image).abs().flatten(1).mean(1)
    mask = (seen.opacity - known.foreground.to(seen.opacity)).abs().flatten(1).mean(1)
    return (picture + mask).double()


def _depth_range(truth: Views) -> Tensor:
    """(J,) largest minus smallest depth of each foreground, float64; NaN where there is none."""
    depth, inside = truth.depth.flatten(1).double(), truth.foreground.flatten(1)
    far = torch.where(inside, depth, -math.inf).amax(1)
    near = torch.where(inside, depth, math.inf).amin(1)
    return torch.where(inside.any(1) & (far > near), far - near, float("nan"))


def _degrees(angle: Tensor) -> float:
    return math.degrees(float(angle))


def _finite(value: Tensor) -> float | None:
    """A number for JSON; None for what does not exist."""
    number = float(value)
    return number if math.isfinite(number) else None
