# SPDX-License-Identifier: Apache-2.0
"""docs/ops.md names ops, modes and activations that exist, and all of them."""

from __future__ import annotations

import importlib
import re

import cuda_ops
from cuda_ops import dispatch
from tests.conftest import CHECKOUT

MODULES = ("convolution_derivatives", "grid_lookup", "film_siren", "triplane_render")


def test_ops_and_modes_of_the_document_are_those_of_the_code() -> None:
    text = (CHECKOUT / "docs" / "ops.md").read_text(encoding="utf-8")
    ops = text.split("<!-- ops")[1]
    cells = [line.split("|")[1] for line in ops.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    homes = [cuda_ops, *(importlib.import_module(f"cuda_ops.{name}") for name in MODULES)]
    assert not [name for name in named if not any(hasattr(home, name) for home in homes)]
    assert {name for name in cuda_ops.__all__ if callable(getattr(cuda_ops, name))} - {"activation_gain"} <= named
    modes = text.split("| `FACELAB_OPS` |")[1].split("\n\n")[0]
    assert {
        name
        for line in modes.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    } == set(dispatch.MODES)
    assert all(name in ops for name in cuda_ops.ACTIVATIONS)
