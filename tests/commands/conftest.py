# SPDX-License-Identifier: Apache-2.0
"""One small trained model of each method for all tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.running import train


@pytest.fixture(scope="session")
def fenerf_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "fenerf")


@pytest.fixture(scope="session")
def pigan_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "pigan", method="pigan")


@pytest.fixture(scope="session")
def eg3d_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "eg3d", "--max-steps", 1, method="eg3d")
