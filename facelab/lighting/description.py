# SPDX-License-Identifier: Apache-2.0
"""Lights as users write them: a name, nine numbers, a few words of YAML, a panorama, or a sum of these.

Nothing is executed. Directions are a frontal viewer's: right in the picture, up, towards the viewer. One light is a
mapping of one of these forms (:data:`FORMS` holds their keys):

```yaml
direction: [0.8, 0.3, 0.5]   # towards a distant lamp; any length
strength: 0.8                # brightness of a white surface that faces it (1)
---
azimuth_degrees: 50          # a soft lamp: to the right
elevation_degrees: 20        # upwards (0)
sharpness: 4                 # 0.5 all around ... 1 half the sphere ... small (4)
intensity: 0.8               # brightness of a white surface that faces it (1)
---
ambient: 0.4                 # the same from everywhere: brightness of a white surface
---
preset: right                # right, left, below, top_right: FaceDNeRF's
scale: 1
---
numbers: [0.7, ...]          # nine, or a .txt or .npy file of nine
frame: dpr                   # dpr (DPR's own), dpr_phase (with the Condon-Shortley sign) or facelab
scale: 0.7                   # (1)
---
environment: room.hdr        # a panorama: .hdr, .png, .jpg ...
brightness: 0.6              # mean brightness that it is scaled to (0.6); none: its own
turn_degrees: 0              # what is behind the head moves to the right
---
sum: [{preset: right}, {ambient: 0.4}]
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.errors import UserError, nearest
from facelab.lighting.environment import READABLE, environment_light, read_panorama
from facelab.lighting.frames import from_dpr, grey, switch_phase
from facelab.lighting.harmonics import C0, ambient, directional
from facelab.lighting.projection import PRESETS, lobe, preset
from facelab.yaml_files import YAML_ERRORS, parse_yaml, read_yaml

FORMS: dict[str, tuple[str, ...]] = {  # first key -> keys that may come with it
    "direction": ("strength",),
    "azimuth_degrees": ("elevation_degrees", "sharpness", "intensity"),
    "ambient": (),
    "preset": ("scale",),
    "numbers": ("frame", "scale"),
    "environment": ("brightness", "turn_degrees"),
    "sum": (),
}
FRAMES = ("dpr", "dpr_phase", "facelab")
BRIGHTNESS = 0.6  # mean brightness of a portrait's light, where a panorama has a scale of its own
_TEXT = (".txt", ".npy")
_DEEPEST = 20  # sums within sums


def light_from_text(text: str) -> Tensor:
    """What follows ``--light``: a preset's name, nine numbers in DPR's terms, a mapping in braces, or a file.

    Files are YAML, a panorama, or nine numbers (``.txt``, ``.npy``) in DPR's terms.

    Returns:
        (9,) float32 world light. UserError in one line for anything else.

    >>> light_from_text("right").shape, light_from_text("{ambient: 0.5}").shape
    (torch.Size([9]), torch.Size([9]))
    """
    text = text.strip()
    if text in PRESETS:
        return preset(text)
    if text.startswith("{"):
        try:
            return light_from_yaml(parse_yaml(text))
        except YAML_ERRORS as error:
            raise UserError(f"--light {text}: not valid YAML ({str(error).splitlines()[0]})") from error
    words = text.replace(",", " ").split()
    if len(words) > 1 and all(_is_number(word) for word in words):
        return light_from_yaml({"numbers": [float(word) for word in words]})
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return light_from_yaml(path)
    if suffix in (*READABLE, ".exr"):
        return light_from_yaml({"environment": text})
    if suffix in _TEXT:
        return light_from_yaml({"numbers": text})
    raise UserError(
        f"no light '{text}': expected one of {', '.join(PRESETS)}, nine numbers, {{...}} or a file (.yaml, .txt, .npy, "
        f".hdr, .png).{nearest(text, PRESETS)}"
    )


def light_from_yaml(source: str | Path | Mapping[str, Any], folder: str | Path = ".") -> Tensor:
    """A light in the terms above.

    Args:
        source: a YAML file or its content.
        folder: where the files that a mapping names lie; a YAML file's own folder.

    Returns:
        (9,) float32 world light (of RGB panoramas the luminance).

    Raises:
        UserError: one line with what is wrong and what is known.
    """
    if isinstance(source, Mapping):
        return _light(source, Path(folder), "light", 0)
    path = Path(source)
    return _light(read_yaml(path), path.parent, str(path), 0)


def _light(entry: Any, folder: Path, where: str, depth: int) -> Tensor:
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(f"{where}: expected a mapping with one of {', '.join(FORMS)}, got {entry!r}"[:200])
    forms = [key for key in entry if key in FORMS]
    known = {key for form, others in FORMS.items() for key in (form, *others)}
    for key in entry:
        if key not in known:
            raise UserError(
                f"{where}: unknown key '{key}'; one of {', '.join(FORMS)} makes a light.{nearest(key, known)}"
            )
    if len(forms) != 1:
        got = "none of them" if not forms else " and ".join(forms)
        raise UserError(f"{where}: expected exactly one of {', '.join(FORMS)}, got {got}; add lights with 'sum'")
    form = forms[0]
    for key in entry:
        if key != form and key not in FORMS[form]:
            allowed = f"only {', '.join(FORMS[form])}" if FORMS[form] else "nothing"
            raise UserError(f"{where}: '{key}' does not go with '{form}', which takes {allowed} beside it")
    if form == "sum":
        parts = entry["sum"]
        if depth >= _DEEPEST:
            raise UserError(f"sums of lights may be at most {_DEEPEST} deep; write one list")
        if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
            raise UserError(f"{where}: sum expects a list of lights, got {parts!r}"[:200])
        lights = [_light(part, folder, f"{where}: sum[{k}]", depth + 1) for k, part in enumerate(parts)]
        return torch.stack(lights).sum(0)
    return _MAKERS[form](entry, folder, where)


def _direction(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    towards = _numbers(entry["direction"], f"{where}: direction", 3, "right, up, towards the viewer")
    if max(map(abs, towards)) < 1e-6:
        raise UserError(f"{where}: direction has no length; expected right, up, towards the viewer, such as [1, 0, 1]")
    return directional(torch.tensor([towards]), _number(entry, "strength", 1.0, where))[0]


def _soft(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    azimuth, elevation = (math.radians(_number(entry, f"{a}_degrees", 0.0, where)) for a in ("azimuth", "elevation"))
    sharpness = _number(entry, "sharpness", 4.0, where)
    if sharpness < 0.5:
        raise UserError(f"{where}: sharpness must be at least 0.5, got {sharpness:g}")
    return lobe(azimuth, elevation, sharpness, _number(entry, "intensity", 1.0, where))[0].float()


def _ambient(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    return ambient(_number(entry, "ambient", 0.0, where))[0].float()


def _preset(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    return preset(str(entry["preset"])) * _number(entry, "scale", 1.0, where)


def _nine(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    value, what = entry["numbers"], f"{where}: numbers"
    if isinstance(value, str):
        what = f"{where}: {folder / value}"
        value = _read_numbers(folder / value)
    light = torch.tensor([_numbers(value, what, 9, "nine numbers")], dtype=torch.float64)
    frame = entry.get("frame", FRAMES[0])
    if frame not in FRAMES:
        raise UserError(
            f"{where}: frame must be one of {', '.join(FRAMES)}, got {frame!r}.{nearest(str(frame), FRAMES)}"
        )
    if frame == "dpr_phase":
        light = switch_phase(light)
    light = light if frame == "facelab" else from_dpr(light)
    return light[0].float() * _number(entry, "scale", 1.0, where)


def _environment(entry: Mapping[str, Any], folder: Path, where: str) -> Tensor:
    turn = math.radians(_number(entry, "turn_degrees", 0.0, where))
    light = grey(environment_light(read_panorama(folder / str(entry["environment"])), turn))[0]
    if entry.get("brightness", BRIGHTNESS) in (None, "none"):
        return light
    mean = float(light[0]) * C0
    if mean <= 0:
        raise UserError(f"{where}: {entry['environment']} is black; expected a panorama with light in it")
    return light * (_number(entry, "brightness", BRIGHTNESS, where) / mean)


_MAKERS: dict[str, Callable[[Mapping[str, Any], Path, str], Tensor]] = {
    "direction": _direction,
    "azimuth_degrees": _soft,
    "ambient": _ambient,
    "preset": _preset,
    "numbers": _nine,
    "environment": _environment,
}


def _read_numbers(path: Path) -> list[float]:
    if path.suffix.lower() not in _TEXT:
        raise UserError(f"{path}: expected a .txt or .npy file of nine numbers")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False).astype(np.float64).reshape(-1).tolist()
        return [float(word) for word in path.read_text(encoding="utf-8").replace(",", " ").split()]
    except FileNotFoundError:
        raise UserError(f"no file {path}; check the path") from None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{path}: expected nine numbers ({' '.join(str(error).split())[:80]})") from error


def _numbers(value: Any, where: str, count: int, what: str) -> list[float]:
    fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count
    if not fits or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
        raise UserError(f"{where}: expected {count} finite numbers ({what}), got {value!r}"[:200])
    return [float(v) for v in value]


def _number(entry: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, got {value!r}")
    return float(value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
