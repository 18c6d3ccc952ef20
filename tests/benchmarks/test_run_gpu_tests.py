# SPDX-License-Identifier: Apache-2.0
"""What run_gpu_tests.py reads off a report."""

from __future__ import annotations

from pathlib import Path

import pytest

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
