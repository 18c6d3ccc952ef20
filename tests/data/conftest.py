# SPDX-License-Identifier: Apache-2.0
"""A small picture set on disk, and where golden cases and real pictures lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.data.pictures import write_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "set")


@pytest.fixture
def golden_dir() -> Path:
    default = Path(__file__).parents[2] / "test_data" / "golden"
    return Path(os.environ.get("FACELAB_GOLDEN_DIR", default))


@pytest.fixture
def real_pairs() -> Path:
    root = os.environ.get("FACELAB_REAL_DATA")
    if not root:
        pytest.skip("FACELAB_REAL_DATA is not set: no real pictures")
    return Path(root) / "celebamask_pairs"
