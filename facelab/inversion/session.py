# SPDX-License-Identifier: Apache-2.0
"""The folder of one inverted photo: what was asked for, where it stands, what came out.

``settings.yaml`` (begun with), ``target.png`` and ``target_mask.png``, ``state.safetensors`` (to go on from),
``latents.safetensors`` (codes, for every command that takes ``--latents``), ``noise.safetensors``, ``metrics.json``,
``losses.jsonl``, pictures. Files are replaced whole, so an interrupted run leaves the earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.files import atomic_path, make_folder
from facelab.inversion.loop import STEP, State
from facelab.yaml_files import dump_yaml, read_yaml

FORMAT, VERSION = "facelab-inversion", 1
SETTINGS, STATE, TUNING, LATENTS = "settings.yaml", "state.safetensors", "tuning.safetensors", "latents.safetensors"
TARGET, TARGET_MASK, METRICS, LOSSES = "target.png", "target_mask.png", "metrics.json", "losses.jsonl"
NOISE, GENERATOR = "noise.safetensors", "generator.safetensors"


class Session:
    """One folder; see the module's docstring for its files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def begun(self) -> bool:
        """Whether an inversion was begun here."""
        return (self / SETTINGS).exists()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, which must be plain values. UserError where the folder cannot be made."""
        make_folder(self.folder)
        text = dump_yaml({"format": FORMAT, "version": VERSION, **settings})
        with atomic_path(self / SETTINGS) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What the session was begun with. UserError where that cannot be read."""
        found = read_yaml(self / SETTINGS)
        if found.pop("format", None) != FORMAT or found.pop("version", None) != VERSION:
            raise UserError(f"{self / SETTINGS} is not of an inversion of this version; choose another output folder")
        return found

    def expect(self, settings: Mapping[str, Any], keys: Sequence[str], free: Collection[str] = ()) -> None:
        """UserError unless the session was begun with the same values of these keys; dictionaries are compared by entry.

        Entries named in ``free`` may differ.
        """
        before = self.settings()
        for key in keys:
            old, new = before.get(key), settings[key]
            if isinstance(old, dict) and isinstance(new, dict):
                changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in free]
                if changed:
                    name = changed[0]
                    self._refuse(name, old.get(name), new.get(name))
            elif old != new:
                self._refuse(key, old, new)

    def _refuse(self, name: str, old: Any, new: Any) -> None:
        raise UserError(
            f"{self.folder} was begun with another {name.replace('_', '-')}: expected {old}, got {new}; give the same "
            "options or choose another folder"
        )

    def save_state(self, state: State, name: str = STATE) -> None:
        """Write a state, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {key: value.contiguous() for key, value in state.items()}
        with atomic_path(self / name) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "version": str(VERSION)})

    def read_state(self, name: str = STATE) -> State | None:
        """The stored state, or None. UserError where it is damaged."""
        if not (self / name).exists():
            return None
        from safetensors.torch import load_file

        try:
            state = load_file(self / name)
        except Exception as error:  # safetensors raises many kinds for damaged files
            reason = " ".join((str(error) or type(error).__name__).split())[:120]
            raise UserError(
                f"{self / name} is damaged ({reason}); remove it to begin the photo anew with --resume"
            ) from error
        if STEP not in state or state[STEP].shape != (1,):
            raise UserError(f"{self / name} is not the state of an inversion; remove it to begin anew with --resume")
        return state

    def save_json(self, name: str, content: Any) -> None:
        """Write a value as JSON."""
        with atomic_path(self / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def save_losses(self, rows: list[dict[str, Any]]) -> None:
        """Write the curve of the losses, one JSON object a line."""
        with atomic_path(self / LOSSES) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def losses(self, before: int) -> list[dict[str, Any]]:
        """The stored curve up to a step; what cannot be read is left out."""
        rows = []
        if (self / LOSSES).is_file():
            for line in (self / LOSSES).read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] < before:
                    rows.append(row)
        return rows


def digest(state: Mapping[str, Tensor]) -> str:
    """A short name of weights: equal for equal names, types and values."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
