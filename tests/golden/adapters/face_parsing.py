# SPDX-License-Identifier: Apache-2.0
"""Golden case of SofGAN's face parser: our BiSeNet with the published names passed through its loader."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.nn.pretrained.face_parsing import bisenet_from_published
from tests.golden.harness import Arrays, Meta, case_weights

TRUNK = {1: (64, 64, 1), 2: (64, 128, 2), 3: (128, 256, 2), 4: (256, 512, 2)}  # stage -> inputs, outputs, stride


def parser_bisenet(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    classes = _classes(meta)
    net = bisenet_from_published(case_weights(meta, published_shapes(classes)))
    with torch.no_grad():
        scores = net(arrays["in_image"])
    best = scores.argmax(dim=1)
    return {
        "out_logits": scores[:, :, ::2, ::2],
        "out_argmax_hist": torch.bincount(best.flatten(), minlength=classes).float() / best.numel(),
    }


def _classes(meta: Meta) -> int:
    return int(meta["outputs"]["out_argmax_hist"]["shape"][0])


def published_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the published file, without the counters of batch normalisation."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)

    def conv_norm(name: str, inputs: int, outputs: int, kernel: int) -> None:
        conv(f"{name}.conv", inputs, outputs, kernel)
        norm(f"{name}.bn", outputs)

    conv("cp.resnet.conv1", 3, 64, 7)
    norm("cp.resnet.bn1", 64)
    for stage, (inputs, outputs, stride) in TRUNK.items():
        for block, width in enumerate((inputs, outputs)):
            name = f"cp.resnet.layer{stage}.{block}"
            conv(f"{name}.conv1", width, outputs, 3)
            norm(f"{name}.bn1", outputs)
            conv(f"{name}.conv2", outputs, outputs, 3)
            norm(f"{name}.bn2", outputs)
            if block == 0 and (stride > 1 or inputs != outputs):
                conv(f"{name}.downsample.0", inputs, outputs, 1)
                norm(f"{name}.downsample.1", outputs)
    for scale, inputs in ((16, 256), (32, 512)):
        conv_norm(f"cp.arm{scale}.conv", inputs, 128, 3)
        conv(f"cp.arm{scale}.conv_atten", 128, 128, 1)
        norm(f"cp.arm{scale}.bn_atten", 128)
        conv_norm(f"cp.conv_head{scale}", 128, 128, 3)
    conv_norm("cp.conv_avg", 512, 128, 1)
    conv_norm("ffm.convblk", 256, 256, 1)
    conv("ffm.conv1", 256, 64, 1)
    conv("ffm.conv2", 64, 256, 1)
    for end, inputs, hidden in (("", 256, 256), ("16", 128, 64), ("32", 128, 64)):
        conv_norm(f"conv_out{end}.conv", inputs, hidden, 3)
        conv(f"conv_out{end}.conv_out", hidden, classes, 1)
    return shapes


ADAPTERS = {"fenerf/parser_bisenet": parser_bisenet}
