# SPDX-License-Identifier: Apache-2.0
"""Official EG3D names <-> ours: complete, both ways, strict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from facelab.bases.eg3d.keys import (
    backbone_rules,
    key_map,
    mapping_rules,
    resample_filters,
    superresolution_kind,
    superresolution_rules,
)
from facelab.errors import UserError
from facelab.nn.stylegan2 import MappingNetwork, StyleGAN2Generator, Superresolution

KEYS = key_map([*backbone_rules(), *superresolution_rules("superresolution.", "superresolution.")])


def released() -> nn.ModuleDict:
    """Backbone and super-resolution of the released 512 px models, without memory."""
    with torch.device("meta"):
        backbone = StyleGAN2Generator(512, 25, 512, 256, 96, mapping_layers=2)
        return nn.ModuleDict({"backbone": backbone, "superresolution": Superresolution("8xdc")})


def test_released_model_has_every_official_name() -> None:
    ours = released().state_dict()
    original = KEYS.back_to_original(ours)
    filters = resample_filters(original, "8xdc")
    # 177 tensors of G, less dataset_label_std and the four of the decoder
    assert len(original) + len(filters) == 172 and not set(original) & set(filters)
    shapes = {key: tuple(value.shape) for key, value in {**original, **filters}.items()}
    for key, shape in {
        "backbone.synthesis.b4.const": (512, 4, 4),
        "backbone.synthesis.b4.resample_filter": (4, 4),
        "backbone.synthesis.b4.conv1.noise_strength": (),
        "backbone.synthesis.b4.conv1.resample_filter": (4, 4),
        "backbone.synthesis.b128.conv0.weight": (256, 512, 3, 3),
        "backbone.synthesis.b256.conv0.noise_const": (256, 256),
        "backbone.synthesis.b256.torgb.weight": (96, 128, 1, 1),
        "backbone.synthesis.b256.torgb.affine.weight": (128, 512),
        "backbone.mapping.w_avg": (512,),
        "backbone.mapping.embed.weight": (512, 25),
        "backbone.mapping.fc0.weight": (512, 1024),
        "backbone.mapping.fc1.bias": (512,),
        "superresolution.block0.conv0.weight": (256, 32, 3, 3),
        "superresolution.block0.conv0.affine.bias": (32,),
        "superresolution.block1.conv1.noise_const": (512, 512),
        "superresolution.block1.torgb.weight": (3, 128, 1, 1),
    }.items():
        assert shapes[key] == shape, key
    assert not [key for key in original if "to_rgb" in key or "blocks" in key or "layers" in key]


def test_there_and_back() -> None:
    ours = released().state_dict()
    original = KEYS.back_to_original(ours)
    file = {**original, **resample_filters(original, "8xdc")}
    back = KEYS.from_original(file, ours)
    assert list(back) == list(ours)
    assert all(back[key] is ours[key] for key in ours)


def test_filters_are_the_modules_own() -> None:
    network = Superresolution("2x", in_channels=4, w_dim=4)
    original = KEYS.back_to_original({f"superresolution.{key}": value for key, value in network.state_dict().items()})
    filters = resample_filters(original, "2x")
    assert len(filters) == 1 + 2 * 3 and "superresolution.resample_filter" in filters
    own = dict(network.named_buffers())["blocks.0.conv0.resample_filter"]
    assert all(torch.equal(value, own) for value in filters.values())


def test_mapping_of_a_discriminator_has_its_own_place() -> None:
    network = MappingNetwork(0, 25, 8, None, num_layers=8, w_avg_beta=None)
    keys = key_map(mapping_rules("mapping.", "label."))
    original = keys.back_to_original({f"label.{key}": value for key, value in network.state_dict().items()})
    assert set(original) == {
        f"mapping.{name}.{part}" for name in ["embed", *(f"fc{i}" for i in range(8))] for part in ("weight", "bias")
    }


def test_foreign_and_missing_names_are_refused() -> None:
    ours = released().state_dict()
    original = KEYS.back_to_original(ours)
    with pytest.raises(UserError, match="no rule for 'backbone.synthesis.const'"):
        KEYS.from_original({**original, "backbone.synthesis.const": torch.zeros(1)}, ours)
    less = {key: value for key, value in original.items() if key != "backbone.synthesis.b8.torgb.bias"}
    with pytest.raises(UserError, match="missing 'backbone.synthesis.blocks.8.to_rgb.bias'"):
        KEYS.from_original(less, ours)


def test_super_resolution_by_class_path() -> None:
    assert superresolution_kind("training.superresolution.SuperresolutionHybrid8XDC") == "8xdc"
    assert superresolution_kind("SuperresolutionHybrid2X") == "2x"
    with pytest.raises(UserError, match="'training.superresolution.SuperresolutionHybridDeepfp32'"):
        superresolution_kind("training.superresolution.SuperresolutionHybridDeepfp32")
