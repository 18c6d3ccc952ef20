# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need a GPU, or several, and keeps their outcomes, with what they depend on, as JSON.

    python tests/benchmarks/run_gpu_tests.py [--marker gpu|multi_gpu] [--out FILE] [-- PYTEST ARGUMENTS]

The file is ``tests/benchmarks/results/<marker>_tests_<device>.json``. opcheck, gradcheck and gradgradcheck of the
kernels are among the tests; ``outcomes`` counts, ``tests`` has a line for each file, and what failed or was skipped
stands with its reason. Ctrl-C or SIGTERM (``timeout``) ends pytest in order; what ended before is kept, with
``"interrupted": true``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
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
CHOSEN = {"gpu": "gpu and not multi_gpu", "multi_gpu": "multi_gpu"}  # marker -> pytest's -m; no test is in both
PATIENCE = 60.0  # seconds that an interrupted pytest may take to write its report


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """(passed, failed, error or skipped; the first line of why) of one test of a JUnit file."""
    for kind, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            lines = (found.get("message") or found.text or "").strip().splitlines()
            return name, lines[0] if lines else ""
    return "passed", ""


def summary(report: Path) -> dict[str, Any]:
    """What a JUnit file says: counts, counts by file, and each test that did not pass.

    A test that was interrupted stands there without a name and is left out.
    """
    by_file: dict[str, Counter[str]] = {}
    others, seconds = [], 0.0
    for case in ElementTree.parse(report).iter("testcase"):
        if not case.get("name"):
            continue
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


def interruptible(command: Sequence[str]) -> tuple[int, bool]:
    """Run pytest in a session of its own -> (exit status, whether it was interrupted).

    SIGINT and SIGTERM are passed on as one SIGINT, after which pytest writes its report; another one more than a second
    later (``timeout`` sends two at once), or :data:`PATIENCE`, kills it. What its tests had started is ended after it.
    """
    asked: list[float] = []
    before = {
        number: signal.signal(number, lambda *_: asked.append(time.monotonic()))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    process, told = subprocess.Popen(command, cwd=ROOT, start_new_session=True), False
    try:
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            if asked and not told:
                process.send_signal(signal.SIGINT)
                told = True
            elif asked and (asked[-1] > asked[0] + 1 or time.monotonic() > asked[0] + PATIENCE):
                process.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode, bool(asked)


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
        command = [sys.executable, "-m", "pytest", "-q", "-m", CHOSEN[options.marker]]
        command += [f"--junitxml={report}", "tests"]
        code, interrupted = interruptible([*command, *options.pytest])
        if not report.is_file():
            parser.error(f"pytest ended with {code} and left no report")
        found = {"benchmark": f"{options.marker}_tests", "marker": options.marker, "gpus": gpus, **about}
        found |= {"interrupted": True} if interrupted else {}
        keep({**found, **summary(report)}, options.out or default_name(options.marker, about["device"]))
    return 130 if interrupted else code


if __name__ == "__main__":
    sys.exit(main())
