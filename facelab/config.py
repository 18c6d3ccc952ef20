# SPDX-License-Identifier: Apache-2.0
"""Typed configurations: a frozen dataclass is schema, defaults and documentation; YAML holds only differences.

Order, later wins: dataclass defaults, the ``base:`` chain of a file, the file, ``--set key=value``. A file may hold
four keys that are not settings: ``base`` (another file, relative to this one), ``description``, ``aliases`` and
``stages``, the curriculum, whose rows override the ones above them from their step on::

    description: CelebAMask-HQ at 128 px
    base: ../default.yaml
    train: {generator_lr: 6e-5}
    stages:
      - {from_step: 0, render.resolution: 32, train: {batch_size: 24}}
      - {from_step: 20000, render.resolution: 64}

A file that names ``stages`` replaces those of its base (``stages: []`` drops them); a file that does not keeps
them, and its own settings win over their rows, as ``--set`` does in every stage. Errors are one-line
:class:`~facelab.errors.UserError`: unknown keys with the nearest name, values of another type, ``${...}``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import itertools
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from facelab.errors import UserError, nearest
from facelab.files import atomic_path
from facelab.yaml_files import YAML_ERRORS, dump_yaml, parse_yaml, read_yaml

Schema = TypeVar("Schema")
UNITS = {"from_step": 1, "from_kimg": 1000}  # key of a stage row -> steps or images per unit
EXTRA_KEYS = ("base", "description", "aliases", "stages")


class StagedConfig(Generic[Schema]):
    """One configuration per stage of a curriculum; a plain configuration has one stage, from step 0.

    Attributes:
        schema: the dataclass.
        unit: ``"from_step"`` or ``"from_kimg"``.
        boundaries: where each stage starts, in steps (or in images for ``from_kimg``); the first is 0.
        stages: the complete configuration of each stage.
    """

    def __init__(self, stages: Sequence[Schema], boundaries: Sequence[int] = (0,), unit: str = "from_step") -> None:
        if len(stages) != len(boundaries) or not stages or boundaries[0] != 0 or unit not in UNITS:
            raise ValueError(f"expected one boundary per stage, the first 0, got {len(stages)} and {list(boundaries)}")
        self.schema: type[Schema] = type(stages[0])
        self.unit, self.boundaries, self.stages = unit, tuple(boundaries), tuple(stages)

    def stage_index(self, step: int, images: int = 0) -> int:
        """The number of the stage in force at ``step`` (or after ``images`` images, for ``from_kimg``)."""
        position = step if self.unit == "from_step" else images
        return max(0, sum(start <= position for start in self.boundaries) - 1)

    def at(self, step: int, images: int = 0) -> Schema:
        """The configuration in force at ``step`` / after ``images``; the same object throughout a stage."""
        return self.stages[self.stage_index(step, images)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StagedConfig):
            return NotImplemented
        return (self.unit, self.boundaries, self.stages) == (other.unit, other.boundaries, other.stages)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StagedConfig({self.schema.__name__}, {self.unit}={list(self.boundaries)})"


@dataclass(frozen=True)
class Curriculum:
    """A named configuration file; ``aliases`` are the names the original publication's code used."""

    name: str
    path: Path
    description: str = ""
    aliases: tuple[str, ...] = ()


@dataclass
class _Layer:
    """Settings of one origin; ``rows`` is None where the origin does not speak of stages."""

    where: str
    values: dict[str, Any]
    rows: list[dict[str, Any]] | None = None
    unit: str = "from_step"
    boundaries: tuple[int, ...] = (0,)


def load_config(schema: type[Schema], files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> Schema:
    """The configuration of the first stage, as an instance of ``schema``. UserError in one line on bad input.

    >>> @dataclass(frozen=True)
    ... class Render:
    ...     near: float = 0.88  # scene units
    >>> load_config(Render, overrides=["near=6e-5"])
    Render(near=6e-05)
    >>> load_config(Render, overrides=["nea=1"])
    Traceback (most recent call last):
    facelab.errors.UserError: --set nea=1: unknown setting 'nea'. Did you mean 'near'?
    """
    return load_staged(schema, files, overrides).at(0)


def load_staged(
    schema: type[Schema], files: Sequence[Path | str] = (), overrides: Sequence[str] = (), beneath: Sequence[str] = ()
) -> StagedConfig[Schema]:
    """All stages, each merged into ``schema`` at once, so that a misspelt key of a late stage fails here.

    ``beneath`` are overrides that lose against what the files state.
    """
    layers = [layer for file in files for layer in _read_chain(Path(file), ())]
    return _build(schema, [*map(_parse_override, beneath), *layers, *map(_parse_override, overrides)])


def from_dict(
    schema: type[Schema], data: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config"
) -> StagedConfig[Schema]:
    """The inverse of :func:`to_dict`, for configurations kept in checkpoints; ``where`` is named in errors.

    >>> @dataclass(frozen=True)
    ... class Train:
    ...     batch_size: int = 4
    >>> staged = from_dict(Train, {"stages": [{"from_step": 0}, {"from_step": 10, "batch_size": 8}]})
    >>> staged.at(9).batch_size, staged.at(10).batch_size
    (4, 8)
    """
    return _build(schema, [_make_layer(where, dict(data)), *map(_parse_override, overrides)])


def to_dict(config: Any) -> dict[str, Any]:
    """A schema instance or :class:`StagedConfig` -> plain dicts, lists and scalars that YAML and JSON can hold.

    Stages beyond the first are written as rows that hold what changes.
    """
    if not isinstance(config, StagedConfig):
        return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    first, *later = [to_dict(stage) for stage in config.stages]
    if later:
        rows: list[dict[str, Any]] = [{config.unit: 0}]
        for start, before, after in zip(config.boundaries[1:], [first, *later], later, strict=False):
            scale = UNITS[config.unit]
            rows.append({config.unit: start if scale == 1 else start / scale, **_changes(before, after)})
        first["stages"] = rows
    return first


def save_resolved(config: Any, path: Path | str) -> None:
    """Write a schema instance or :class:`StagedConfig` as YAML that loads back to an equal one (atomic)."""
    with atomic_path(path) as temporary:
        temporary.write_text(dump_yaml(to_dict(config)), encoding="utf-8")


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """What differs, as (dotted key, old value, new value); keys of later stages start with ``stages[i].``.

    >>> @dataclass(frozen=True)
    ... class Train:
    ...     batch_size: int = 4
    >>> diff(Train(), Train(batch_size=8))
    [('batch_size', 4, 8)]
    """
    old_staged = old if isinstance(old, StagedConfig) else StagedConfig([old])
    new_staged = new if isinstance(new, StagedConfig) else StagedConfig([new])
    pairs = [(to_dict(a), to_dict(b)) for a, b in zip(old_staged.stages, new_staged.stages, strict=False)]
    first = _diff_dicts(*pairs[0], "")
    found = list(first)
    if (old_staged.unit, old_staged.boundaries) != (new_staged.unit, new_staged.boundaries):
        found.append(("stages", [{old_staged.unit: s} for s in old_staged.boundaries],
                      [{new_staged.unit: s} for s in new_staged.boundaries]))  # fmt: skip
    for number, (a, b) in enumerate(pairs[1:], start=1):
        found += [(f"stages[{number}].{k}", x, y) for k, x, y in _diff_dicts(a, b, "") if (k, x, y) not in first]
    return found


def configs_folder() -> Path:
    """``configs/`` of the checkout, or its copy inside an installed package."""
    package = Path(str(importlib.resources.files("facelab")))
    checkout = package.parent / "configs"
    return (
        checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "_data/configs"
    )


def list_curricula(method: str) -> list[Curriculum]:
    """The curricula of a method, sorted by name: files of ``configs/<method>``; names with a leading ``_`` are parts."""
    found = []
    for path in sorted((configs_folder() / method).glob("[!_]*.yaml")):
        data = read_yaml(path)
        aliases = data.get("aliases") or []
        if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
            raise UserError(f"{path}: aliases expects a list of names, got {aliases!r}")
        found.append(Curriculum(path.stem, path, str(data.get("description") or "").strip(), tuple(aliases)))
    return found


def find_curricula(method: str) -> dict[str, Path]:
    """Curriculum name -> file, without the aliases."""
    return {curriculum.name: curriculum.path for curriculum in list_curricula(method)}


def resolve_curriculum(method: str, name_or_path: str | Path) -> Path:
    """A curriculum's name, one of its aliases, or the path of a YAML file -> the file. UserError if none fits."""
    text = str(name_or_path)
    curricula = list_curricula(method)
    names = {alias: c.path for c in curricula for alias in c.aliases} | {c.name: c.path for c in curricula}
    if text in names:
        return names[text]
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"curriculum file {text} does not exist; give the path of a YAML file or a name of {method}")
    listing = ", ".join(sorted(c.name for c in curricula)) or "none"
    raise UserError(f"{method} has no curriculum {text!r}.{nearest(text, names)} Names: {listing}")


# --- reading


class _Text(str):
    """The right side of ``--set``: text for a text setting, YAML for any other."""


def _read_chain(path: Path, children: tuple[Path, ...]) -> list[_Layer]:
    """The layers of a file, its base first."""
    if path.resolve() in children:
        chain = " -> ".join(str(p.name) for p in (*children, path))
        raise UserError(f"{path}: 'base' goes round in a circle ({chain}); remove one of them")
    data = read_yaml(path)
    _refuse_interpolation(data, str(path))
    base = data.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base expects the path of one YAML file, got {base!r}")
    if base and not (path.parent / base).is_file():
        raise UserError(f"{path}: base {base} does not exist beside it; check the path")
    below = _read_chain(path.parent / base, (*children, path.resolve())) if base else []
    return [*below, _make_layer(str(path), data)]


def _make_layer(where: str, data: dict[str, Any]) -> _Layer:
    _refuse_interpolation(data, where)
    values = {key: value for key, value in data.items() if key not in EXTRA_KEYS}
    rows = data.get("stages")
    if rows is None:
        return _Layer(where, values)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: stages expects a list of mappings such as {{from_step: 0}}, got {rows!r:.60}")
    units = [key for row in rows for key in UNITS if key in row]
    unit = units[0] if units else "from_step"
    if len(set(units)) > 1 or len(units) != len(rows):
        raise UserError(f"{where}: every row of stages needs from_step, or every row from_kimg, not a mixture")
    starts = [row[unit] for row in rows]
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) or not math.isfinite(s) for s in starts):
        raise UserError(f"{where}: {unit} in stages expects a number, got {starts}")
    bounds = [round(start * UNITS[unit]) for start in starts] or [0]
    if any(start * UNITS[unit] != bound for start, bound in zip(starts, bounds, strict=False) if unit == "from_step"):
        raise UserError(f"{where}: from_step in stages expects whole numbers, got {starts}")
    if bounds[0] != 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise UserError(f"{where}: {unit} in stages must start at 0 and increase from row to row, got {starts}")
    return _Layer(where, values, [{k: v for k, v in row.items() if k != unit} for row in rows], unit, tuple(bounds))


def _parse_override(text: str) -> _Layer:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {text}: expected key=value, such as --set render.near=0.88")
    _refuse_interpolation({key: value}, f"--set {text}")
    if key.split(".")[0] in EXTRA_KEYS:
        raise UserError(f"--set {text}: {key.split('.')[0]} belongs into a configuration file")
    return _Layer(f"--set {text}", {key: _Text(value)})


def _refuse_interpolation(value: Any, where: str, key: str = "") -> None:
    if isinstance(value, str) and "${" in value:
        at = f" at '{key}'" if key else ""
        raise UserError(
            f"{where}: '${{...}}'{at} is refused, it can read environment variables; write the value itself"
        )
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _refuse_interpolation(name, where)
        _refuse_interpolation(item, where, f"{key}.{name}" if key else str(name))


# --- merging


def _build(schema: type[Schema], layers: list[_Layer]) -> StagedConfig[Schema]:
    staged = next((layer for layer in reversed(layers) if layer.rows is not None), None)
    rows = (staged.rows if staged else None) or [{}]
    unit, boundaries = (staged.unit, staged.boundaries) if staged else ("from_step", (0,))
    stages = []
    for stage in range(len(rows)):
        config = OmegaConf.structured(schema)
        for layer in layers:
            _assign(config, schema, layer.values, layer.where)
            for number, row in enumerate(rows[: stage + 1] if layer is staged else []):
                _assign(config, schema, row, f"{layer.where}, stages[{number}]")
        stages.append(_to_instance(config, schema, layers))
    return StagedConfig(stages, boundaries, unit)


def _to_instance(config: DictConfig, schema: type, layers: Sequence[_Layer]) -> Any:
    where = layers[-1].where if layers else schema.__name__
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        name = getattr(error, "full_key", None) or "a setting"
        raise UserError(f"{where}: {name} has no default; set it in the file or with --set {name}=VALUE") from error
    except ValueError as error:  # a __post_init__ of the schema
        message = str(error).splitlines()[0]
        for layer in layers:  # the last --set of what it names is to blame
            if layer.where.startswith("--set") and re.search(rf"\b{re.escape(next(iter(layer.values)))}\b", message):
                where = layer.where
        raise UserError(f"{where}: {message}") from error


def _assign(config: DictConfig, schema: type, values: Mapping[str, Any], where: str) -> None:
    seen: set[str] = set()
    for path, hint, value in _leaves(schema, values, where, ()):
        dotted = ".".join(path)
        if dotted in seen:
            raise UserError(f"{where}: {dotted} is set twice; keep one")
        seen.add(dotted)
        node = config
        for name in path[:-1]:
            if node[name] is None:  # an optional group that gets its first value
                group = _dataclass_in(_hints(typing.cast(type, OmegaConf.get_type(node)))[name])
                with read_write(node):
                    node[name] = OmegaConf.structured(group)
            node = node[name]
        try:
            with warnings.catch_warnings(), read_write(node):
                warnings.simplefilter("ignore", FutureWarning)  # list to tuple and the like is what YAML needs
                OmegaConf.update(node, path[-1], _checked(hint, value), merge=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            _wrong_type(where, dotted, hint, value, error)


def _leaves(
    schema: type, values: Any, where: str, prefix: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Walk nested and dotted keys along the dataclass -> (path, declared type, value); UserError on unknown keys."""
    hints = _hints(schema)
    for key, value in values.items():
        name, _, rest = str(key).partition(".")
        path = (*prefix, name)
        if name not in hints:
            hint = _elsewhere(name, schema, prefix) or nearest(name, hints) or f" Known here: {', '.join(hints)}"
            raise UserError(f"{where}: unknown setting '{'.'.join(path)}'.{hint}")
        nested = _dataclass_in(hints[name])
        if rest and nested is None and not _is_mapping(hints[name]):
            raise UserError(f"{where}: '{'.'.join(path)}' is one value, it has no part '{rest}'")
        value = {rest: value} if rest else value
        if isinstance(value, _Text):
            value = _read_text(hints[name], value)
        elif isinstance(value, dict) and nested is None:
            value = {k: _read_text(None, v) if isinstance(v, _Text) else v for k, v in value.items()}
        if nested is not None and isinstance(value, dict):
            yield from _leaves(nested, value, where, path)
            continue
        for index, item in enumerate(value if isinstance(value, list) else ()):
            row = next(filter(None, map(_dataclass_in, typing.get_args(hints[name]))), None)
            if row is not None and isinstance(item, dict):
                list(_leaves(row, item, where, (*path, str(index))))
        yield path, hints[name], value


def _read_text(hint: Any, text: _Text) -> Any:
    if _without_none(hint) in (str, Path) and text not in ("null", "~"):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return str(text[1:-1] if quoted else text)
    try:
        return parse_yaml(text) if text.strip() else str(text)
    except YAML_ERRORS:
        return str(text)


def _checked(hint: Any, value: Any) -> Any:
    """Refuse what omegaconf would bend: numbers as text, NaN. A whole float such as 2e5 is an int."""
    kind = _without_none(hint)
    if kind in (str, Path) and value is not None and not isinstance(value, str):
        raise TypeError("put it in quotes")
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and kind in (int, float):
        value = kind(value)
    elif type(value) is int and float in typing.get_args(kind) and int not in typing.get_args(kind):
        value = float(value)
    if value == "???" or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("not a value")
    return value


def _wrong_type(where: str, key: str, hint: Any, value: Any, error: Exception) -> NoReturn:
    remedy = f"; {error}" if str(error) == "put it in quotes" and not isinstance(value, (dict, list)) else ""
    got = f"{value!r:.60} ({type(value).__name__})"
    raise UserError(f"{where}: {key} expects {_type_name(hint)}, got {got}{remedy}") from error


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _without_none(hint: Any) -> Any:
    """``float | None`` -> ``float``; other unions stay."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else hint
    return hint


def _dataclass_in(hint: Any) -> type | None:
    kind = _without_none(hint)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(_without_none(hint)) in (dict, Mapping)


def _elsewhere(name: str, schema: type, prefix: tuple[str, ...]) -> str:
    """A hint for a right name at the wrong depth."""
    for key, hint in _hints(schema).items():
        nested = _dataclass_in(hint)
        if nested is not None and name in _hints(nested):
            return f" Did you mean '{'.'.join((*prefix, key, name))}'?"
    return ""


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(_hints(hint))}"
    if typing.get_args(hint):
        parts = ", ".join("..." if part is ... else _type_name(part) for part in typing.get_args(hint))
        return f"{getattr(hint, '__name__', hint)}[{parts}]"
    return getattr(hint, "__name__", str(hint))


# --- writing


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The nested differences that turn ``before`` into ``after``."""
    changed = {}
    for key, value in after.items():
        if key not in before or value != before[key] or type(value) is not type(before[key]):
            both = isinstance(value, dict) and isinstance(before.get(key), dict)
            changed[key] = _changes(before[key], value) if both else value
    return changed


def _diff_dicts(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _diff_dicts(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found
