# SPDX-License-Identifier: Apache-2.0
"""The golden harness itself: it must be able to fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from . import harness

META = {"rtol": 0.0, "atol": 1e-3}
ARRAYS = {"in_x": torch.zeros(2), "out_y": torch.ones(2, 3), "ema_state/w": torch.zeros(1)}
GOOD = {"out_y": torch.ones(2, 3) + 5e-4, "ema_state/w": np.zeros(1, np.float32)}


def test_equal_outputs_pass_and_inputs_are_not_expected() -> None:
    harness.compare(META, ARRAYS, GOOD)
    assert harness.expected_outputs(ARRAYS) == ["out_y", "ema_state/w"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_y": torch.ones(2, 3) + 5e-3}, "6 of 6 values differ"),
        ({"out_y": torch.ones(6)}, r"shape \(6,\), expected \(2, 3\)"),
        ({"out_y": torch.ones(1, 3)}, "shape"),
        ({"out_y": torch.full((2, 3), torch.nan)}, "NaN"),
        ({"out_y": torch.full((2, 3), torch.inf)}, "differ"),
        ({"ema_state/w": torch.ones(1)}, "ema_state/w: 1 of 1"),
    ],
)
def test_wrong_outputs_fail(change: dict, words: str) -> None:
    with pytest.raises(harness.Mismatch, match=words):
        harness.compare(META, ARRAYS, {**GOOD, **change})


def test_missing_output_fails() -> None:
    with pytest.raises(harness.Mismatch, match="ema_state/w: the adapter did not return it"):
        harness.compare(META, ARRAYS, {"out_y": GOOD["out_y"]})


def test_case_without_outputs_fails() -> None:
    with pytest.raises(harness.Mismatch, match="no expected output"):
        harness.compare(META, {"in_x": torch.zeros(1)}, {})


def test_adapter_does_not_see_the_answers(tmp_path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "c.v2.json").write_text(json.dumps({"config": {"gain": 2.0}}))
    np.savez(folder / "c.v2.npz", in_x=np.float32(3), out_y=np.float32(6))
    seen = {}

    def adapter(meta, arrays):
        seen.update(meta=meta, arrays=arrays)
        return {"out_y": arrays["in_x"] * meta["config"]["gain"]}

    assert harness.find_cases(tmp_path) == ["m/c.v2"]
    harness.run_case("m/c.v2", adapter, tmp_path)
    assert set(seen["arrays"]) == {"in_x"} and seen["arrays"]["in_x"].shape == ()
    assert seen["meta"]["folder"] == folder


def test_adapter_names_its_inputs_where_names_do_not_tell(tmp_path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "c.json").write_text("{}")
    np.savez(folder / "c.npz", x0=np.float32(3), x1=np.float32(4), y=np.float32(7))
    seen = []

    @harness.given("x*")
    def adapter(meta, arrays):
        seen.append(set(arrays))
        return {"y": arrays["x0"] + arrays["x1"]}

    harness.run_case("m/c", adapter, tmp_path)
    assert seen == [{"x0", "x1"}]
    with pytest.raises(harness.Mismatch, match="y: 1 of 1"):
        harness.run_case("m/c", harness.given("x*")(lambda meta, arrays: {"y": 8.0}), tmp_path)
    np.savez(folder / "d.npz", table=np.array([[1.0, 2.0, 3.0]], np.float32))
    (folder / "d.json").write_text("{}")

    @harness.given(partly={"table": 2})
    def adapter_of_columns(meta, arrays):
        assert arrays["table"].shape == (1, 2)
        return {"table": torch.cat([arrays["table"], arrays["table"].sum(1, keepdim=True)], 1)}

    harness.run_case("m/d", adapter_of_columns, tmp_path)
    with pytest.raises(harness.Mismatch, match="no expected output"):
        harness.run_case("m/c", harness.given("*")(lambda meta, arrays: {}), tmp_path)


def test_tolerance_takes_the_most_specific_entry() -> None:
    assert harness.tolerance({}, "out_a") == (1e-4, 1e-5)
    assert harness.tolerance({"rtol": 1e-3, "atol": {"a": 0.5, "out_b": 0.25}}, "out_a") == (1e-3, 0.5)
    assert harness.tolerance({"atol": {"out_b": 0.25}}, "out_b") == (1e-4, 0.25)
    meta = {"rtol": 1e-3, "atol": 0.1, "outputs": {"out_a": {"atol": 0.2}, "b": {"rtol": 0.3}}}
    assert harness.tolerance(meta, "out_a") == (1e-3, 0.2)
    assert harness.tolerance(meta, "out_b") == (0.3, 0.1)
    assert harness.tolerance(meta, "out_c") == (1e-3, 0.1)


def test_detfill_depends_on_seed_key_and_shape_only() -> None:
    rules = [{"match": "kept$", "keep": True}, {"match": "weight$", "std": 0.5, "mean": 3.0}]
    shapes = {"a.weight": (200, 50), "a.bias": (500,), "b": (100, 100), "kept": (2,)}
    filled = harness.detfill(shapes, 7, rules)
    again = harness.detfill(dict(reversed(shapes.items())), 7, rules)
    assert set(filled) == {"a.weight", "a.bias", "b"}
    assert all(torch.equal(filled[key], again[key]) for key in filled)
    assert filled["a.weight"].mean().item() == pytest.approx(3.0, abs=0.03)
    assert filled["a.weight"].std().item() == pytest.approx(0.5, abs=0.02)
    assert filled["a.bias"].std().item() == pytest.approx(0.1, abs=0.02)
    assert filled["b"].std().item() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(filled["b"], harness.detfill(shapes, 8, rules)["b"])
    # One value written down, so that the generator itself cannot change unnoticed.
    expected = np.random.Generator(np.random.PCG64([7, 0x71BEEFF9])).standard_normal(1).astype(np.float32)
    assert harness.detfill({"b": (1,)}, 7, [{"match": "b", "std": 1.0}])["b"].item() == expected.item()


def test_planned_cases_need_reasons_and_adapters_win(tmp_path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text("methods: {m: later}\ncases: {n/c: ''}\n")
    with pytest.raises(ValueError, match="n/c"):
        harness.read_planned(path)
    registry = harness.Registry({"m/done": lambda meta, arrays: {}}, {"m": "later", "n/c": "why"})
    assert registry.plan("m/open") == "later"
    assert registry.plan("m/done") is None
    assert registry.plan("n/c") == "why"
    assert registry.plan("n/other") is None
