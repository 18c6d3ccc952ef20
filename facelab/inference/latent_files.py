# SPDX-License-Identifier: Apache-2.0
"""Codes on disk: our ``.safetensors``, session folders with one, the ``.pth`` dictionaries of FENeRF's scripts, and the
``.npy`` arrays (1, L, W) or (1, 1, W) of EG3D's projectors and of FaceDNeRF.

A file of ours holds a tensor (N, ...) for each code of the generator by its name; one for each name of
``generator.average_codes()``, and perhaps some of ``generator.optional_codes`` (name -> shape without N). Its header
says ``format`` facelab-codes, ``method``, and ``names``. The folder of an inversion or edit keeps the codes of its
result as ``latents.safetensors``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.files import atomic_path
from facelab.generator import Codes
from facelab.tensor_files import one_line_for, read_tensor_file

FORMAT = "facelab-codes"
SESSION_FILE = "latents.safetensors"


def save_codes(path: str | Path, codes: Codes, method: str) -> None:
    """Write codes (N, ...) as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in codes.values.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "method": method, "names": json.dumps(list(tensors))})


def read_codes(path: str | Path, generator: Any) -> Codes:
    """Read codes of our format, FENeRF's ``freq_phase_offset_*.pth`` or an array of ``w`` for a generator, on its device.

    Args:
        path: a file, or a session folder.

    Raises:
        UserError: missing, damaged, another kind of file, or codes of another width.
    """
    path = Path(path)
    path = path / SESSION_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"no codes at {path}: expected a .safetensors, .pth or .npy file, or a session folder; check the path"
        )
    words = "codes", "take a file of --save-latents"
    if path.suffix == ".npy":
        with one_line_for(path, *words):
            values = {"w": _from_array(np.load(path, allow_pickle=False), generator)}
    else:
        values = read_tensor_file(path, *words)
        if path.suffix != ".safetensors":
            values = _from_original(values, path)
    needed = {name: tuple(average.shape[1:]) for name, average in generator.average_codes().values.items()}
    optional = {name: shape for name, shape in getattr(generator, "optional_codes", {}).items() if name in values}
    for name, shape in {**needed, **optional}.items():
        got = tuple(values[name].shape[1:]) if name in values else None
        if got != shape:
            raise UserError(
                f"{path} does not fit this generator: expected codes '{name}' of shape (N, *{shape}), "
                f"got {'none' if got is None else f'(N, *{got})'}; were they made with another model?"
            )
        if len(values[name]) == 0:
            raise UserError(f"{path} holds no head: its codes '{name}' are empty; save them again")
        if not torch.isfinite(values[name]).all():
            raise UserError(f"{path} holds NaN or infinite numbers in its codes '{name}'; expected those of a head")
    device = next(generator.parameters()).device
    return Codes({name: values[name].float().to(device) for name in (*needed, *optional)})


def _from_array(array: np.ndarray, generator: Any) -> Tensor:
    """Codes (N, L, W) as EG3D's projectors keep them; one vector (N, 1, W) stands for all L."""
    w = torch.from_numpy(np.asarray(array, dtype=np.float32))
    wanted = generator.average_codes().values.get("w")
    if wanted is not None and w.ndim == 3 and w.shape[1] == 1:
        w = w.expand(-1, wanted.shape[1], -1).contiguous()
    return w


def _from_original(data: Any, path: Path) -> dict[str, Tensor]:
    """The two dictionaries that FENeRF's scripts write under the same name.

    Videos: ``truncated_{frequencies,phase_shifts}_{geo,app}``. Inversions: base values and offsets,
    ``w_{geo,app}_{frequencies,phase_shifts}`` plus ``..._frequency_offsets`` and ``..._phase_shift_offsets``.
    """
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, as FENeRF's scripts write it")
    codes = {}
    for name in ("geo", "app"):
        if f"truncated_frequencies_{name}" in data:
            keys = [(f"truncated_frequencies_{name}", None), (f"truncated_phase_shifts_{name}", None)]
        elif f"w_{name}_frequencies" in data:
            keys = [
                (f"w_{name}_frequencies", f"w_{name}_frequency_offsets"),
                (f"w_{name}_phase_shifts", f"w_{name}_phase_shift_offsets"),
            ]
        else:
            raise UserError(
                f"{path}: no codes of '{name}' in it; expected keys such as w_{name}_frequencies, "
                f"got {sorted(map(str, data))[:4]}"
            )
        parts = []
        for base, offset in keys:
            value = data.get(base)
            if offset is not None and isinstance(value, Tensor) and isinstance(data.get(offset), Tensor):
                value = value + data[offset] if value.shape == data[offset].shape else None
            if not isinstance(value, Tensor) or value.ndim != 2 or (parts and value.shape != parts[0].shape):
                raise UserError(
                    f"{path}: '{base}' is missing or does not fit the others; expected tensors (N, width), offsets, "
                    f"frequencies and phases of '{name}' of the same shape"
                )
            parts.append(value.detach().float())
        codes[name] = torch.stack(parts, dim=1)
    return codes
