# SPDX-License-Identifier: Apache-2.0
"""Devices, markers that skip with their reason, and the few fixtures that every package needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), help="run tests with a `device` on this one only")
    parser.addoption("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of tests that take `dtype`")
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, reason in skip_reasons(config.getoption("--slow")).items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        wanted = config.getoption("--device")
        device = getattr(item, "callspec", None) and item.callspec.params.get("device")  # type: ignore[attr-defined]
        if wanted and device and device != wanted:
            item.add_marker(pytest.mark.skip(reason=f"--device {wanted}"))


def skip_reasons(slow: bool = False) -> dict[str, str]:
    """Marker -> why tests that carry it cannot run here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = {
        "gpu": "" if gpus else "needs a CUDA GPU, none is visible",
        "multi_gpu": "" if gpus > 1 else f"needs two CUDA GPUs, {gpus} visible",
        "slow": "" if slow else "slow: run it with --slow",
        "weights": _missing_folder("FACELAB_WEIGHTS_DIR", "official weight files"),
        "shared": _missing_folder("FACELAB_REAL_DATA", "real pictures"),
    }
    return {marker: reason for marker, reason in reasons.items() if reason}


def _missing_folder(variable: str, what: str) -> str:
    value = os.environ.get(variable)
    if not value:
        return f"needs {what}: set {variable}"
    return "" if Path(value).is_dir() else f"needs {what}: {variable}={value} is no folder"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one (skipped visibly elsewhere)."""
    return torch.device(request.param)


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Modules are initialised from torch's global generator: give each test the same one."""
    torch.manual_seed(0)


@pytest.fixture
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT


@pytest.fixture
def real_data() -> Path:
    """The folder of real pictures; tests that take it are marked ``shared``."""
    reason = _missing_folder("FACELAB_REAL_DATA", "real pictures")
    if reason:
        pytest.skip(reason)
    return Path(os.environ["FACELAB_REAL_DATA"])


@pytest.fixture
def weights_dir() -> Path:
    """The folder of official weight files; tests that take it are marked ``weights``."""
    reason = _missing_folder("FACELAB_WEIGHTS_DIR", "official weight files")
    if reason:
        pytest.skip(reason)
    return Path(os.environ["FACELAB_WEIGHTS_DIR"])
