# SPDX-License-Identifier: Apache-2.0
"""ArcFace's IR-SE50 with published names passed through our loader, and the crop in front of it."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.nn.pretrained.arcface import ArcFace, arcface_from_published, face_part, published_names

from ..harness import Arrays, Meta, case_weights, given


def pattern(shape: tuple[int, ...], a: float, b: float, d: float, amplitudes: dict[str, float]) -> Tensor:
    """C + A sin(a (i+1) + 0.7 c + 0.3 n) cos(b (j+1) - 0.5 c) + B cos(d (i+1) (j+1) / 100 + c), float32."""
    n, c, i, j = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in shape), indexing="ij")
    wave = torch.sin(a * (i + 1) + 0.7 * c + 0.3 * n) * torch.cos(b * (j + 1) - 0.5 * c)
    moire = torch.cos(d * (i + 1) * (j + 1) / 100 + c)
    return (amplitudes["C"] + amplitudes["A"] * wave + amplitudes["B"] * moire).float()


@given()
def arcface_irse50(meta: Meta, arrays: Arrays) -> Arrays:
    """Embedding, the same before normalisation, statistics after chosen blocks."""
    ours = ArcFace().state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in published_names(ours).items()}
    net = arcface_from_published(case_weights(meta, shapes))
    x = pattern(tuple(meta["input_shape"]), **meta["args"], amplitudes=meta["pattern_amplitudes"])
    with torch.no_grad():
        stages = net.stages(x)
        chosen = [stages[0], *(stages[block + 1] for block in meta["stages_after_blocks"])]
        return {
            "embedding": net(x),
            "pre_norm": net.raw(x),
            "stage_mean": torch.stack([s.mean() for s in chosen]),
            "stage_std": torch.stack([s.std() for s in chosen]),
        }


@given()
def id_preprocess(meta: Meta, arrays: Arrays) -> Arrays:
    """The face's part of portraits of several sizes."""
    found = {}
    for size in meta["sizes"]:
        x = pattern((1, 3, size, size), meta["a"], meta["b"], meta["d"], meta["pattern_amplitudes"])
        stride = 1 if size == 256 else meta["stored_stride_if_not_256"]
        found[f"pre{size}"] = face_part(x)[:, :, ::stride, ::stride]
    return found


ADAPTERS = {"facednerf/arcface_irse50": arcface_irse50, "facednerf/id_preprocess": id_preprocess}
