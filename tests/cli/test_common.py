# SPDX-License-Identifier: Apache-2.0
"""What all commands share: how warnings look."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
from torch import nn

from cuda_ops import dispatch
from facelab.cli.common import friendly
from facelab.inference.fast import accelerate


class Generator(nn.Linear):
    """As much of a generator as a scene needs."""

    def scene(self, codes: Any) -> Any:
        return codes


def shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """As Python does where nothing collects warnings, which pytest does."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_warnings_of_commands_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.forget_warnings()
    monkeypatch.setattr(warnings, "showwarning", shown)
    before = warnings.formatwarning

    @friendly
    def command() -> None:
        accelerate(Generator(1, 1)).scene(())  # on a CPU
        warnings.warn("of another program", UserWarning, stacklevel=1)

    command()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: fast rendering: CUDA graphs need a CUDA GPU, on cpu pictures are drawn without them"
    assert "test_common.py:" in said[1] and "UserWarning: of another program" in said[1]
    assert warnings.formatwarning is before
