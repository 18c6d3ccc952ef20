# SPDX-License-Identifier: Apache-2.0
"""Weights with a tensor less are refused in one line that ends in what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from facelab.bases.pigan.convert import derive_config
from facelab.bases.pigan.convert_discriminator import discriminator_from_original, original_shapes
from facelab.bases.stylesdf.first_stage import Stored, fill_renderer
from facelab.data.parsing import load_parser, save_small_parser
from facelab.errors import UserError
from facelab.metrics.features import _fid_state
from facelab.nn.discriminators import DiscriminatorConfig
from facelab.nn.pretrained.face_parsing import SmallParser


def generator_of_pigan(folder: Path) -> None:
    derive_config({"siren.network.0.layer.weight": torch.zeros(4, 3)})


def discriminator_of_pigan(folder: Path) -> None:
    config = DiscriminatorConfig(in_channels=3, channels=(3, 5, 6), latents={}, pose=True)
    state = {key: torch.zeros(shape) for key, shape in original_shapes(config).items()}
    state.popitem()
    discriminator_from_original(state, config)


def first_stage(folder: Path) -> None:
    generator = nn.Linear(2, 2)
    fill_renderer(generator, Stored(folder, None, {"weight": generator.weight.detach()}), lambda name: False)


def fid_network(folder: Path) -> None:
    _fid_state({}, {}, folder)


def face_parser(folder: Path) -> None:
    net = SmallParser()
    weights = net.state_dict()
    del weights[next(iter(weights))]
    net.state_dict = lambda: weights  # type: ignore[method-assign, assignment]
    load_parser(save_small_parser(folder / "parser.safetensors", net, 64))


@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (generator_of_pigan, "copy or download it again, or name its method (auto finds it)"),
        (discriminator_of_pigan, "copy or download the file again"),
        (first_stage, "take another checkpoint of the first stage, or the model settings that it has"),
        (fid_network, "use pt_inception-2015-12-05-6726825d.pth"),
        (face_parser, "get the file again"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_line_ends_in_a_remedy(read: Callable[[Path], None], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value).endswith(f"; {remedy}") and "\n" not in str(caught.value)
