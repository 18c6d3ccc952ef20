# SPDX-License-Identifier: Apache-2.0
"""The files in configs/stylesdf say what the presets say."""

from __future__ import annotations

import pytest
import torch

from facelab.bases.stylesdf.config import PRESETS, StyleSdfConfig, preset
from facelab.bases.stylesdf.training import METHOD
from facelab.cameras.sphere import sphere_camera
from facelab.config import load_staged, resolve_curriculum


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_is_a_preset(name: str) -> None:
    staged = load_staged(StyleSdfConfig, [resolve_curriculum("stylesdf", name)])
    assert staged.at(0) == preset(name)


@pytest.mark.parametrize(("name", "side"), [("debug", 8), ("debug_full", 16)])
def test_small_recipes_build_and_render(name: str, side: int) -> None:
    config = load_staged(StyleSdfConfig, [resolve_curriculum("stylesdf", name)]).at(0)
    generator = METHOD.build_generator(config).eval()
    with torch.no_grad():
        picture = generator({"z": torch.ones(1, 16)}, sphere_camera(0.0, 0.0), METHOD.inference_settings(config))
    assert picture.rgb.shape == (1, 3, side, side)
