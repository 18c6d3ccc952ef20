# SPDX-License-Identifier: Apache-2.0
"""Overlap of label maps: intersection over union per class and its mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from facelab.errors import nearest

Kind = Literal["present", "original"]
KINDS = ("present", "original")
ORIGINAL_EPSILON = 1e-6


def overlap_counts(prediction: Tensor, target: Tensor, classes: int = 19) -> tuple[Tensor, Tensor]:
    """Pixels in both and in either map, per picture and class.

    Args:
        prediction, target: (N, H, W) integers in 0..classes-1.
        classes: number of classes.

    Returns:
        intersection, union: (N, classes) int64.

    Raises:
        ValueError: shapes differ, maps of real numbers, or a label out of range.
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(f"maps must both be (N, H, W), got {tuple(prediction.shape)} and {tuple(target.shape)}")
    for labels in (prediction, target):
        _check_labels(labels, classes)
    both = torch.where(prediction == target, prediction.long(), classes)
    in_prediction, in_target, in_both = (_histogram(labels, classes) for labels in (prediction, target, both))
    return in_both, in_prediction + in_target - in_both


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise ValueError(f"a label map holds integers, got {labels.dtype}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"labels must be 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def _histogram(labels: Tensor, classes: int) -> Tensor:
    """(N, H, W) -> (N, classes); the label ``classes`` is a bin of its own that is left out."""
    flat = labels.flatten(1).long()
    rows = torch.arange(len(flat), device=flat.device)[:, None] * (classes + 1)
    return torch.bincount((flat + rows).flatten(), minlength=len(flat) * (classes + 1)).view(-1, classes + 1)[:, :-1]


def mean_iou(prediction: Tensor, target: Tensor, classes: int = 19, kind: Kind = "present") -> Tensor:
    """Mean intersection over union of each picture -> (N,) float64.

    Args:
        prediction, target: (N, H, W) integers.
        classes: number of classes.
        kind: ``present`` averages over the classes that occur in either map, so that equal maps
            give 1. ``original`` is FENeRF's: over all classes, union + 1e-6, where classes absent
            from both count as 0 and equal maps can stay far below 1.
    """
    return _mean(*overlap_counts(prediction, target, classes), kind)


class OverlapMeter:
    """Overlap of a whole data set, picture by picture."""

    def __init__(self, classes: int = 19) -> None:
        self.classes = classes
        self.pictures = 0
        self._intersection = torch.zeros(classes, dtype=torch.int64)
        self._union = torch.zeros(classes, dtype=torch.int64)
        self._sums = dict.fromkeys(KINDS, 0.0)

    def add(self, prediction: Tensor, target: Tensor) -> OverlapMeter:
        """Take (N, H, W) maps; returns itself."""
        intersection, union = overlap_counts(prediction, target, self.classes)
        for kind in KINDS:
            self._sums[kind] += float(_mean(intersection, union, kind).sum())
        self._intersection += intersection.sum(dim=0).cpu()
        self._union += union.sum(dim=0).cpu()
        self.pictures += len(prediction)
        return self

    def per_class(self) -> Tensor:
        """(classes,) IoU over all pixels of the set; NaN for a class that never occurred."""
        return self._intersection.double() / self._union.double()

    def mean_per_picture(self, kind: Kind = "present") -> float:
        """Mean over the pictures of :func:`mean_iou`, which is how the original reports it."""
        _check_kind(kind)
        if self.pictures == 0:
            raise ValueError("no pictures were added")
        return self._sums[kind] / self.pictures

    def mean(self) -> float:
        """Mean of :meth:`per_class` over the classes that occurred (pixels of the set pooled)."""
        if self.pictures == 0:
            raise ValueError("no pictures were added")
        return float(self.per_class().nanmean())


def _mean(intersection: Tensor, union: Tensor, kind: Kind) -> Tensor:
    _check_kind(kind)
    intersection, union = intersection.double(), union.double()
    if kind == "original":
        return (intersection / (union + ORIGINAL_EPSILON)).mean(dim=1)
    return (intersection / union.clamp(min=1)).sum(dim=1) / (union > 0).sum(dim=1)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.{nearest(kind, KINDS)}")
