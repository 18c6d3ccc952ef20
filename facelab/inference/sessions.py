# SPDX-License-Identifier: Apache-2.0
"""What the session folder of an inversion or an edit keeps of a head besides its codes.

``latents.safetensors``: the codes (:mod:`facelab.inference.latent_files`). ``noise.safetensors``: noise maps of the
decoder (of EG3D: of the backbone) by layer, where they were optimised. ``metrics.json``: of an inversion, with the
photo's ``camera``.
``generator.safetensors``: a generator that was tuned to the photo, a model to be opened itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.errors import UserError
from facelab.files import atomic_path
from facelab.nn.stylegan2.noise import const_noise

NOISE_FILE, METRICS_FILE, TUNED_FILE = "noise.safetensors", "metrics.json", "generator.safetensors"


def read_noise(folder: str | Path, generator: Any) -> dict[str, Tensor]:
    """Noise maps (H, W) of a session by layer; none where it keeps none, or what is named is no folder.

    Raises:
        UserError: damaged, or of another generator.
    """
    path = Path(folder) / NOISE_FILE
    if not path.is_file():
        return {}
    from safetensors.torch import load_file

    try:
        maps = load_file(path)
    except Exception as error:  # safetensors raises many kinds for damaged files
        raise UserError(
            f"{path} cannot be read as noise maps ({type(error).__name__}); remove it or make it anew"
        ) from error
    network = getattr(generator, "decoder", None)
    if network is None and hasattr(generator, "backbone"):
        network = generator.backbone.synthesis  # EG3D's planes
    known = {} if network is None else const_noise(network)
    device = next(generator.parameters()).device
    fitting = {}
    for name, value in maps.items():
        if name not in known or value.numel() != known[name].numel():
            raise UserError(f"{path} holds noise '{name}' that this model has not; was it made with another model?")
        fitting[name] = value.reshape(known[name].shape).to(device)
    return fitting


def save_noise(folder: str | Path, maps: dict[str, Tensor]) -> None:
    """Write noise maps as a session's."""
    from safetensors.torch import save_file

    with atomic_path(Path(folder) / NOISE_FILE) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in maps.items()}, temporary)


def read_camera(folder: str | Path) -> Camera | None:
    """The camera of the photo that a session inverts; None where it tells none. UserError where it is damaged."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        label = content["camera"]["label"] if "camera" in content else None
        return None if label is None else Camera.from_label(torch.tensor([label], dtype=torch.float32))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the metrics of an inversion ({type(error).__name__})") from error


def save_camera(folder: str | Path, camera: Camera) -> None:
    """Write a camera as that of a session's photo."""
    with atomic_path(Path(folder) / METRICS_FILE) as temporary:
        temporary.write_text(json.dumps({"camera": {"label": camera.label()[0].tolist()}}) + "\n", encoding="utf-8")


def tuned_model(folder: str | Path) -> Path | None:
    """The model that was tuned to a session's photo, where there is one."""
    path = Path(folder) / TUNED_FILE
    return path if path.is_file() else None
