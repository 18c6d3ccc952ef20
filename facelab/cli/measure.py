# SPDX-License-Identifier: Apache-2.0
"""One model under measurement: what ``compute_metrics`` asks of it, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facelab.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

OF_PICTURES = ("fid", "kid", "frechet_random", "kernel_random")
HELD_OUT = 1_000_000  # added to the training seed: heads that training has not seen
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Request:
    """What was asked for; the options of the command, see there."""

    metrics: tuple[str, ...]
    data: str | None
    num_images: int
    num_real: int | None
    image_size: int
    geometry_size: int | None
    ray_step_multiplier: int
    psi: float
    inception: Path | None
    fid_resize: str
    kernel_subsets: int
    batch: int
    max_points: int
    seed: int
    kind: str
    classes: int
    predictions: Path | None
    targets: Path | None
    depth_heads: int
    depth_candidates: int


class Session:
    """One model under measurement. UserError at once for what this model or data set does not allow."""

    def __init__(self, model: Any, request: Request, inception: Path | None, weights: str | None = None) -> None:
        self.model, self.request, self.inception, self.weights = model, request, inception, weights
        trained_on = model.config.data.path
        self.data = request.data or trained_on or SYNTHETIC
        self.on_synthetic = self.data == SYNTHETIC
        if "depth" in request.metrics and not self.on_synthetic:
            raise UserError(
                f"depth compares with heads whose depth is known: expected --data synthetic, got {self.data}"
            )
        if "pose" in request.metrics:
            self.encoder, self.encoder_size = pose_encoder(model)
        self.real = None
        if set(OF_PICTURES) & set(request.metrics):
            if not self.on_synthetic:
                self.real = self._picture_set()
            self.settings(request.image_size)

    # --- what is measured

    def settings(self, size: int | None) -> Any:
        """Inference settings at an image size; None = as trained."""
        settings = self.model.settings(size, self.request.ray_step_multiplier)
        return settings.replace(max_points=self.request.max_points)

    def generated(self, size: int | None) -> Any:
        """The model's heads."""
        from facelab.cameras.pose_sampling import PosePrior
        from facelab.metrics.evaluate import GeneratedHeads

        c, r = self.model.config.camera, self.request
        prior = PosePrior(c.distribution, c.yaw_mean, c.yaw_std, c.pitch_mean, c.pitch_std)
        return GeneratedHeads(
            self.model.generator, self.settings(size), prior, c.fov, r.psi, r.seed, r.batch, self.model.device
        )

    def held_out(self, size: int, pixel_grid: str) -> Any:
        """Synthetic heads that training has not seen, with the model's camera distribution."""
        from facelab.data.synthetic import SyntheticHeads

        c = self.model.config.camera
        return SyntheticHeads(
            self.held_out_seed,
            size,
            device=self.model.device,
            grid=pixel_grid,
            fov=c.fov,
            yaw_std=c.yaw_std,
            pitch_std=c.pitch_std,
        )

    @property
    def held_out_seed(self) -> int:
        return self.model.config.train.seed + HELD_OUT + self.request.seed

    def _picture_set(self) -> Any:
        from facelab.methods import load_method

        config, size = self.model.config, self.request.image_size
        changed = replace(
            config,
            data=replace(config.data, path=self.data, cache="none"),
            render=replace(config.render, resolution=size),
        )
        return load_method(self.model.method).pictures(changed)

    # --- metrics

    def pictures(self) -> dict[str, Any]:
        """fid, kid, frechet_random, kernel_random: each set is made and read once, whatever is asked for."""
        from facelab.metrics.evaluate import collect_features, picture_distances, uint8_pictures
        from facelab.metrics.features import InceptionFeatures, RandomFeatureNet

        wanted, r = set(self.request.metrics), self.request
        nets: list[Any] = []
        if wanted & {"fid", "kid"}:
            assert self.inception is not None
            nets.append(InceptionFeatures(self.inception, r.fid_resize).to(self.model.device))  # type: ignore[arg-type]
        if wanted & {"frechet_random", "kernel_random"}:
            nets.append(RandomFeatureNet().to(self.model.device))
        keep = [net.kernel_name in wanted for net in nets]
        heads = self.generated(r.image_size)
        real_count = self.real_count
        with Bar(real_count, "real pictures") as tick:
            real = collect_features(nets, counted(self.real_pictures(real_count, heads.settings.grid), tick), keep)
        with Bar(r.num_images, "generated pictures") as tick:
            fake = collect_features(nets, counted(uint8_pictures(heads, r.num_images), tick), keep)
        found: dict[str, Any] = {}
        for net, first, second in zip(nets, real, fake, strict=True):
            found |= picture_distances(net, first, second, r.kernel_subsets, seed=r.seed)
        return {name: {**values, "image_size": r.image_size} for name, values in found.items()}

    @property
    def real_count(self) -> int:
        asked = self.request.num_real or self.request.num_images
        return asked if self.real is None else min(asked, len(self.real))

    def real_pictures(self, count: int, pixel_grid: str) -> Iterator[Tensor]:
        """(N, 3, S, S) uint8 on the model's device: held-out heads, or a random part of the data set."""
        from facelab.data.samplers import ResumableSampler

        batch = self.request.batch
        heads = self.held_out(self.request.image_size, pixel_grid) if self.real is None else None
        order = None if self.real is None else ResumableSampler(len(self.real), self.request.seed)
        for first in range(0, count, batch):
            size = min(batch, count - first)
            if heads is not None:
                yield heads.batch(range(first, first + size)).image
            else:
                assert order is not None and self.real is not None
                yield self.real.items(order.indices_for_chunk(first, size)).image.to(self.model.device)

    def pose(self) -> dict[str, Any]:
        """The discriminator's pose head on held-out synthetic heads, and on generated pictures."""
        from facelab.metrics.evaluate import generated_with_cameras, pose_report, synthetic_with_cameras

        r, size = self.request, self.encoder_size
        heads = self.generated(size)
        definition = (
            "angles between the camera's direction and the one that the pose head of d_image reads off a picture. "
            "held_out: synthetic heads that training has not seen, cameras known. generated: the model's own heads; "
            "generator and discriminator were trained to agree on these, so they alone prove no true pose. "
            "chance: predicting the mean pose every time."
        )
        found: dict[str, Any] = {"unit": "degrees", "image_size": size, "encoder": "d_image", "definition": definition}
        with Bar(r.num_images, "poses, generated") as tick:
            found["generated"] = pose_report(self.encoder, generated_with_cameras(heads, r.num_images), tick)
        if self.on_synthetic:
            truth = self.held_out(size, heads.settings.grid)
            with Bar(r.num_images, "poses, held-out heads") as tick:
                batches = synthetic_with_cameras(truth, r.num_images, r.batch)
                found["held_out"] = pose_report(self.encoder, batches, tick)
        return {"pose": found}

    def depth(self) -> dict[str, Any]:
        """Nearest generated heads against held-out ones; beside it other synthetic heads in their place."""
        from facelab.metrics.evaluate import nearest_depth_report, synthetic_chunks, views_of_synthetic

        r = self.request
        heads = self.generated(r.geometry_size)
        size, pixel_grid = heads.settings.resolution, heads.settings.grid
        source = self.held_out(size, pixel_grid)
        known = source.batch(range(r.depth_heads))
        truth = views_of_synthetic(known)
        with Bar(2 * r.depth_heads * r.depth_candidates, "depth") as tick:
            found = nearest_depth_report(truth, known.camera, heads.chunks(r.depth_candidates), pixel_grid, tick)
            others = synthetic_chunks(source, r.depth_candidates, r.batch, start=r.depth_heads)
            perfect = nearest_depth_report(truth, known.camera, others, pixel_grid, tick)
        definition = " ".join((nearest_depth_report.__doc__ or "").split("Args:")[0].split())
        note = "perfect_generator: the same with other synthetic heads and their exact depth as candidates"
        return {
            "depth": {
                "unit": "scene units",
                "image_size": size,
                **found,
                "perfect_generator": perfect,
                "definition": f"{definition} {note}.",
            }
        }

    def consistency(self) -> dict[str, Any]:
        """Two views of generated heads; beside it the same of synthetic heads, whose depth is exact."""
        from facelab.metrics.evaluate import VIEW_ANGLE, consistency_report, synthetic_chunks, view_pair

        r = self.request
        heads = self.generated(r.geometry_size)
        size, pixel_grid = heads.settings.resolution, heads.settings.grid
        cameras, count = view_pair(heads.prior, heads.fov), r.depth_candidates
        with Bar(2 * count, "consistency") as tick:
            found = consistency_report(heads.chunks(count), cameras, pixel_grid, tick)
            exact = synthetic_chunks(self.held_out(size, pixel_grid), count, r.batch)
            floor = consistency_report(exact, cameras, pixel_grid, tick)
        definition = (
            "depth of each head carried from one view to the other and compared with the depth rendered there, mean "
            "absolute difference; points more than 0.02 behind the other view's surface count as hidden. "
            "exact_depth: the same of synthetic heads, whose depth is exact: what the pixels' size alone costs."
        )
        common = {"unit": "scene units", "image_size": size, "yaw_between_views_radians": VIEW_ANGLE}
        return {"consistency": {**common, **found, "exact_depth": floor, "definition": definition}}

    def describe(self) -> dict[str, Any]:
        """Model, data and settings for the JSON file."""
        from facelab.deviations import describe

        model, r = self.model, self.request
        data: dict[str, Any] = {"source": self.data}
        if self.on_synthetic:
            data["heads_seed"] = self.held_out_seed
        if set(OF_PICTURES) & set(r.metrics):
            data["real_count"] = self.real_count
        return {
            "model": {
                "path": str(model.path),
                "method": model.method,
                "weights": self.weights or "ema, or the generator where there is none",
                "step": model.meta.get("step"),
                "images": model.meta.get("images"),
                "curriculum": model.meta.get("curriculum"),
            },
            "data": data,
            "settings": {
                "num_images": r.num_images,
                "psi": r.psi,
                "seed": r.seed,
                "batch": r.batch,
                "ray_step_multiplier": r.ray_step_multiplier,
                "background": "as rendered, not filled",
            },
            "deviations": describe(model.deviations),
        }


def pose_encoder(model: Any) -> tuple[Callable[[Any], Any], int]:
    """The pose head of the model's image discriminator: (pictures -> pitch and yaw, image side it wants).

    The fade-in of its resolution stands where it stood at the checkpoint.

    Raises:
        UserError: the file holds no ``d_image``, or one without a pose head.
    """
    from facelab.api import locate
    from facelab.checkpoints.format import load_checkpoint
    from facelab.methods import load_method
    from facelab.nn.discriminators import ProgressiveDiscriminator

    stored = load_checkpoint(locate(model.path), device="cpu", with_state=False)
    if "d_image" not in stored.weights:
        raise UserError(
            f"pose needs the image discriminator, which reads poses off pictures; {model.path} holds only "
            f"{', '.join(sorted(stored.weights))}; give the run folder or an export --with-discriminators"
        )
    method = load_method(model.method)
    config = method.discriminator_config(model.config, method.judges()[0].channels)
    if not config.pose:
        raise UserError(f"pose needs a discriminator with a pose head; {model.config.discriminator.kind} has none")
    discriminator = ProgressiveDiscriminator(config)
    state = {k: v.float() if v.is_floating_point() else v for k, v in stored.weights["d_image"].items()}
    discriminator.load_state_dict(state)
    discriminator.eval().requires_grad_(False).to(model.device)
    alpha = fade_in(method, stored.meta, stored.step)
    return lambda picture: discriminator(picture, alpha).pose, model.config.render.resolution


def fade_in(method: Any, meta: Any, step: int) -> float:
    """Weight of the newest resolution at a step of a run, from its curriculum."""
    from facelab.config import from_dict
    from facelab.training.schedule import Progress

    staged = from_dict(method.config_type, meta.get("staged_config") or meta["config"])
    if staged.unit != "from_step":
        return 1.0
    row = staged.stage_index(step)
    starts = tuple((start, 0) for start in staged.boundaries[: row + 1])
    place = Progress(step, 0, 1, row, starts, staged.stages)
    return place.fade(staged.stages[row].loss.fade_steps, lambda config: config.render.resolution)


class Bar:
    """A bar on stderr where that is a terminal; the context's value is told how many were done."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what

    def __enter__(self) -> Callable[[int], Any]:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, desc=self._what, unit="img", disable=None, leave=False)
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def counted(batches: Iterator[Tensor], tick: Callable[[int], Any]) -> Iterator[Tensor]:
    """Pass batches on and tell how many pictures went by."""
    for batch in batches:
        yield batch
        tick(len(batch))
