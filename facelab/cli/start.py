# SPDX-License-Identifier: Apache-2.0
"""--init-from: what a run takes over from the configuration of the model that it starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facelab.cli.convert import Source, open_any
from facelab.config import from_dict, to_dict
from facelab.errors import UserError, an


@dataclass(frozen=True)
class Start:
    """Settings of the model to start from.

    Attributes:
        path: as the user gave it.
        firm: setting -> value that replaces the curriculum's, so that the weights fit and mean the same.
        soft: setting -> value that a curriculum which states another one replaces.
        notes: lines for the user: what the file holds.
    """

    path: Path
    firm: Mapping[str, Any]
    soft: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def above(self) -> list[str]:
        """Overrides that go over the curriculum."""
        return [f"{key}={json.dumps(value)}" for key, value in self.firm.items()]

    @property
    def beneath(self) -> list[str]:
        """Overrides that go under it."""
        return [f"{key}={json.dumps(value)}" for key, value in self.soft.items()]

    def describe(self, curriculum: Any, resolved: Any) -> list[str]:
        """What was taken, a line for each section, and what was not.

        Args:
            curriculum: configuration by the curriculum alone.
            resolved: the one that the run will have.
        """
        alone, final = to_dict(curriculum), to_dict(resolved)
        taken: dict[str, list[str]] = {}
        other = []
        for key, value in {**self.firm, **self.soft}.items():
            before, after = _at(alone, key), _at(final, key)
            if after != value:
                other.append(f"{key} stays {_shown(after)}, the file has {_shown(value)}")
            elif before != value:
                taken.setdefault(key.split(".")[0], []).append(f"{key} {_shown(value)}")
        name = self.path.name
        lines = [f"taken from {name}: {', '.join(entries)}" for entries in taken.values()]
        lines += [f"not taken from {name}: {entry}" for entry in other]
        return [*self.notes, *(lines or [f"taken from {name}: weights; its settings are those of the curriculum"])]


def start_from(path: Path, method: Any, fresh_discriminators: bool) -> Start:
    """Open the model to start from and collect the settings that belong to its weights.

    A method says with ``inherited(config, discriminator)`` which these are; without, they are its ``model`` section.

    Raises:
        UserError: not readable, or a model of another method.
    """
    source = open_any(path)
    if source.method != method.name:
        raise UserError(f"{path} is {an(source.method)} model, which cannot start {an(method.name)} run")
    judged = any(name == "discriminator" or name.startswith("d_") for name in source.weights)
    notes = list(source.notes)
    if not judged or fresh_discriminators:
        several = hasattr(method, "judges") and len(method.judges()) > 1
        subject = "the discriminators start" if several else "the discriminator starts"
        notes.append(f"{subject} anew, {'as asked' if judged else 'the file has none'}")
    if not hasattr(method, "inherited"):
        model = {f"model.{key}": value for key, value in source.model.items() if value is not None}
        return Start(Path(path), model, {}, tuple(notes))
    config = _configuration(path, source, method)
    firm, soft = method.inherited(config, judged and not fresh_discriminators)
    values = to_dict(config)
    return Start(Path(path), _leaves(values, firm), _leaves(values, soft), tuple(notes))


def _configuration(path: Path, source: Source, method: Any) -> Any:
    """The typed configuration of a model, at the step where it stands."""
    whole = source.config or {"model": source.model}
    step, images = (int(source.meta.get(name) or 0) for name in ("step", "images"))
    return from_dict(method.config_type, whole, where=f"{path}: its configuration").at(step, images)


def _leaves(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Dotted setting -> value; a section stands for all that it holds."""
    found: dict[str, Any] = {}
    for key in keys:
        value = _at(values, key)
        if isinstance(value, dict):
            found |= _leaves(values, tuple(f"{key}.{name}" for name in value))
        else:
            found[key] = value
    return found


def _at(values: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
