# SPDX-License-Identifier: Apache-2.0
"""convert_checkpoint looks where it may write before it reads a source that may be gigabytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from facelab.cli.convert import convert_checkpoint


@pytest.mark.parametrize("name", ["file/models/m.safetensors", "file/models", "file"])
def test_a_file_where_a_folder_is_needed(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("here before")
    done = CliRunner().invoke(convert_checkpoint, ["auto", str(tmp_path / "no_such_source.pth"), str(tmp_path / name)])
    assert done.exit_code == 2 and f"cannot write {tmp_path / 'file'}: a file stands where a folder" in done.output


def test_another_ending(tmp_path: Path) -> None:
    done = CliRunner().invoke(convert_checkpoint, ["auto", str(tmp_path / "no.pth"), str(tmp_path / "model.pth")])
    assert done.exit_code == 2 and "rename it" in done.output and not list(tmp_path.iterdir())
    assert "model.pth: expected a name that ends in .safetensors, or a folder" in done.output


def test_a_folder_of_the_models_name(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    done = CliRunner().invoke(convert_checkpoint, ["auto", str(tmp_path / "no.pth"), str(tmp_path / "m.safetensors")])
    assert done.exit_code == 2 and "m.safetensors: a folder stands where a file is needed" in done.output


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def denied(dir: Path) -> None:  # as tempfile names it; permissions do not bind every user that runs tests
        asked.append(dir)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    done = CliRunner().invoke(convert_checkpoint, ["auto", str(tmp_path / "no.pth"), str(tmp_path / "new" / "models")])
    assert done.exit_code == 2 and f"cannot write {tmp_path}: permission denied" in done.output
    assert asked == [tmp_path] and not list(tmp_path.iterdir())


def test_nothing_is_made_before_the_source_is_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(convert_checkpoint, ["auto", str(tmp_path / "no.pth"), str(tmp_path / "new" / "models")])
    assert done.exit_code == 2 and "no.pth" in done.output and not list(tmp_path.iterdir())
