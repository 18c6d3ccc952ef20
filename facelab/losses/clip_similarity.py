# SPDX-License-Identifier: Apache-2.0
"""Do picture and prompt mean the same: 1 minus the cosine of their CLIP embeddings (arXiv 2103.00020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from facelab.losses.identity import embedding_distance
from facelab.nn.pretrained.clip import DEVIATION, MEAN, ClipVision
from facelab.tensors import constant


class ClipSimilarity:
    """Distance of pictures from a prompt.

    Args:
        vision: the picture tower; stays as it is.
        prompt: (1, D) or (N, D) embedding of the prompt, see :mod:`facelab.nn.pretrained.clip`.
        name: identifies the weights, stored beside every number.
    """

    def __init__(self, vision: ClipVision, prompt: Tensor, name: str = "clip") -> None:
        self.vision, self.prompt, self.name = vision.requires_grad_(False).eval(), prompt, name

    def loss(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> (N,) 1 - cosine, 0..2."""
        return embedding_distance(self.vision(clip_input(pictures, self.vision.side)), self.prompt.to(pictures.device))

    def similarity(self, pictures: Tensor) -> Tensor:
        """(N,) cosine, -1..1: the CLIP score; times 100 what the original's logit is."""
        return 1 - self.loss(pictures)


def clip_input(pictures: Tensor, side: int) -> Tensor:
    """(N, 3, S, S) in [-1, 1] -> (N, 3, side, side) with CLIP's statistics; bicubic, antialiased, not clamped."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(
            f"pictures must be float (N, 3, S, S) in [-1, 1], got {pictures.dtype} {tuple(pictures.shape)}"
        )
    if tuple(pictures.shape[2:]) != (side, side):
        pictures = F.interpolate(pictures, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    mean, deviation = (constant(v, pictures.device, pictures.dtype).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    return ((pictures + 1) / 2 - mean) / deviation
