# SPDX-License-Identifier: Apache-2.0
"""Data: files -> :class:`Batch`. Nothing here knows a generator.

``CelebAMaskHQ``, ``Eg3dDataset``, ``ImageFolder`` and ``LmdbPictures`` are data sets, ``WithThumbnails`` adds
thumbnails to any of them (``open_pictures`` opens LMDBs and folders so), ``ImageStream`` gives any of them a fixed
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
    from facelab.data.lmdb_dataset import LmdbPictures
    from facelab.data.loader import ImageStream, PrefetchStream
    from facelab.data.samplers import ResumableSampler, rank_chunks
    from facelab.data.thumbnails import WithThumbnails, open_pictures

_HOMES = {
    "Batch": "batch",
    "CelebAMaskHQ": "celebamask_hq",
    "DatasetReport": "image_folder",
    "Eg3dDataset": "eg3d_dataset",
    "ImageFolder": "image_folder",
    "ImageStream": "loader",
    "LmdbPictures": "lmdb_dataset",
    "PictureSet": "image_folder",
    "PrefetchStream": "loader",
    "ResumableSampler": "samplers",
    "WithThumbnails": "thumbnails",
    "open_pictures": "thumbnails",
    "rank_chunks": "samplers",
}
__all__ = [
    "Batch",
    "CelebAMaskHQ",
    "DatasetReport",
    "Eg3dDataset",
    "ImageFolder",
    "ImageStream",
    "LmdbPictures",
    "PictureSet",
    "PrefetchStream",
    "ResumableSampler",
    "WithThumbnails",
    "open_pictures",
    "rank_chunks",
]


def __getattr__(name: str):
    """Import on first use: modules of the command line ask for parts of this package without wanting torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"facelab.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'facelab.data' has no attribute {name!r}")
