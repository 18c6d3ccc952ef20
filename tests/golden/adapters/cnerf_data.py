# SPDX-License-Identifier: Apache-2.0
"""CNeRF's training samples: picture, thumbnail and region channels, plain and mirrored."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from facelab.data.regions import colour_regions, fuse_regions
from facelab.data.thumbnails import open_pictures

from ..harness import Arrays, Meta


def dataset_item(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Through files and the data set; the widening is the original's (``reference``), the rest our default."""
    sizes = meta["config"]
    with tempfile.TemporaryDirectory() as folder:
        for name, array in (("images", arrays["in_image"]), ("masks", arrays["in_label_map"])):
            (Path(folder) / name).mkdir()
            Image.fromarray(array.numpy().astype(np.uint8)).save(Path(folder) / name / "00000.png")
        pictures = open_pictures(folder, sizes["resolution"], sizes["thumb_resolution"], masks="auto")
        found = {}
        for kind, flip in (("plain", False), ("flip", True)):
            batch = pictures.item(0, flip)
            assert batch.label_map is not None
            found[f"out_{kind}_img"] = batch.float_image()[0]
            found[f"out_{kind}_thumb"] = batch.float_thumbnail()[0]
            found[f"out_{kind}_mask"] = fuse_regions(batch.label_map, reference=True)[0]
    return found | {"out_colours": colour_regions(arrays["in_seg_for_colour"])}


ADAPTERS = {"cnerf/dataset_item": dataset_item}
