# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need a GPU, or several, and keeps their outcomes, with what they depend on, as JSON.

    python tests/benchmarks/run_gpu_tests.py [--marker gpu|multi_gpu] [--out FILE] [-- PYTEST ARGUMENTS]

The file is ``tests/benchmarks/results/<marker>_tests_<device>.json``. opcheck, gradcheck and gradgradcheck of the
kernels are among the tests; ``outcomes`` counts, ``tests`` has a line for each file, and what failed or was skipped
stands with its reason.
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
RESULTS = ROOT / "tests" / "benchmarks" / "results"
GPUS = {"gpu": 1, "multi_gpu": 2}  # marker -> how many it needs


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


def default_name(marker: str, device: str) -> Path:
    """The file of a marker's outcomes on a device.

    >>> default_name("multi_gpu", "NVIDIA H200").name, default_name("gpu", "NVIDIA A100-SXM4-80GB").name
    ('multi_gpu_tests_h200.json', 'gpu_tests_a100-sxm4-80gb.json')
    """
    words = device.removeprefix("NVIDIA ").lower().replace("/", " ").split()
    return RESULTS / f"{marker}_tests_{'_'.join(words)}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marker", choices=tuple(GPUS), default="gpu", help="tests that carry it [gpu]")
    parser.add_argument("--out", type=Path, help="JSON file to write, see above")
    parser.add_argument("pytest", nargs="*", help="more arguments of pytest, behind --", metavar="ARGUMENT")
    options = parser.parse_args(arguments)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < GPUS[options.marker]:
        parser.error(f"--marker {options.marker} needs CUDA GPUs: {GPUS[options.marker]} or more, {gpus} visible")
    about = versions(torch.device("cuda"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", options.marker, f"--junitxml={report}", "tests"]
        code = subprocess.run([*command, *options.pytest], cwd=ROOT, check=False).returncode
        if not report.is_file():
            parser.error(f"pytest ended with {code} and left no report")
        found = {"benchmark": f"{options.marker}_tests", "marker": options.marker, "gpus": gpus, **about}
        keep({**found, **summary(report)}, options.out or default_name(options.marker, about["device"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
