# SPDX-License-Identifier: Apache-2.0
"""Data: files -> :class:`Batch`. Nothing here knows a generator.

``CelebAMaskHQ``, ``Eg3dDataset`` and ``ImageFolder`` are data sets, ``ImageStream`` gives any of them a fixed
endless order, ``PrefetchStream`` reads ahead for the training loop, ``prepare`` makes data sets
from official downloads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facelab.data.batch import Batch
    from facelab.data.celebamask_hq import CelebAMaskHQ
    from facelab.data.eg3d_dataset import Eg3dDataset
    from facelab.data.image_folder import DatasetReport, ImageFolder, PictureSet
    from facelab.data.loader import ImageStream, PrefetchStream
    from facelab.data.samplers import ResumableSampler, rank_chunks

_HOMES = {
    "Batch": "batch",
    "CelebAMaskHQ": "celebamask_hq",
    "DatasetReport": "image_folder",
    "Eg3dDataset": "eg3d_dataset",
    "ImageFolder": "image_folder",
    "ImageStream": "loader",
    "PictureSet": "image_folder",
    "PrefetchStream": "loader",
    "ResumableSampler": "samplers",
    "rank_chunks": "samplers",
}
__all__ = [
    "Batch",
    "CelebAMaskHQ",
    "DatasetReport",
    "Eg3dDataset",
    "ImageFolder",
    "ImageStream",
    "PictureSet",
    "PrefetchStream",
    "ResumableSampler",
    "rank_chunks",
]


def __getattr__(name: str):
    """Import on first use: modules of the command line ask for parts of this package without wanting torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"facelab.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'facelab.data' has no attribute {name!r}")
