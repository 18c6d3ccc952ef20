# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads, whose truth is known, in a model's units; and a pose reader fitted on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.data.synthetic import SyntheticBatch, SyntheticHeads
from facelab.metrics.features import RandomFeatureNet

LIMIT = 3.0  # standard deviations: what is further off is an artefact, and no reason for an extreme pose
READER_PIXELS = 24  # side of the small grey picture that the reader sees beside the features
LEAST_SPREAD = 0.2  # of a feature, as a share of its kind's: a background pixel, always the same, tells nothing


@dataclass(frozen=True)
class ScaledHeads:
    """:class:`SyntheticHeads` in a scene that is ``scale`` times as large (EG3D: 2.7); the pictures stay the same."""

    heads: SyntheticHeads
    scale: float = 1.0

    def batch(self, indices: Sequence[int], camera: Camera | None = None) -> SyntheticBatch:
        """The heads of these numbers; camera, depth and landmarks in the larger scene's units."""
        inner = None if camera is None else camera.scaled(1 / self.scale)
        made = self.heads.batch(indices, inner)
        return replace(
            made,
            depth=made.depth * self.scale,
            landmarks_3d=made.landmarks_3d * self.scale,
            camera=made.camera.scaled(self.scale),
        )


class PoseReader:
    """Pitch and yaw of pictures of heads by ridge regression from fixed features, fitted on synthetic heads.

    The features are those of :class:`RandomFeatureNet` and a small grey picture, standardised and cut off at
    :data:`LIMIT`; those that hardly differ between heads (a background pixel) stay small, or a ground that a model renders
    a little greyer would decide. It is no
    network of a paper; it reads poses off pictures that look like synthetic heads, and its own error on
    heads that it was not fitted on must be stated beside what it reads.

    Args:
        heads: what to fit on.
        indices: which of them.
        ridge: weight of the penalty, in units of the features' mean square sum.
        batch: heads at a time.
    """

    name = "ridge on random-conv-v1 and 24x24 grey pixels, fitted on synthetic heads"

    def __init__(
        self, heads: ScaledHeads, indices: Sequence[int], ridge: float = 0.1, batch: int = 32, device: str = "cpu"
    ) -> None:
        self.net = RandomFeatureNet().to(device)
        rows, truth = [], []
        for start in range(0, len(indices), batch):
            made = heads.batch(indices[start : start + batch])
            rows.append(self._features(made.image.float().to(device) / 127.5 - 1))
            truth.append(made.camera.sphere_angles().double().cpu())
        x, y = torch.cat(rows), torch.cat(truth)
        self.count = len(x)
        self.mean, spread = x.mean(0), x.std(0)
        kinds = spread.split([x.shape[1] - READER_PIXELS**2, READER_PIXELS**2])
        self.scale = torch.cat([s.clamp_min(LEAST_SPREAD * float(s.square().mean().sqrt()) + 1e-12) for s in kinds])
        self.offset = y.mean(0)
        x = self._standardised(x)
        gram = x @ x.T  # as many equations as heads, fewer than features
        gram.diagonal().add_(ridge * x.shape[1])
        self.weight = x.T @ torch.linalg.solve(gram, y - self.offset)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> (N, 2) pitch and yaw in radians."""
        return self.offset + self._standardised(self._features(pictures)) @ self.weight

    def _standardised(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.scale).clamp(-LIMIT, LIMIT)

    def _features(self, pictures: Tensor) -> Tensor:
        small = torch.nn.functional.interpolate(
            pictures.mean(1, keepdim=True), size=(READER_PIXELS, READER_PIXELS), mode="bilinear", antialias=True
        )
        bytes_ = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return torch.cat([self.net(bytes_), small.flatten(1)], dim=1).double().cpu()
