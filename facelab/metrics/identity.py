# SPDX-License-Identifier: Apache-2.0
"""Does a head stay the same person from every side? (EG3D, arXiv 2112.07945, section 5: mean ArcFace cosine)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.metrics.evaluate import HeadChunk, Tick

Embedding = Callable[[Tensor], Tensor]  # (N, 3, S, S) in [-1, 1] -> (N, D)
CameraPairs = Callable[[int, int], tuple[Camera, Camera]]  # first head, number of heads -> two cameras for each


@torch.no_grad()
def identity_report(
    chunks: Iterable[HeadChunk], count: int, batch: int, pairs: CameraPairs, embed: Embedding, tick: Tick | None = None
) -> dict[str, Any]:
    """Cosine of the embeddings of two views of each head, and of views of different heads.

    Args:
        chunks: the heads, ``batch`` at a time, in order.
        count: of heads in all.
        pairs: the two cameras of each head.
        embed: any network; its vectors are normalised here.

    Returns:
        ``value``: mean cosine of a head with itself from elsewhere; ``std``; ``between_heads``: mean cosine of a head
        with the next one, which ``value`` must exceed to mean anything (None for one head); ``count``.

    Raises:
        ValueError: embeddings that are no (N, D) finite vectors.
    """
    first, second = [], []
    start = 0
    for see in chunks:
        number = min(batch, count - start)
        for table, camera in zip((first, second), pairs(start, number), strict=True):
            table.append(_unit(embed(see(camera).image * 2 - 1), number))
            if tick is not None:
                tick(number)
        start += number
    a, b = torch.cat(first), torch.cat(second)
    same = (a * b).sum(1)
    other = (a * b.roll(1, 0)).sum(1).mean() if len(a) > 1 else None
    return {
        "value": float(same.mean()),
        "std": float(same.std(correction=0)),
        "between_heads": None if other is None else float(other),
        "count": len(a),
    }


def _unit(vectors: Tensor, count: int) -> Tensor:
    if vectors.ndim != 2 or len(vectors) != count or not vectors.isfinite().all():
        raise ValueError(f"an identity network gives finite ({count}, D) vectors, got {tuple(vectors.shape)}")
    return torch.nn.functional.normalize(vectors.double().cpu(), dim=1)
