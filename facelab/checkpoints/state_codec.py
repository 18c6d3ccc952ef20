# SPDX-License-Identifier: Apache-2.0
"""Nested training state <-> JSON text plus named tensors, exactly: every Python type and dtype comes back as it went.

JSON has no tuples, bytes, integer keys, tensors or NaN. Each of these is written as an object with one key that
starts with ``$``; a plain dictionary whose keys are strings without ``$`` is written as it is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_MAX_DEPTH = 64


def encode_state(state: object) -> tuple[object, dict[str, Tensor]]:
    """Return (JSON tree, tensors by name) for a nested state.

    Accepts dict (keys: str, int, bool, None or float), list, tuple, set of scalars, Tensor, numpy array and scalar,
    bytes, str, int of any size, float (NaN and infinities too), bool, None, torch.dtype and torch.device.

    Raises:
        ValueError: another type; the message names the place, as in ``state['optimizer'][0]``.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(state, "state", tensors, 0), tensors


def decode_state(tree: object, tensors: Mapping[str, Tensor]) -> object:
    """Invert :func:`encode_state`. ValueError when the tree names a tensor that is not there."""
    if isinstance(tree, list):
        return [decode_state(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (tag, value), *_ = tree.items()
        if tag.startswith("$"):
            return _decode_tagged(tag, value, tensors)
    return {key: decode_state(item, tensors) for key, item in tree.items()}


def _encode(value: object, where: str, tensors: dict[str, Tensor], depth: int) -> object:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where[:200]}: nested deeper than {_MAX_DEPTH} levels; flatten it before saving")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind in (list, tuple, torch.Size):
        items = [_encode(item, f"{where}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors, depth)
    if isinstance(value, Tensor):
        name = _new_name(where, tensors)
        tensors[name] = value.detach()  # type: ignore[attr-defined]
        return {"$tensor": name}
    return _encode_rare(value, where, tensors, depth)


def _encode_dict(value: dict, where: str, tensors: dict[str, Tensor], depth: int) -> object:
    plain = all(type(key) is str and not key.startswith("$") for key in value)
    if plain:
        return {key: _encode(item, f"{where}.{key}", tensors, depth + 1) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        if not (key is None or type(key) in (str, int, bool, float)):
            raise ValueError(f"{where}: cannot store the key {key!r}; use text or numbers as keys")
        pairs.append([_encode(key, where, tensors, depth + 1), _encode(item, f"{where}.{key}", tensors, depth + 1)])
    return {"$dict": pairs}


def _encode_rare(value: object, where: str, tensors: dict[str, Tensor], depth: int) -> object:
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes" if isinstance(value, bytes) else "$bytearray": base64.b64encode(value).decode()}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$numpy_scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        name = _new_name(where, tensors)
        # as bytes, so that every numpy dtype and byte order survives
        tensors[name] = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.uint8).copy())
        return {"$ndarray": [value.dtype.str, list(value.shape), name]}
    if isinstance(value, (set, frozenset)):
        items = [_encode(item, where, tensors, depth + 1) for item in sorted(value, key=repr)]
        return {"$set" if isinstance(value, set) else "$frozenset": items}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"$dtype" if isinstance(value, torch.dtype) else "$device": str(value).removeprefix("torch.")}
    raise ValueError(
        f"{where}: cannot store a {type(value).__module__}.{type(value).__qualname__}; expected tensors, numbers, "
        "text, bytes, lists, tuples or dictionaries of them"
    )


def _decode_tagged(tag: str, value: object, tensors: Mapping[str, Tensor]) -> object:
    def items() -> list[object]:
        return [decode_state(item, tensors) for item in value]  # type: ignore[union-attr]

    decoders = {
        "$tuple": lambda: tuple(items()),
        "$set": lambda: set(items()),
        "$frozenset": lambda: frozenset(items()),
        "$dict": lambda: {decode_state(k, tensors): decode_state(v, tensors) for k, v in value},
        "$float": lambda: float(value),
        "$bytes": lambda: base64.b64decode(value),
        "$bytearray": lambda: bytearray(base64.b64decode(value)),
        "$tensor": lambda: _fetch(value, tensors),
        "$ndarray": lambda: (
            np.frombuffer(_fetch(value[2], tensors).cpu().numpy().tobytes(), dtype=_number_type(value[0]))
            .reshape(value[1])
            .copy()
        ),
        "$numpy_scalar": lambda: np.frombuffer(base64.b64decode(value[1]), dtype=_number_type(value[0]))[0],
        "$dtype": lambda: _torch_dtype(value),
        "$device": lambda: torch.device(value),
    }
    if tag not in decoders:
        raise ValueError(f"unknown entry {tag!r} in the stored state; it was written by a newer facelab")
    return decoders[tag]()


def _fetch(name: object, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the stored state names tensor '{name}', which no shard holds")
    return tensors[str(name)]


def _number_type(text: object) -> np.dtype:
    kind = np.dtype(str(text))
    if kind.kind not in "biuf":
        raise ValueError(f"array type {text!r} in the stored state is not a number type")
    return kind


def _torch_dtype(name: object) -> torch.dtype:
    table = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    if name not in table:
        raise ValueError(f"unknown dtype {name!r} in the stored state")
    return table[str(name)]


def _new_name(where: str, tensors: Mapping[str, Tensor]) -> str:
    """A readable name for a tensor; a number is added in the rare case that two places print alike."""
    name, number = where, 2
    while name in tensors:
        name, number = f"{where}~{number}", number + 1
    return name
