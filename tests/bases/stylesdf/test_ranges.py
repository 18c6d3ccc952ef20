# SPDX-License-Identifier: Apache-2.0
"""Numbers that no StyleSDF or CNeRF run can have are refused before it, with the setting's name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from facelab.bases.stylesdf.config import StyleSdfConfig
from facelab.config import load_config, resolve_curriculum
from facelab.errors import UserError
from facelab.methods.cnerf.config import CnerfConfig

SHARED = [
    ("loss.eikonal", ".inf", "must be finite"),
    ("loss.path_decay", "0", "above 0"),
    ("loss.surface_sharpness", "-1", "above 0"),
    ("optim.full_lr", ".inf", "must be finite"),
    ("optim.full_lr", "-1", "0 or more"),
    ("optim.eps", "0", "above 0"),
    ("optim.full_betas", "[0,1]", "below 1"),
    ("sphere.steps", "-1", "0 or more"),
    ("sphere.beta", ".inf", "must be finite"),
    ("data.heads", "0", "at least 1"),
    ("data.heads_azimuth_std", "-0.1", "0 or more"),
    ("model.channel_max", "0", "at least 1"),
    ("model.clamp", "-1", "above 0"),
    ("discriminator.channel_max", "-1", "at least 1"),
    ("render.max_points", "0", "at least 1"),
    ("render.samples", "-1", "at least 1"),
    ("log.sample_views", "0", "at least 1"),
    ("log.sample_heads", "-1", "0 or more"),
    ("log.every", "0", "at least 1"),
    ("log.sample_truncation", ".inf", "must be finite"),
    ("train.workers", "-1", "0 or more"),
    ("train.batch_size", "0", "at least 1"),
    ("train.grad_clip", "0", "above 0"),
    ("checkpoint.keep_every", "-1", "0 or more"),
    ("checkpoint.max_shard_mb", "0", "at least 1"),
]
STYLESDF = [
    ("model.decoder_lr_mul", "0", "above 0"),
    ("model.decoder_mapping_layers", "0", "at least 1"),
    ("view.azimuth", "-1", "0 or more"),
    ("render.density_noise", "-1", "0 or more"),
    ("render.shape_resolution", "0", "at least 1"),
    ("sphere.batch", "0", "at least 1"),
]
CNERF = [
    ("model.lr_mapping", "0", "above 0"),
    ("model.width", "0", "at least 1"),
    ("model.mapping_layers", "-1", "at least 1"),
    ("model.resolution", "12", "a power of two"),
    ("camera.azimuth", ".inf", "must be finite"),
    ("loss.semantic", "-1", "0 or more"),
    ("render.inference_samples", "0", "at least 1"),
    ("discriminator.chunk", "0", "at least 1"),
]


def refusal(method: str, kind: Any, curriculum: str, change: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(kind, [resolve_curriculum(method, curriculum)], [change])
    return str(caught.value)


@pytest.mark.parametrize(("key", "value", "expected"), [*SHARED, *STYLESDF])
def test_stylesdf(key: str, value: str, expected: str) -> None:
    message = refusal("stylesdf", StyleSdfConfig, "debug", f"{key}={value}")
    assert message.startswith(f"--set {key}={value}: {key} must be ") and expected in message, message
    assert re.search(r", got \S+", message) and "\n" not in message


@pytest.mark.parametrize(("key", "value", "expected"), [*SHARED, *CNERF])
def test_cnerf(key: str, value: str, expected: str) -> None:
    message = refusal("cnerf", CnerfConfig, "debug_volume", f"{key}={value}")
    assert message.startswith(f"--set {key}={value}: {key} must be ") and expected in message, message
    assert re.search(r", got \S+", message) and "\n" not in message
