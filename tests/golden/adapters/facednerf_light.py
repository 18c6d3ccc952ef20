# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's light: its functions and their projection, lightness, DPR's network, the light loss; and its cameras."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from facelab import lighting
from facelab.cameras.orbit import orbit_camera
from facelab.losses.lighting import light_distance
from facelab.nn.pretrained.light_estimator import (
    DprRelight,
    dpr_from_published,
    light_estimator_from_published,
    load_dpr,
    published_names,
    published_tensors,
)
from tests.golden.harness import Arrays, Meta, case_weights, given

NAMES = {  # the cases' names of the lights
    "right_az2.5_default": "right",
    "left_az0.6": "left",
    "below_front": "below",
    "top_plus_az2.5": "top_right",
}


def light_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Our light of a case's name."""
    return lighting.PRESETS[NAMES[name]]


@given("theta", "phi", "near_theta", "near_phi")
def light_functions(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """Lights and basis (with the phase) at points."""

    def values(theta: Tensor, phi: Tensor) -> Tensor:
        return torch.stack([light_function(name)(theta, phi) for name in meta["functions"]])

    return {
        "values": values(arrays["theta"], arrays["phi"]),
        "near_values": values(arrays["near_theta"], arrays["near_phi"]),
        "basis": lighting.polar_basis(arrays["theta"], arrays["phi"], phase=True),
    }


@given("offsets")
def light_sh(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """Projections in the middle of each cell and with the recorded jitter."""
    grid = meta["sqrt_n_samples"]
    jitter = torch.from_numpy(np.random.default_rng(meta["jitter_seed"]).random((grid, grid, 2)))

    def coefficients(jitter: Tensor | None) -> Tensor:
        found = [
            lighting.project(light_function(name), arrays["offsets"], grid, jitter, phase=True)
            for name in meta["functions"]
        ]
        return torch.stack(found)

    return {"coeff_mid": coefficients(None), "coeff_jit": coefficients(jitter)}


@given("image", "cotangent")
def lab_luma(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """Lightness, its derivative, and Lab."""
    image = arrays["image"].requires_grad_()
    level = lighting.lightness(image)
    (grad,) = torch.autograd.grad(level, image, arrays["cotangent"])
    return {"input_L": level.detach(), "grad": grad, "lab": lighting.lab(arrays["image"].detach())}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Published name -> shape."""
    state = DprRelight().state_dict()
    return {theirs: tuple(state[ours].shape) for ours, theirs in published_tensors(published_names(), state).items()}


def run_passes(net: DprRelight, meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """The case's passes in order on one network, then every running statistic under its short published name."""
    x, found = arrays["x"], {}
    for step in meta["passes"]:
        wanted = step["target_light"]
        light = arrays[wanted].flatten(1) if isinstance(wanted, str) else torch.full((len(x), 9), float(wanted))
        net.skip = step["skip_count"]
        net.train(step["mode"] == "train")
        with torch.no_grad():
            relit, seen = net(x, light)
        values = (relit, seen[:, :, None, None])
        found |= {name: value for name, value in zip(step["outputs"], values, strict=True) if name is not None}
    state = net.state_dict()
    for ours, theirs in published_tensors(published_names(), state).items():
        short = re.sub(r"^HG3((?:\.middle)*)", lambda m: f"HG{3 - m.group(1).count('.middle')}", theirs)
        found |= {f"{name.replace('.', '_')}_after": state[ours] for name in {theirs, short} if "running" in name}
    return found


@given("x", "target_light")
def dpr_net(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """The hourglass in evaluation and training mode."""
    return run_passes(dpr_from_published(case_weights(meta, published_shapes())), meta, arrays)


@given("x", "target_light")
def dpr_official_weights(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """The same with DPR's own file."""
    return run_passes(load_dpr(official_file(meta)), meta, arrays)


def official_file(meta: Mapping[str, Any]) -> Path:
    """The file of the case's checksum in ``FACELAB_WEIGHTS_DIR``; skips without it."""
    folder, name = os.environ.get("FACELAB_WEIGHTS_DIR"), meta["needs_file"]
    candidates = sorted(Path(folder).rglob(f"*{Path(name).suffix}")) if folder else []
    for path in candidates:
        if path.stat().st_size == meta["size"] and hashlib.sha256(path.read_bytes()).hexdigest() == meta["sha256"]:
            return path
    pytest.skip(f"needs DPR's {name}: set FACELAB_WEIGHTS_DIR to a folder that holds it")


@given("image", "sh")
def illu_loss(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """Loss and derivative, batch norm with the picture's statistics (``norm="batch"``) and with the stored ones."""
    weights = case_weights(meta, published_shapes())
    found = {}
    for mode in meta["modes"]:
        norm = "batch" if mode == "train" else "running"
        estimator = light_estimator_from_published(weights, norm, side=None)
        image = arrays["image"].clone().requires_grad_()
        loss = light_distance(estimator, image * 2 - 1, arrays["sh"]).sum()
        (found[f"grad_{mode}"],) = torch.autograd.grad(loss, image)
        found[f"loss_{mode}"] = loss.detach()
    return found


@given("u")
def cameras(meta: Meta, arrays: Arrays) -> Mapping[str, Tensor]:
    """The front camera, side cameras from uniform numbers, and the videos' paths."""
    c, video, count = meta["camera"], meta["video"], meta["n_frames"]

    def labels(yaw: Any, pitch: Any, pivot: Any) -> Tensor:
        made = orbit_camera(yaw, pitch, c["radius"], pivot, c["focal"])
        return made.label().float()

    offset = (arrays["u"].double() - 0.5) * meta["side_range"]
    turn = 2 * video["pi"] * torch.arange(count, dtype=torch.float64) / count
    yaw = video["pi"] / 2 + video["horizontal_amplitude"] * turn.sin()
    pitch = video["pi"] / 2 + video["vertical_shift"] + video["vertical_amplitude"] * turn.cos()
    return {
        "front": labels(c["horizontal_mean"], c["vertical_mean"], c["pivot"]),
        "side": labels(c["horizontal_mean"] + offset[:, 0], c["vertical_mean"] + offset[:, 1], c["pivot"]),
        "video_ffhq": labels(yaw, pitch, c["pivot"]),
        "video_cats": labels(yaw, pitch, meta["pivot_cats"]),
    }


ADAPTERS = {
    "facednerf/light_functions": light_functions,
    "facednerf/light_sh": light_sh,
    "facednerf/lab_luma": lab_luma,
    "facednerf/dpr_net": dpr_net,
    "facednerf/dpr_official_weights": dpr_official_weights,
    "facednerf/illu_loss": illu_loss,
    "facednerf/cameras": cameras,
}
