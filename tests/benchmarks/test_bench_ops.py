# SPDX-License-Identifier: Apache-2.0
"""The rows of bench_ops.py hold the original's rates where there are some, and only there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_ops

CASES = [*bench_ops.FILTERS, *bench_ops.ACTIVATIONS, *bench_ops.GRADIENTS]


def rows(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], row: dict[str, Any]) -> list[dict[str, Any]]:
    """What :func:`bench_ops.table` makes of a measurement that always finds ``row``, without memory or a GPU."""

    def inputs(*_: Any) -> Any:
        for dtype in bench_ops.DTYPES:
            for layout in bench_ops.LAYOUTS:
                yield dtype, layout, torch.empty(shape, device="meta", dtype=dtype)

    def measure(case: str, name: str, *_: Any) -> dict[str, Any]:
        return {"case": case, "implementation": name, **row}

    monkeypatch.setattr(bench_ops, "inputs", inputs)
    monkeypatch.setattr(bench_ops, "measure", measure)
    return bench_ops.table(CASES)


def test_rows_of_the_kernels_have_the_original_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(monkeypatch, bench_ops.SHAPE, {"tb_per_s": 3.0})
    assert len(found) == 3 * 2 * (1 + 3 * len(CASES))
    held = {(r["dtype"], r["layout"], r["case"]): (r["original_tb_per_s"], r["ratio"]) for r in found if "ratio" in r}
    assert all(r["implementation"] == "triton" for r in found if "ratio" in r or "original_tb_per_s" in r)
    assert len(held) == 3 * 4
    assert held["float32", "nchw", "up2"] == (1.27, 2.36)
    assert held["float16", "nchw", "bias_lrelu"] == (0.91, 3.3)
    assert held["float16", "channels_last", "down2"] == (0.47, 6.38)
    assert held["float16", "channels_last", "filter"] == (0.53, 5.66)


@pytest.mark.parametrize(
    "shape, row", [((4, 128, 256, 256), {"tb_per_s": 3.0}), (bench_ops.SHAPE, {"failed": "wrong result"})]
)
def test_other_shapes_and_failures_have_none(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], row: dict[str, Any]
) -> None:
    assert not any("ratio" in found or "original_tb_per_s" in found for found in rows(monkeypatch, shape, row))
