# SPDX-License-Identifier: Apache-2.0
"""Does a generated segmentation fit the generated picture? Against a face parser, and against heads whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.data.synthetic import SyntheticBatch
from facelab.generator import GeneratorOutput, fill_output
from facelab.metrics.evaluate import GeneratedHeads, KnownHeads, Tick, Views, likeness, views_of_synthetic
from facelab.metrics.segmentation import OverlapMeter, mean_iou

Parser = Callable[[Tensor, tuple[int, int]], Tensor]  # (N, 3, S, S) in [-1, 1], size -> (N, *size) class numbers
SeenHead = tuple[Views, Tensor]  # candidates from one camera, and their label maps (K, S, S)
SeenChunk = Callable[[Camera], SeenHead]


@dataclass(frozen=True)
class LabelSpace:
    """The labels in which two segmentations are compared.

    Attributes:
        names: of the labels.
        table: class of a parser or a data set -> label; None: they are the same.
        prepends_background: the generator's channels lack the background, which is where its rays stay empty.
    """

    names: tuple[str, ...]
    table: tuple[int, ...] | None = None
    prepends_background: bool = False

    @staticmethod
    def of_groups(groups: Sequence[Sequence[int]], names: Sequence[str], classes: int) -> LabelSpace:
        """Labels that are groups of classes. ValueError unless every class is in one group."""
        places = [[k for k, group in enumerate(groups) if c in group] for c in range(classes)]
        wrong = [c for c, place in enumerate(places) if len(place) != 1]
        if wrong:
            raise ValueError(f"class {wrong[0]} is in {len(places[wrong[0]])} groups, expected one")
        return LabelSpace(tuple(names), tuple(place[0] for place in places))

    def of_output(self, output: GeneratorOutput) -> Tensor:
        """(N, S, S) label of each pixel of a render: its highest score. ValueError for other channels than names."""
        filled = fill_output(output) if self.prepends_background else output
        scores = filled.semantics
        if scores is None or scores.shape[1] != len(self.names):
            got = "none" if scores is None else scores.shape[1]
            raise ValueError(f"expected {len(self.names)} channels of semantics, got {got}")
        return scores.argmax(dim=1)

    def of_classes(self, classes: Tensor) -> Tensor:
        """Class numbers -> labels."""
        if self.table is None:
            return classes
        return torch.tensor(self.table, device=classes.device)[classes.long()]


@torch.no_grad()
def parser_report(
    heads: GeneratedHeads, count: int, parser: Parser, space: LabelSpace, tick: Tick | None = None
) -> dict[str, Any]:
    """Overlap of the segmentation that a generator makes with the one that a parser reads off its picture.

    Returns:
        ``value``: mean over the pictures of the mean IoU over labels in either map; ``pooled``: over the pixels of all
        pictures; ``agreement``: share of pixels with the same label; ``per_class``, ``count``.
    """
    meter, same, pixels = OverlapMeter(len(space.names)), 0, 0
    for output, _ in heads.pictures(count):
        made = space.of_output(output)
        read = space.of_classes(parser(output.rgb.clamp(-1, 1), (made.shape[1], made.shape[2])))
        meter.add(made, read)
        same, pixels = same + int((made == read).sum()), pixels + made.numel()
        if tick is not None:
            tick(len(made))
    shares = zip(space.names, meter.per_class().tolist(), strict=True)
    return {
        "value": meter.mean_per_picture(),
        "pooled": meter.mean(),
        "agreement": same / pixels,
        "per_class": {name: None if share != share else share for name, share in shares},
        "count": meter.pictures,
    }


# ------------------------------------------------------------------ against known heads


def generated_chunks(heads: GeneratedHeads, count: int, space: LabelSpace) -> Iterator[SeenChunk]:
    """Generated heads with their segmentation, as candidates."""

    def look(see: Callable[[Camera], GeneratorOutput], camera: Camera) -> SeenHead:
        output = see(camera)
        return heads.views(output, camera), space.of_output(output)

    for see in heads.outputs(count):
        yield lambda camera, see=see: look(see, camera)


def synthetic_candidates(
    heads: KnownHeads, count: int, batch: int, space: LabelSpace, start: int = 0
) -> Iterator[SeenChunk]:
    """Synthetic heads ``start`` .. ``start + count - 1`` with their true segmentation, as candidates."""
    for first in range(start, start + count, batch):
        numbers = list(range(first, min(first + batch, start + count)))
        yield lambda camera, numbers=numbers: _known(heads.batch(numbers, camera), space)


def _known(made: SyntheticBatch, space: LabelSpace) -> SeenHead:
    return views_of_synthetic(made), space.of_classes(made.mask)


@torch.no_grad()
def known_heads_report(
    known: SyntheticBatch, chunks: Iterable[SeenChunk], space: LabelSpace, tick: Tick | None = None
) -> dict[str, Any]:
    """Segmentation of the candidates that look most like heads whose segmentation is known, same camera.

    Nothing is inverted. Likeness is that of :func:`facelab.metrics.evaluate.nearest_depth_report`: it looks at picture
    and silhouette, not at the segmentation.

    Args:
        known: J heads.
        chunks: the candidates.

    Returns:
        ``value``: mean IoU with the nearest candidate's segmentation, mean over the J heads; ``random``: the same
        with a candidate picked at random; ``per_class`` of the nearest, pixels pooled; ``heads``, ``candidates``.
    """
    truth, labels = _known(known, space)
    best = [(float("inf"), torch.empty(0))] * len(labels)
    total, candidates = 0.0, 0
    for see in chunks:
        for j in range(len(labels)):
            one = slice(j, j + 1)
            views, made = see(known.camera[j])
            made = _sized(made, labels.shape[-1]).to(labels.device)
            far = likeness(Views(truth.image[one], truth.opacity[one], truth.depth[one]), views)
            total += float(mean_iou(made, labels[one].expand_as(made), len(space.names)).sum())
            place = int(far.argmin())
            if float(far[place]) < best[j][0]:
                best[j] = (float(far[place]), made[place])
            candidates += len(made) * (j == 0)
            if tick is not None:
                tick(len(made))
    meter = OverlapMeter(len(space.names)).add(torch.stack([made for _, made in best]), labels)
    shares = zip(space.names, meter.per_class().tolist(), strict=True)
    return {
        "value": meter.mean_per_picture(),
        "random": total / (candidates * len(labels)),
        "per_class": {name: None if share != share else share for name, share in shares},
        "heads": len(labels),
        "candidates": candidates,
    }


def _sized(labels: Tensor, side: int) -> Tensor:
    if labels.shape[-1] == side:
        return labels
    return F.interpolate(labels[:, None].double(), size=(side, side), mode="nearest-exact")[:, 0].long()
