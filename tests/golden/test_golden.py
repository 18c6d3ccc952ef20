# SPDX-License-Identifier: Apache-2.0
"""Every golden case of the folder passes, is planned with a reason, or fails."""

from __future__ import annotations

import pytest

from . import harness

FOLDER = harness.golden_folder()
CASES = harness.find_cases(FOLDER)
REGISTRY = harness.collect()


def test_folder_has_cases() -> None:
    assert CASES, f"no golden case in {FOLDER}: set FACELAB_GOLDEN_DIR to a folder with <method>/<case>.json"


def test_adapter_modules_are_collected() -> None:
    assert not REGISTRY.broken, "\n".join(f"{name}: {why}" for name, why in REGISTRY.broken.items())


def test_no_case_is_both_planned_and_done() -> None:
    stale = sorted(set(REGISTRY.adapters) & set(REGISTRY.planned))
    assert not stale, f"these have an adapter: remove them from planned.yaml: {stale}"


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    reason = REGISTRY.plan(case)
    if reason is not None:
        pytest.skip(f"planned: {reason}")
    if case not in REGISTRY.adapters:
        pytest.fail(f"{case} has neither an adapter in tests/golden/adapters nor an entry in tests/golden/planned.yaml")
    harness.run_case(case, REGISTRY.adapters[case], FOLDER)
