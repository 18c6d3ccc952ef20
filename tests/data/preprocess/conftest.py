# SPDX-License-Identifier: Apache-2.0
"""The astronaut as a photo with hand-made points, and a detector that gives what it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facelab.data.preprocess.faces import Face
from facelab.errors import UserError
from tests.conftest import CHECKOUT

ASTRONAUT = CHECKOUT / "test_data" / "astronaut"


class FixedDetector:
    """Always the same faces; ``looks`` is False as for points from files."""

    name = "fixed"
    looks = False

    def __init__(self, faces: list[Face]) -> None:
        self.faces = faces

    def detect(self, image: np.ndarray, name: str = "") -> list[Face]:
        return list(self.faces)


@pytest.fixture
def astronaut(tmp_path: Path) -> Path:
    """The photo as a file."""
    data = pytest.importorskip("skimage.data")
    path = tmp_path / "photos" / "astronaut.png"
    path.parent.mkdir()
    Image.fromarray(data.astronaut()).save(path)
    return path


@pytest.fixture(scope="session")
def mtcnn():
    """MTCNN with the installed package's weights."""
    from facelab.data.preprocess.detectors import MtcnnDetector

    try:
        return MtcnnDetector()
    except UserError as error:
        pytest.skip(str(error))
