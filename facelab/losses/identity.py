# SPDX-License-Identifier: Apache-2.0
"""Is it still the same person: 1 minus the cosine of two embeddings (FaceDNeRF, arXiv 2306.00783, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Embedding = Callable[[Tensor], Tensor]  # (N, 3, S, S) in [-1, 1] -> (N, D)


def embedding_distance(first: Tensor, second: Tensor) -> Tensor:
    """(N,) 1 - cosine of vectors (N, D) and (N or 1, D), 0..2; vectors of zeros are orthogonal to everything."""
    return 1 - (F.normalize(first, dim=1) * F.normalize(second, dim=1)).sum(dim=1)


class IdentityLoss:
    """Distance of pictures from the persons of target pictures, which are embedded once.

    Args:
        embed: portraits (N, 3, S, S) in [-1, 1] -> (N, D); :class:`~facelab.nn.pretrained.arcface.FaceIdentity` cuts
            the face out of portraits framed as FFHQ itself.
        target: (N, 3, S, S) the persons.

    Raises:
        ValueError: an embedding of another form.
    """

    def __init__(self, embed: Embedding, target: Tensor) -> None:
        self.embed = embed
        with torch.no_grad():
            self.wanted = embed(target)
        if self.wanted.ndim != 2 or len(self.wanted) != len(target):
            raise ValueError(f"an embedding must be ({len(target)}, D), got {tuple(self.wanted.shape)}")

    def __call__(self, pictures: Tensor) -> Tensor:
        """(N,) distances. ValueError for another number of pictures than of targets."""
        found = self.embed(pictures)
        if len(found) != len(self.wanted) and len(self.wanted) != 1:
            raise ValueError(f"expected {len(self.wanted)} pictures, one for each target, got {len(found)}")
        return embedding_distance(found, self.wanted)
