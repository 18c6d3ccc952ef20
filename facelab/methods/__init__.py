# SPDX-License-Identifier: Apache-2.0
"""The table of methods: name -> module, imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from facelab.errors import UserError, nearest

METHODS: dict[str, str] = {
    "pigan": "facelab.bases.pigan",
    "eg3d": "facelab.bases.eg3d",
    "stylesdf": "facelab.bases.stylesdf",
    "fenerf": "facelab.methods.fenerf",
    "cnerf": "facelab.methods.cnerf",
}


def module_of(name: str) -> str:
    """Package of a method. UserError with the nearest name for an unknown one."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}.{nearest(name, METHODS)}")
    return METHODS[name]


def load_method(name: str) -> Any:
    """The method object (building, training, conversion) of a name."""
    return importlib.import_module(f"{module_of(name)}.training").METHOD


def load_config_type(name: str) -> type:
    """The configuration dataclass of a method, without importing its networks."""
    config = importlib.import_module(f"{module_of(name)}.config")
    return next(v for k, v in vars(config).items() if k.endswith("Config") and k.lower() == f"{name}config")
