# SPDX-License-Identifier: Apache-2.0
"""Weight files that facelab does not make itself: what they are, where they may lie, what to say when one is missing.

``networks/manifest.yaml`` lists them. A file is looked up under an explicit path, in ``$FACELAB_HOME``, in
``networks/`` of the checkout, and among the bundled files of the installed package, in this order. Nothing here
downloads; ``scripts/weights.py`` does.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from facelab.errors import UserError, nearest
from facelab.yaml_files import read_yaml

KINDS = ("official", "auxiliary", "data", "bundled")
LOADERS = (
    "module_pickle",  # a whole torch module, pickled
    "average_pickle",  # a whole moving average, pickled: tensors without names
    "state_pickle",  # torch.save of state dictionaries
    "persistent_pickle",  # plain pickle with source text beside each module
    "torchscript",
    "safetensors",
    "mat",
    "none",  # not read by facelab itself yet
)


@dataclass(frozen=True)
class Structure:
    """How to know a file by its content.

    group: key of the state dict inside the file, '' for the file itself. tensors: how many it has. digest: first 16
    hex digits of the SHA-256 over its sorted ``name shape`` lines, without ``optional`` names (an average: over its
    shapes in order). has: tensor name -> shape, ``*`` for any size: true for every file of its kind, whatever the
    sizes. class_path: a class that a whole pickled module must name. attributes: dotted attribute -> value that
    the module must have, where it has the attribute at all. average: the file is a list of averaged tensors.
    """

    group: str = ""
    tensors: int | None = None
    digest: str | None = None
    optional: tuple[str, ...] = ()
    has: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    class_path: str | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)
    average: bool = False


@dataclass(frozen=True)
class Asset:
    """One entry of the manifest. None in sha256, md5 or size means: not known."""

    name: str
    kind: str
    file: str
    description: str
    methods: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    where: str | None = None
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    licence: str = "not known"
    loader: str = "none"
    structure: Structure | None = None
    hint: str | None = None

    @property
    def source(self) -> str:
        """Where to get it, in words."""
        if self.kind == "bundled":
            return "comes with facelab; install it again"
        fetch = f"python scripts/weights.py fetch {self.name}" if self.urls else None
        return "; or ".join(filter(None, [fetch, self.where])) or "no source is known"


def networks_folder() -> Path:
    """``networks/`` of the checkout, or its copy inside an installed package."""
    checkout = _checkout()
    return checkout / "networks" if checkout else _package() / "_data" / "networks"


def roots() -> list[Path]:
    """Folders that are searched for weight files, in order: $FACELAB_HOME, the checkout's networks/, the package's."""
    home = os.environ.get("FACELAB_HOME")
    checkout = _checkout()
    found = [Path(home).expanduser()] if home else []
    return [*found, *([checkout / "networks"] if checkout else []), _package() / "_data" / "networks"]


def store() -> Path:
    """Folder that takes imported and fetched files: $FACELAB_HOME, else the checkout's networks/.

    UserError when there is neither.
    """
    home = os.environ.get("FACELAB_HOME")
    if home:
        return Path(home).expanduser()
    checkout = _checkout()
    if checkout is None:
        raise UserError(
            "there is no place for weight files: facelab is installed without a checkout; set FACELAB_HOME to a folder"
        )
    return checkout / "networks"


def manifest(path: str | Path | None = None) -> Mapping[str, Asset]:
    """Entries of ``networks/manifest.yaml`` (or another file) by name. UserError on a mistake in it."""
    return _read_manifest(Path(path) if path else networks_folder() / "manifest.yaml")


def get(name: str, entries: Mapping[str, Asset] | None = None) -> Asset:
    """The entry of that name; UserError with the nearest one if there is none."""
    entries = manifest() if entries is None else entries
    if name not in entries:
        raise UserError(
            f"no weights named '{name}' in the manifest.{nearest(name, entries)} "
            "'python scripts/weights.py list' shows them all"
        )
    return entries[name]


def locate(asset: Asset | str) -> Path | None:
    """Where the file of an entry lies, or None. Contents are not looked at."""
    asset = get(asset) if isinstance(asset, str) else asset
    return next((path for root in roots() if (path := root / asset.file).exists()), None)


def find(name: str, path: str | Path | None = None) -> Path:
    """The file of a manifest entry; ``path`` is what the user named explicitly and comes first.

    Raises:
        UserError: missing; the line says which file, where to get it and where to put it.
    """
    if path is not None:
        if not Path(path).exists():
            raise UserError(f"no file at {path}: expected {get(name).description}; check the path")
        return Path(path)
    asset = get(name)
    found = locate(asset)
    if found is None:
        try:
            target = str(store() / asset.file)
        except UserError:
            target = f"$FACELAB_HOME/{asset.file}"
        raise UserError(
            f"{asset.file} is missing ({asset.description}): get it ({asset.source}), then put it at {target} "
            "or run 'python scripts/weights.py import FOLDER'"
        )
    return found


def find_bundled(name: str) -> Path | None:
    """The file of a bundled model of that name, or None if no bundled model is called so.

    UserError when the entry exists and its file does not.
    """
    asset = manifest().get(name)
    return find(name) if asset is not None and asset.kind == "bundled" else None


def bundled() -> list[Asset]:
    """The models that come with facelab."""
    return [asset for asset in manifest().values() if asset.kind == "bundled"]


@functools.lru_cache(maxsize=8)
def _read_manifest(path: Path) -> Mapping[str, Asset]:
    data = read_yaml(path)
    entries = data.get("files")
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected an entry 'files' with one block for each file")
    return types.MappingProxyType({name: _asset(name, entry, path) for name, entry in entries.items()})


def _asset(name: str, entry: object, path: Path) -> Asset:
    where = f"{path}, entry '{name}'"
    values = _checked(entry, Asset, where)
    values["urls"] = tuple(values.pop("urls", None) or ())
    if values.get("structure") is not None:
        structure = _checked(values["structure"], Structure, f"{where}, structure")
        if "has" in structure:
            structure["has"] = {key: tuple(shape) for key, shape in structure["has"].items()}
        values["structure"] = Structure(**structure)
    asset = Asset(name=name, **values)
    for what, value, choices in (("kind", asset.kind, KINDS), ("loader", asset.loader, LOADERS)):
        if value not in choices:
            raise UserError(
                f"{where}: {what} is '{value}', expected one of {', '.join(choices)}.{nearest(value, choices)}"
            )
    if Path(asset.file).is_absolute() or ".." in Path(asset.file).parts:
        raise UserError(f"{where}: file is '{asset.file}', expected a relative path")
    return asset


def _checked(entry: object, kind: type, where: str) -> dict[str, typing.Any]:
    """Keys of a block against the fields of its dataclass; lists become tuples."""
    names = [f.name for f in fields(kind) if f.name != "name"]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a block of settings, got {entry!r}")
    for key in entry:
        if key not in names:
            raise UserError(f"{where}: unknown key '{key}'.{nearest(key, names)}")
    required = {"kind", "file", "description"} if kind is Asset else set()
    if missing := sorted(required - set(entry)):
        raise UserError(f"{where}: '{missing[0]}' is missing")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _package() -> Path:
    return Path(str(importlib.resources.files("facelab")))


def _checkout() -> Path | None:
    """The repository that this package runs from; None for an installed one."""
    parent = _package().parent
    return parent if (parent / "pyproject.toml").is_file() and (parent / "networks").is_dir() else None


def commands_missing(entries: Iterable[Asset]) -> dict[str, list[str]]:
    """Command -> names of the entries it needs that are not there."""
    missing: dict[str, list[str]] = {}
    for asset in entries:
        if asset.kind != "bundled" and locate(asset) is None:
            for command in asset.commands:
                missing.setdefault(command, []).append(asset.name)
    return missing
