# SPDX-License-Identifier: Apache-2.0
"""Wrong options are one line in every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from facelab.errors import UserError
from tests.commands.running import COMMANDS, command_of, invoke


@pytest.mark.parametrize("name", ["compute_metrics", "export_model", "model_card", "quickstart", "weights"])
def test_the_other_commands_have_one_line_errors(name: str) -> None:
    result = CliRunner().invoke(command_of(name), ["--no-such-option"])
    assert result.exit_code == 2 and result.stderr.startswith("error: No such option"), name
    assert result.stderr.count("\n") == 1 and "see --help" in result.stderr


def test_subcommands_too() -> None:
    weights = command_of("weights")
    for arguments in (["lst"], ["list", "--no-such-option"], ["import"]):
        result = CliRunner().invoke(weights, arguments)
        assert result.exit_code == 2 and result.stderr.startswith("error: "), arguments
        assert result.stderr.count("\n") == 1
    shown = CliRunner().invoke(weights, [])
    assert "Usage:" in shown.output and "error:" not in shown.output


def test_tracebacks_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["render_images", tmp_path / "nothing"]
    assert invoke(*arguments).exit_code == 2
    monkeypatch.setenv("FACELAB_TRACEBACK", "1")
    with pytest.raises(UserError, match="no checkpoint at"):
        invoke(*arguments)


@pytest.mark.parametrize("name", ["cnerf_synthetic_64", "eg3d_synthetic_128", "fenerf_synthetic_64"])
def test_a_misspelt_bundled_model_is_recognised(name: str) -> None:
    result = invoke("render_images", name.replace("synthetic", "syntetic"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"Did you mean '{name}'?" in result.stderr


def test_every_command_has_one_line_errors() -> None:
    for name in COMMANDS:
        result = invoke(name, "--no-such-option")
        assert result.exit_code == 2 and result.stderr.startswith("error: No such option"), name
        assert result.stderr.count("\n") == 1 and "see --help" in result.stderr
