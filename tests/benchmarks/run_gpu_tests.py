# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need a GPU and keeps their outcomes, with what they depend on, as JSON.

    python tests/benchmarks/run_gpu_tests.py [--out tests/benchmarks/results/gpu_tests_h200.json] [-- PYTEST ARGUMENTS]

opcheck, gradcheck and gradgradcheck of the kernels are among them; ``outcomes`` counts, ``tests`` has a line for each
file, and what failed or was skipped stands with its reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import keep, versions

ROOT = Path(__file__).resolve().parents[2]


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """(passed, failed, error or skipped; the first line of why) of one test of a JUnit file."""
    for kind, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            lines = (found.get("message") or found.text or "").strip().splitlines()
            return name, lines[0] if lines else ""
    return "passed", ""


def summary(report: Path) -> dict[str, Any]:
    """What a JUnit file says: counts, counts by file, and each test that did not pass."""
    by_file: dict[str, Counter[str]] = {}
    others, seconds = [], 0.0
    for case in ElementTree.parse(report).iter("testcase"):
        how, why = outcome(case)
        whole = not case.get("classname")  # a file that was not collected stands under its own name
        module = (case.get("name" if whole else "classname") or "").replace(".", "/") + ".py"
        by_file.setdefault(module, Counter())[how] += 1
        seconds += float(case.get("time", 0))
        if how != "passed":
            test = module if whole else f"{module}::{case.get('name')}"
            others.append({"test": test, "outcome": how, "why": why})
    total = sum(by_file.values(), Counter())
    tests = {module: dict(counts) for module, counts in sorted(by_file.items())}
    return {"outcomes": dict(total), "seconds_of_all": round(seconds, 1), "tests": tests, "not_passed": others}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("pytest", nargs="*", help="more arguments of pytest, behind --", metavar="ARGUMENT")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, none is visible")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "tests", *options.pytest]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.is_file():
            parser.error(f"pytest ended with {code} and left no report")
        keep({"benchmark": "gpu_tests", **versions(torch.device("cuda")), **summary(report)}, options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
