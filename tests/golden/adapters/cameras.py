# SPDX-License-Identifier: Apache-2.0
"""Golden cases of camera sampling: every pose distribution from recorded raw numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.cameras.pose_sampling import MODES, PosePrior, angles_from_raw


def camera_sampling(meta: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Origins and angles of each mode; the original takes the means for any unknown mode."""
    config = meta["config"]
    outputs: dict[str, Tensor] = {}
    for mode, kind in meta["modes"].items():
        prior = PosePrior(
            mode if mode in MODES else "fixed",
            yaw_mean=config["h_mean"],
            yaw_std=config["h_stddev"],
            pitch_mean=config["v_mean"],
            pitch_std=config["v_stddev"],
        )
        raw_yaw, raw_pitch = (_raw(mode, name, kind, arrays, config["n_cams"]) for name in ("theta", "phi"))
        pitch, yaw = angles_from_raw(prior, raw_yaw, raw_pitch)
        outputs[f"out_{mode}_origin"] = Camera.on_sphere(pitch, yaw, fov=12.0).cam2world[:, :3, 3]
        outputs[f"out_{mode}_phi"] = pitch[:, None]
        outputs[f"out_{mode}_theta"] = yaw[:, None]
    return outputs


def _raw(mode: str, name: str, kind: str | None, arrays: Mapping[str, Tensor], count: int) -> Tensor:
    if kind is None:
        return torch.zeros(count)
    # inputs are named in_<mode>_<angle>_<kind>, the candidates in_<mode>_candidates_<angle>
    names = (f"in_{mode}_{name}_{kind}", f"in_{mode}_{kind}_{name}")
    return next(arrays[n] for n in names if n in arrays)


ADAPTERS = {"pigan/camera_sampling": camera_sampling}
