# SPDX-License-Identifier: Apache-2.0
"""test_data/README.md says of every file where it comes from, and of no other."""

from __future__ import annotations

import re

from tests.conftest import CHECKOUT

DATA = CHECKOUT / "test_data"


def listed() -> list[str]:
    """The first column of the table as patterns of paths: ``golden/a, golden/b: x_*.pth`` stands for two of them."""
    lines = (DATA / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1].strip() for line in lines if re.match(r"\| (golden|astronaut)", line)]
    patterns = []
    for cell in cells:
        folders, _, name = cell.partition(": ")
        patterns += [f"{folder}/{name}" if name else folder for folder in folders.split(", ")]
    return patterns


def test_everything_is_listed_and_nothing_else() -> None:
    files = [path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    plain = {path for path in files if path.parts[0] == "golden" and path.suffix in (".json", ".npz")}
    covered = set()
    for pattern in listed():
        folder = (DATA / pattern).is_dir()
        of_it = {
            p for p in files if (p.is_relative_to(pattern) if folder else p.match(pattern) or p.match(f"{pattern}.*"))
        }
        assert of_it, f"test_data/README.md lists {pattern}, which is not there"
        covered |= of_it & plain if folder and pattern.startswith("golden") else of_it
    assert sorted(map(str, set(files) - covered)) == ["README.md"]
