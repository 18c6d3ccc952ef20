# SPDX-License-Identifier: Apache-2.0
"""docs/preprocessing.md agrees with the limits and with the measured numbers."""

from __future__ import annotations

import json
import re

from facelab.data.preprocess.verdict import Limits
from tests.conftest import CHECKOUT

TEXT = (CHECKOUT / "docs" / "preprocessing.md").read_text(encoding="utf-8")


def test_measured_numbers() -> None:
    path = CHECKOUT / "tests" / "benchmarks" / "results" / "preprocess_mtcnn.json"
    portraits = json.loads(path.read_text(encoding="utf-8"))["portraits"]
    rows = re.findall(r"^\| MTCNN, 5 \|.*$", TEXT, flags=re.MULTILINE)
    for row, key in zip(rows, ("raw", "after_constant_rotation"), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        for cell, axis in zip(cells, ("yaw", "pitch", "roll"), strict=True):
            value = portraits[key][axis]
            expected = [value["median_absolute"], value["mean"], value["std"]]
            stated = [float(number) for number in re.findall(r"[-+]?\d+\.\d", cell)]
            assert all(abs(a - b) <= 0.051 for a, b in zip(stated, expected, strict=True)), (key, axis)


def test_measured_alignment() -> None:
    path = CHECKOUT / "tests" / "benchmarks" / "results" / "deep3d_camera.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    place = found["alignment_of_our_standard_points"]
    numbers = re.search(
        r"on (\d+) photographs the\s+scale by ([\d.]+) % \(standard deviation ([\d.]+) %\), the place by at most "
        r"([\d.]+) of 224",
        TEXT,
    )
    assert numbers is not None
    stated = [float(number) for number in numbers.groups()]
    scale = [100 * abs(place["scale_mean"] - 1), 100 * place["scale_std"]]
    expected = [found["photos"], *scale, place["shift_pixels_worst"]]
    assert all(abs(a - b) <= 0.051 for a, b in zip(stated, expected, strict=True))
    assert found["weights"] == "random" and "was not measured" in TEXT


def test_limits() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, flags=re.MULTILINE))
    limits = Limits()
    stated = {
        "side_view": (limits.refuse_yaw, limits.warn_yaw),
        "tilted": (limits.refuse_pitch, limits.warn_pitch),
        "rolled": (limits.refuse_roll, limits.warn_roll),
        "too_small": (limits.refuse_pixels, limits.warn_pixels),
        "uncertain": (limits.refuse_score, limits.warn_score),
        "misfit": (limits.refuse_misfit, limits.warn_misfit),
        "cut_off": (100 * limits.refuse_outside, 100 * limits.warn_outside),
        "unsteady": (100 * limits.refuse_wander, 100 * limits.warn_wander),
        "blurred": (limits.refuse_contrast, limits.warn_contrast),
        "disagreement": (limits.refuse_disagree, limits.warn_disagree),
    }
    for name, pair in stated.items():
        assert [float(n) for n in re.findall(r"\d+(?:\.\d+)?", rows[name])] == list(pair), name
