# SPDX-License-Identifier: Apache-2.0
"""python test_data/astronaut/make.py: crop, camera and mask of scikit-image's astronaut from drawing.json.

The drawing (outlines of the parts and 68 points) was made by hand on the enlarged photo; nothing here is learnt.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
SIZE = 512
FINE = 4  # outlines are drawn on a grid four times as fine; each pixel takes the class in its middle


def draw_mask(plan, polygons) -> np.ndarray:
    """(SIZE, SIZE) uint8 CelebAMask-HQ classes; later outlines lie over earlier ones."""
    from facelab.data.classes import CLASSES

    fine = Image.new("L", (SIZE * FINE, SIZE * FINE))
    pen = ImageDraw.Draw(fine)
    for name, outline in polygons:
        corners = plan.to_crop(np.array(outline)) * SIZE * FINE - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=CLASSES.index(name))
    return np.asarray(fine)[FINE // 2 :: FINE, FINE // 2 :: FINE]


def make(folder: Path) -> None:
    """Write astronaut.png (crop), astronaut.npy (camera), astronaut.json (report) and astronaut_mask.png."""
    import skimage.data

    from facelab.data.preprocess import FileLandmarks, prepare_photo
    from facelab.files import atomic_path

    with tempfile.TemporaryDirectory() as scratch:
        photo = Path(scratch) / "astronaut.png"
        Image.fromarray(skimage.data.astronaut()).save(photo)
        found = prepare_photo(photo, FileLandmarks(HERE / "drawing.json"))
        files = found.save(Path(scratch) / "out")
        for name in ("crop", "camera", "report"):
            with atomic_path(folder / files[name].name) as temporary:
                shutil.copyfile(files[name], temporary)
    assert found.plan is not None
    mask = draw_mask(found.plan, json.loads((HERE / "drawing.json").read_text())["polygons"])
    with atomic_path(folder / "astronaut_mask.png") as temporary:
        Image.fromarray(mask).save(temporary)
    print("\n".join(found.lines()))


if __name__ == "__main__":
    make(HERE)
