# SPDX-License-Identifier: Apache-2.0
"""The set-up behind make: one sentence for an unfit Python, one installation per pyproject.toml; and the file rules."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.conftest import CHECKOUT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / ".ci" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands:
    """Stands in for subprocess: remembers commands, makes what ``python -m venv`` would make."""

    PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT

    def __init__(self, root: Path, fail: str = "") -> None:
        self.root, self.failing, self.seen = root, fail, []

    def run(self, command: list[str], **_: object) -> SimpleNamespace:
        kind = command[2] if command[1] == "-m" else "cleanup"
        self.seen.append((kind, command[-1]))
        if kind == self.failing:
            return SimpleNamespace(returncode=1, stdout=b"first\nNo module named ensurepip")
        if kind == "venv":
            (self.root / ".venv" / "bin").mkdir(parents=True)
            (self.root / ".venv" / "bin" / "python").write_text("")
        return SimpleNamespace(returncode=0, stdout=b"")


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """make_venv.py at work in an empty checkout, with a fake pip."""

    def make(extra: str = "", fail: str = "") -> tuple[int, list[tuple[str, str]]]:
        module = load("make_venv")
        module.ROOT, module.VENV = str(tmp_path), str(tmp_path / ".venv")
        module.subprocess = Commands(tmp_path, fail)
        monkeypatch.setattr(sys, "argv", ["make_venv.py", *filter(None, [extra])])
        return module.main(), module.subprocess.seen

    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / "setup.py").write_text("")
    return make


def test_installs_once_per_pyproject(maker, tmp_path: Path) -> None:
    assert maker() == (0, [("venv", str(tmp_path / ".venv")), ("pip", ".")])
    assert maker() == (0, [])
    assert maker("dev") == (0, [("pip", ".[dev]")])
    assert maker("dev") == maker() == (0, [])
    (tmp_path / "pyproject.toml").write_text("two")
    assert maker("dev") == (0, [("pip", ".[dev]")])
    assert maker() == (0, [])  # dev holds all of the core


def test_a_failed_installation_is_tried_again(maker, capfd: pytest.CaptureFixture[str]) -> None:
    assert maker(fail="pip")[0] == 2
    assert "pip could not install facelab" in capfd.readouterr().err
    assert maker() == (0, [("pip", ".")])


def test_python_without_venv_gets_the_remedy(maker, capfd: pytest.CaptureFixture[str]) -> None:
    assert maker(fail="venv")[0] == 2
    error = capfd.readouterr().err
    assert "apt install python3." in error and "NO_VENV=1" in error and "No module named ensurepip" in error


def test_old_python_gets_a_sentence(maker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    assert maker() == (2, [])
    assert capfd.readouterr().err.strip() == (
        "error: Python 3.8 is too old, facelab needs 3.10 or newer; name another one: make PYTHON=python3.12 ..."
    )


def test_make_describes_itself() -> None:
    text = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    for word in ("quickstart", "test", "lint", "bench", "NO_VENV", "PYTHON"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("facelab/a.py", "# SPDX-License-Identifier: Apache-2.0\n", ""),
        ("facelab/a.py", "import os\n", "facelab/a.py: the first line must hold"),
        ("cuda_ops/csrc/a.cu", "int x;\n", "the first line must hold"),
        ("facelab/a.py", "# SPDX-License-Identifier: Apache-2.0\n" * 501, "501 lines, the limit is 500"),
        ("facelab/a.py", f"# SPDX-License-Identifier: Apache-2.0\n{'<' * 7} HEAD\n", "facelab/a.py:2: merge leftover"),
        ("facelab/a.bin", "x" * 600_000, "0.6 MiB, the limit here is 0.5"),
        ("networks/a.bin", "x" * 600_000, ""),
        ("notes.txt", "no header needed", ""),
    ],
)
def test_file_rules(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = load("check_files").problems_of(path, tmp_path)
    assert (len(found) == 1 and problem in found[0]) if problem else found == []
