# SPDX-License-Identifier: Apache-2.0
"""Label encodings, palette, class remap and FENeRF's mIoU."""

from __future__ import annotations

from torch import Tensor

from facelab.data.labels import colorize, one_hot, one_hot_pm1, remap_sofgan
from facelab.metrics.segmentation import mean_iou
from tests.golden.harness import Arrays, Meta


def labels(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    classes = arrays["in_class_map"].long()
    predicted = arrays["in_label_scores"].argmax(dim=1)
    return {
        "out_one_hot18_pm1": one_hot_pm1(classes[None])[0],
        "out_one_hot19": one_hot(classes[None])[0],
        "out_color": colorize(predicted).float(),
        "out_sofgan_to_celeba": remap_sofgan(arrays["in_sofgan_class_map"].long()),
        "out_miou_original": mean_iou(predicted, classes.expand_as(predicted), kind="original"),
    }


ADAPTERS = {"fenerf/labels": labels}
