# SPDX-License-Identifier: Apache-2.0
"""What run_gpu_tests.py reads off a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import CHECKOUT

XML = """<testsuites><testsuite name="pytest">
<testcase classname="tests.cuda_ops.test_filters" name="test_a[x]" time="0.5"/>
<testcase classname="tests.cuda_ops.test_filters" name="test_b" time="1.5"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="" name="tests.data.test_lmdb" time="0"><skipped message="collection skipped"/></testcase>
<testcase classname="tests.nn.test_clip" name="test_c" time="0"><skipped message="needs a file"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_and_reasons_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from run_gpu_tests import summary

    (tmp_path / "junit.xml").write_text(XML)
    found = summary(tmp_path / "junit.xml")
    assert found["outcomes"] == {"passed": 1, "failed": 1, "skipped": 2} and found["seconds_of_all"] == 2.0
    assert found["tests"]["tests/cuda_ops/test_filters.py"] == {"passed": 1, "failed": 1}
    assert found["not_passed"][1]["test"] == "tests/data/test_lmdb.py"
    assert found["not_passed"][0] == {
        "test": "tests/cuda_ops/test_filters.py::test_b", "outcome": "failed", "why": "assert 1 == 2",
    }  # fmt: skip


@pytest.mark.parametrize("marker", ["gpu", "multi_gpu"])
def test_the_marker_chooses_the_tests_and_the_file(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import run_gpu_tests

    asked: list[list[str]] = []

    def pytest_run(command: list[str]) -> tuple[int, bool]:
        asked.append(command)
        report = next(word for word in command if word.startswith("--junitxml=")).partition("=")[2]
        Path(report).write_text(XML)
        return 1, False

    monkeypatch.setattr(run_gpu_tests, "RESULTS", tmp_path)
    monkeypatch.setattr(run_gpu_tests, "versions", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(run_gpu_tests, "interruptible", pytest_run)
    assert run_gpu_tests.main(["--marker", marker, "--", "-x"]) == 1
    chosen = asked[0][asked[0].index("-m", 3) + 1]
    assert chosen == {"gpu": "gpu and not multi_gpu"}.get(marker, marker) and asked[0][-1] == "-x"
    kept = json.loads((tmp_path / f"{marker}_tests_h200.json").read_text())
    assert (kept["marker"], kept["gpus"], kept["outcomes"]["failed"]) == (marker, 4, 1) and "interrupted" not in kept
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if marker == "multi_gpu":
        with pytest.raises(SystemExit):
            run_gpu_tests.main(["--marker", marker])


SLOW_TESTS = """
import subprocess, sys, time
from pathlib import Path

def test_quick():
    pass

def test_slow():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(__file__).with_name("begun").write_text(str(child.pid))
    time.sleep(60)

def test_never():
    pass
"""
MAIN = """
import sys
from pathlib import Path
import torch
import run_gpu_tests
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
run_gpu_tests.versions = lambda device: {"device": "NVIDIA H200"}
run_gpu_tests.CHOSEN["gpu"] = "not gpu"
run_gpu_tests.ROOT = Path(sys.argv[1])
sys.exit(run_gpu_tests.main(["--out", str(run_gpu_tests.ROOT / "kept.json"), "--", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("more", [(), ("-n", "1")], ids=["alone", "workers"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ended_before_an_interrupt_is_kept(number: int, more: tuple[str, ...], tmp_path: Path) -> None:
    if more:
        pytest.importorskip("xdist")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_them.py").write_text(SLOW_TESTS)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(CHECKOUT)])},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    begun, end = tmp_path / "tests" / "begun", time.monotonic() + 60
    while not (begun.exists() and begun.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(30) == 130
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["interrupted"] is True and kept["outcomes"] == {"passed": 1}
    assert list(kept["tests"].values()) == [{"passed": 1}] and kept["not_passed"] == []
    gone = time.monotonic() + 10
    while running(int(begun.read_text())) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not running(int(begun.read_text()))


def running(process: int) -> bool:
    """False for one that has ended, waited for or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
