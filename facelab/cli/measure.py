# SPDX-License-Identifier: Apache-2.0
"""One model under measurement: what ``compute_metrics`` asks of it, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facelab.cli.bars import Bar, counted
from facelab.cli.measure_regions import SegmentedModel
from facelab.cli.sight import real_set, sight_of, synthetic_heads, synthetic_labels
from facelab.errors import TAKE_IT_AGAIN, UserError

if TYPE_CHECKING:
    from torch import Tensor

OF_PICTURES = ("fid", "kid", "frechet_random", "kernel_random", "precision_recall", "precision_recall_random")
OCCLUSION = 0.02  # of the camera's distance, behind which a point counts as hidden
READER_HEADS = 1024  # synthetic heads on which a pose reader is fitted where the model has none
HELD_OUT = 1_000_000  # added to the training seed: heads that training has not seen
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Request:
    """What was asked for; the options of the command, see there."""

    metrics: tuple[str, ...]
    data: str | None
    num_images: int
    num_real: int | None
    image_size: int | None
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
    vgg: Path | None = None
    arcface: Path | None = None
    clip: Path | None = None
    prompt: str | None = None
    parser: Path | None = None
    region_heads: int = 16
    change_threshold: float = 8.0


class Session:
    """One model under measurement. UserError at once for what this model or data set does not allow."""

    def __init__(self, model: Any, request: Request, inception: Path | None, weights: str | None = None) -> None:
        self.model, self.request, self.inception, self.weights = model, request, inception, weights
        trained_on = model.config.data.path
        self.data = request.data or trained_on or SYNTHETIC
        self.on_synthetic = self.data == SYNTHETIC
        self.sight = sight_of(model.config)
        self.picture_size = self.sight.sized(request.image_size)
        if "depth" in request.metrics and not self.on_synthetic:
            raise UserError(
                f"depth compares with heads whose depth is known: expected --data synthetic, got {self.data}"
            )
        if "pose" in request.metrics and self.sight.reads_poses and not self.on_synthetic:
            raise UserError(
                f"pose reads poses with a reader fitted on synthetic heads, which fits no other pictures: expected "
                f"--data synthetic, got {self.data}; for others call facelab.metrics.evaluate.pose_report with your reader"
            )
        if "pose" in request.metrics and not self.sight.reads_poses:
            self.encoder, self.encoder_size = pose_encoder(model)
        self.real = None
        if (set(OF_PICTURES) & set(request.metrics) or self.sight.conditioned) and not self.on_synthetic:
            self.real = real_set(model, self.sight, self.data, self.picture_size)
        self.render_size = None if self.sight.picture_size else self.picture_size  # super-resolved: as trained
        self.settings(self.render_size)
        self.geometry_size = self.sight.rendered(request.geometry_size)
        if {"segmentation", "regions"} & set(request.metrics):
            self.segmented = SegmentedModel(self)

    # --- what is measured

    def settings(self, size: int | None) -> Any:
        """Inference settings at an image size; None = as trained."""
        settings = self.model.settings(size, self.request.ray_step_multiplier)
        return settings.replace(max_points=self.request.max_points)

    def generated(self, size: int | None) -> Any:
        """The model's heads; where it is told of cameras, with those of the data set."""
        from facelab.metrics.evaluate import GeneratedHeads

        r, sight = self.request, self.sight
        settings = self.settings(size)
        return GeneratedHeads(
            self.model.generator,
            settings,
            sight.prior,
            sight.fov,
            r.psi,
            r.seed,
            r.batch,
            self.model.device,
            self._labels(settings.grid) if sight.conditioned else None,
            sight.sphere,
        )

    def _labels(self, pixel_grid: str) -> Any:
        if self.real is not None:
            return self.real.labels
        return synthetic_labels(self.sight, self.model.config.train.seed, pixel_grid)

    def held_out(self, size: int, pixel_grid: str) -> Any:
        """Synthetic heads that training has not seen, with the model's camera distribution and scene units."""
        return synthetic_heads(self.sight, self.held_out_seed, size, pixel_grid, self.model.device)

    @property
    def held_out_seed(self) -> int:
        return self.model.config.train.seed + HELD_OUT + self.request.seed

    # --- metrics

    def pictures(self) -> dict[str, Any]:
        """Distances, precision and recall of picture sets: each set is made and read once, whatever is asked for."""
        from facelab.metrics.evaluate import collect_features, picture_distances, precision_recall_of, uint8_pictures
        from facelab.metrics.features import InceptionFeatures, RandomFeatureNet

        wanted, r = set(self.request.metrics), self.request
        nets: list[Any] = []
        if wanted & {"fid", "kid"}:
            assert self.inception is not None
            nets.append(InceptionFeatures(self.inception, r.fid_resize).to(self.model.device))  # type: ignore[arg-type]
        if wanted & {"frechet_random", "kernel_random", "precision_recall_random"}:
            nets.append(RandomFeatureNet().to(self.model.device))
        if "precision_recall" in wanted:
            from facelab.metrics.vgg import VggFeatures

            assert r.vgg is not None
            nets.append(VggFeatures(r.vgg).to(self.model.device))
        manifolds = {RandomFeatureNet.kernel_name: "precision_recall_random", "kernel_vgg": "precision_recall"}
        judged = [manifolds.get(net.kernel_name, "") in wanted for net in nets]
        keep = [net.kernel_name in wanted or judge for net, judge in zip(nets, judged, strict=True)]
        heads = self.generated(self.render_size)
        real_count = self.real_count
        with Bar(real_count, "real pictures") as tick:
            real = collect_features(nets, counted(self.real_pictures(real_count, heads.settings.grid), tick), keep)
        with Bar(r.num_images, "generated pictures") as tick:
            fake = collect_features(nets, counted(uint8_pictures(heads, r.num_images), tick), keep)
        found: dict[str, Any] = {}
        for net, first, second, judge in zip(nets, real, fake, judged, strict=True):
            found |= picture_distances(net, first, second, r.kernel_subsets, seed=r.seed)
            if judge:
                found[manifolds[net.kernel_name]] = precision_recall_of(net, first, second)
        return {name: {**v, "image_size": self.picture_size, "seed": r.seed} for name, v in found.items()}

    @property
    def real_count(self) -> int:
        asked = self.request.num_real or self.request.num_images
        return asked if self.real is None else min(asked, len(self.real))

    def real_pictures(self, count: int, pixel_grid: str) -> Iterator[Tensor]:
        """(N, 3, S, S) uint8 on the model's device: held-out heads, or a random part of the data set."""
        from facelab.data.samplers import ResumableSampler

        batch = self.request.batch
        heads = self.held_out(self.picture_size, pixel_grid) if self.real is None else None
        order = None if self.real is None else ResumableSampler(len(self.real), self.request.seed)
        for first in range(0, count, batch):
            size = min(batch, count - first)
            if heads is not None:
                yield heads.batch(range(first, first + size)).image
            else:
                assert order is not None and self.real is not None
                yield self.real.items(order.indices_for_chunk(first, size)).image.to(self.model.device)

    def pose(self) -> dict[str, Any]:
        """Poses read off held-out synthetic heads and off generated pictures, against the cameras they came from."""
        from facelab.metrics.evaluate import generated_with_cameras, pose_report, synthetic_with_cameras

        r = self.request
        size = self.picture_size if self.sight.reads_poses else self.encoder_size
        heads = self.generated(self.render_size if self.sight.reads_poses else size)
        encoder, name, definition = self._pose_reader(size, heads.settings.grid)
        found: dict[str, Any] = {"unit": "degrees", "image_size": size, "encoder": name, "definition": definition}
        with Bar(r.num_images, "poses, generated") as tick:
            found["generated"] = pose_report(encoder, generated_with_cameras(heads, r.num_images), tick)
        if self.on_synthetic:
            truth = self.held_out(size, heads.settings.grid)
            with Bar(r.num_images, "poses, held-out heads") as tick:
                batches = synthetic_with_cameras(truth, r.num_images, r.batch)
                found["held_out"] = pose_report(encoder, batches, tick)
        return {"pose": found}

    def _pose_reader(self, size: int, pixel_grid: str) -> tuple[Callable[[Any], Any], str, str]:
        """(pictures -> pitch and yaw, its name, what the numbers mean)."""
        common = "angles between the camera's direction and the one that is read off a picture. "
        chance = "chance: predicting the mean pose every time."
        if not self.sight.reads_poses:
            told = (
                "It is read by the pose head of d_image. held_out: synthetic heads that training has not seen, cameras "
                "known. generated: the model's own heads; generator and discriminator were trained to agree on these, "
                "so they alone prove no true pose. "
            )
            return self.encoder, "d_image", common + told + chance
        from facelab.metrics.known_heads import PoseReader

        heads, first = self.held_out(size, pixel_grid), HELD_OUT  # far from the heads that the reader is tested on
        reader = PoseReader(heads, range(first, first + READER_HEADS), device=str(self.model.device))
        told = (
            f"It is read by a regression fitted on {READER_HEADS} synthetic heads that neither training nor held_out "
            "has. held_out: the reader's own error on synthetic heads. generated: that of the model and the reader. "
        )
        return reader, reader.name, common + told + chance

    def depth(self) -> dict[str, Any]:
        """Nearest generated heads against held-out ones; beside it other synthetic heads in their place."""
        from facelab.metrics.evaluate import nearest_depth_report, synthetic_chunks, views_of_synthetic

        r = self.request
        heads = self.generated(self.geometry_size)
        size, pixel_grid = depth_side(heads), heads.settings.grid
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
        heads = self.generated(self.geometry_size)
        size, pixel_grid = depth_side(heads), heads.settings.grid
        cameras, count = view_pair(heads.prior, heads.fov, radius=self.sight.radius), r.depth_candidates
        hidden = OCCLUSION * self.sight.radius
        with Bar(2 * count, "consistency") as tick:
            found = consistency_report(heads.chunks(count), cameras, pixel_grid, tick, hidden)
            exact = synthetic_chunks(self.held_out(size, pixel_grid), count, r.batch)
            floor = consistency_report(exact, cameras, pixel_grid, tick, hidden)
        definition = (
            "depth of each head carried from one view to the other and compared with the depth rendered there, mean "
            "absolute difference; points more than 0.02 camera distances behind the other view's surface count as hidden. "
            "exact_depth: the same of synthetic heads, whose depth is exact: what the pixels' size alone costs."
        )
        common = {"unit": "scene units", "image_size": size, "yaw_between_views_radians": VIEW_ANGLE}
        return {"consistency": {**common, **found, "exact_depth": floor, "definition": definition}}

    def identity(self) -> dict[str, Any]:
        """Cosine of ArcFace embeddings of two views of each generated head, cameras drawn at random."""
        from facelab.metrics.features import read_tensor_file
        from facelab.metrics.identity import identity_report
        from facelab.nn.pretrained.arcface import FaceIdentity, arcface_from_published

        r = self.request
        assert r.arcface is not None
        net = FaceIdentity(arcface_from_published(read_tensor_file(r.arcface), r.arcface)).to(self.model.device)
        heads = self.generated(self.render_size)
        first, second = two_views(heads, r.seed)

        def pairs(start: int, count: int) -> Any:
            return first(start, count), second(start, count)

        with Bar(2 * r.num_images, "identity") as tick:
            found = identity_report(heads.chunks(r.num_images), r.num_images, r.batch, pairs, net, tick)
        definition = (
            "mean cosine of the embeddings of two views of each head from random cameras of the training distribution; "
            "between_heads: of different heads. Pictures are framed as FFHQ where the training pictures are."
        )
        common = {"network": net.name, "image_size": self.picture_size, "seed": r.seed, "definition": definition}
        return {"identity": {**found, **common}}

    def clip_score(self) -> dict[str, Any]:
        """Cosine of the CLIP embeddings of a prompt and of two views of each generated head."""
        from facelab.losses.clip_similarity import ClipSimilarity
        from facelab.metrics.clip_score import clip_score_report, load_clip

        r = self.request
        assert r.clip is not None and r.prompt is not None
        vision, prompt, name = load_clip(r.clip, r.prompt)
        judge = ClipSimilarity(vision.to(self.model.device), prompt.to(self.model.device), name)
        heads = self.generated(self.render_size)
        with Bar(r.num_images, "clip_score") as tick:
            found = clip_score_report(
                heads.chunks(r.num_images), r.num_images, r.batch, two_views(heads, r.seed), judge.similarity, tick
            )
        definition = (
            "mean cosine of the CLIP embeddings of the prompt and of two views of each head from random cameras of the "
            "training distribution; std: over heads, of their means."
        )
        common = {"network": name, "prompt": r.prompt, "image_size": self.picture_size, "seed": r.seed}
        return {"clip_score": {**found, **common, "definition": definition}}

    def segmentation(self) -> dict[str, Any]:
        """The generated segmentation against a parser and against known heads."""
        return self.segmented.segmentation()

    def regions(self) -> dict[str, Any]:
        """One region at a time takes another head's codes."""
        return self.segmented.regions_report()

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
                "image_size": self.picture_size,
                "batch": r.batch,
                "ray_step_multiplier": r.ray_step_multiplier,
                "background": "as rendered, not filled",
            },
            "deviations": describe(model.deviations),
        }


def depth_side(heads: Any) -> int:
    """Side of the depth maps that a model makes, pixels: of the picture, or of the rendering in front of it."""
    see = next(iter(heads.chunks(1)))
    return see(heads.cameras([0])).depth.shape[-1]


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
    try:
        discriminator.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{model.path}: the weights of 'd_image' do not fit the stored configuration ({reason}); {TAKE_IT_AGAIN}"
        ) from error
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


def two_views(heads: Any, seed: int) -> tuple[Callable[[int, int], Any], Callable[[int, int], Any]]:
    """(first head, number) -> cameras, twice: drawn at random from the training distribution."""
    other = replace(heads, seed=seed + HELD_OUT)
    return (
        lambda start, count: heads.cameras(range(start, start + count)),
        lambda start, count: other.cameras(range(start, start + count)),
    )
