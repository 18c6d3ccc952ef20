# SPDX-License-Identifier: Apache-2.0
"""What run_gpu_tests.py reads off a report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

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

    def pytest_run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        report = next(word for word in command if word.startswith("--junitxml=")).partition("=")[2]
        Path(report).write_text(XML)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(run_gpu_tests, "RESULTS", tmp_path)
    monkeypatch.setattr(run_gpu_tests, "versions", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(run_gpu_tests.subprocess, "run", pytest_run)
    assert run_gpu_tests.main(["--marker", marker, "--", "-x"]) == 1
    assert asked[0][asked[0].index("-m", 3) + 1] == marker and asked[0][-1] == "-x"
    kept = json.loads((tmp_path / f"{marker}_tests_h200.json").read_text())
    assert (kept["marker"], kept["gpus"], kept["outcomes"]["failed"]) == (marker, 4, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if marker == "multi_gpu":
        with pytest.raises(SystemExit):
            run_gpu_tests.main(["--marker", marker])
