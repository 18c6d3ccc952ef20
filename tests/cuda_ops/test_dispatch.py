# SPDX-License-Identifier: Apache-2.0
"""FACELAB_OPS: read at use, one warning, clear errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from cuda_ops import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    dispatch.forget_warnings()
    yield
    dispatch.forget_warnings()


def test_fallback_warns_once_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "auto")
    with pytest.warns(RuntimeWarning, match="some_op: the plain fp32 path runs.*on the CPU"):
        assert dispatch.choose("some_op", CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("some_op", CPU) == "reference"
    with pytest.warns(RuntimeWarning, match="the width is 5"):
        dispatch.choose("some_op", CPU, "the width is 5")


def test_reference_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("some_op", CPU) == "reference"


@pytest.mark.parametrize("demanded", ["cuda", "triton"])
def test_a_demand_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch, demanded: str) -> None:
    monkeypatch.setenv("FACELAB_OPS", demanded)
    with pytest.raises(RuntimeError, match=f"FACELAB_OPS={demanded} but some_op has no kernel here: the tensors"):
        dispatch.choose("some_op", CPU)


def test_a_misspelt_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "tritn")
    with pytest.raises(ValueError, match="'tritn', expected one of auto, cuda, triton, reference"):
        dispatch.mode()


def test_the_variable_is_read_at_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "reference")
    assert dispatch.mode() == "reference"
    monkeypatch.setenv("FACELAB_OPS", "AUTO")
    assert dispatch.mode() == "auto"


def test_importing_compiles_and_imports_nothing() -> None:
    code = (
        "import sys, cuda_ops.film_siren, cuda_ops.film_siren_backward, cuda_ops.grid_lookup;"
        "sys.exit(any(m in sys.modules for m in ('cuda_ops.siren_kernels', 'cuda_ops.grid_kernels', 'facelab')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
