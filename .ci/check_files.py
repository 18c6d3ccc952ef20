# SPDX-License-Identifier: Apache-2.0
"""python .ci/check_files.py [FILE ...]: licence headers, size limits and merge leftovers; all tracked files by default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "SPDX-License-Identifier: Apache-2.0"
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}
MAX_LINES = 500
MAX_BYTES = {"networks": 12 * 2**20, "docs": 8 * 2**20, "test_data": 4 * 2**20}
MAX_BYTES_ELSEWHERE = 512 * 2**10
MAX_TOTAL = 56 * 2**20


def problems_of(path: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with one file of the repository, each in one line."""
    name = path.relative_to(root)
    size = path.stat().st_size
    limit = MAX_BYTES.get(name.parts[0], MAX_BYTES_ELSEWHERE)
    found = [f"{name}: {size / 2**20:.1f} MiB, the limit here is {limit / 2**20:.1f}"] if size > limit else []
    if path.suffix not in SOURCES:
        return found
    lines = path.read_text(encoding="utf-8").splitlines()
    if HEADER not in "\n".join(lines[:2]):
        found.append(f"{name}: the first line must hold '{HEADER}'")
    if len(lines) > MAX_LINES:
        found.append(f"{name}: {len(lines)} lines, the limit is {MAX_LINES}; split it")
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    found += [f"{name}:{n}: merge leftover" for n, line in enumerate(lines, 1) if line.startswith(marks)]
    return found


def tracked_files() -> list[Path]:
    """The files git knows, without those deleted in the working tree; without git, nothing."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def main(names: list[str]) -> int:
    files = [Path(name).resolve() for name in names] or tracked_files()
    found = [line for path in files for line in problems_of(path)]
    total = sum(path.stat().st_size for path in tracked_files())
    if total > MAX_TOTAL:
        found.append(f"all files together: {total / 2**20:.1f} MiB, the limit is {MAX_TOTAL / 2**20:.0f}")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
