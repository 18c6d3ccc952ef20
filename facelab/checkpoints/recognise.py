# SPDX-License-Identifier: Apache-2.0
"""Which official file is this? Told by checksum where one is known, else by names and shapes of the tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from facelab import assets
from facelab.assets import Asset
from facelab.checkpoints import format as checkpoint_format
from facelab.checkpoints import legacy_modules, tensor_files
from facelab.checkpoints.legacy_pickle import LegacyObject, read_pickle_checkpoint
from facelab.checkpoints.legacy_storages import open_archive, printable, refusing
from facelab.checkpoints.torchscript import read_torchscript
from facelab.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
# How sure a match is, best first. kind: tensors of such names, other sizes (or the sizes are not known).
CERTAINTIES = ("checksum", "structure", "kind")


@dataclass(frozen=True)
class Contents:
    """What a file holds, without its numbers.

    groups: key in the file ('' for the file itself) -> tensor name -> shape. average: shapes of a moving average in
    order, None if it is none. records: whole pickled modules by the same keys. meta: of facelab's own files.
    """

    container: str
    groups: Mapping[str, Shapes] = field(default_factory=dict)
    average: tuple[tuple[int, ...], ...] | None = None
    records: Mapping[str, LegacyObject] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)
    meta: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Match:
    """A manifest entry that fits, how surely, and how many attributes (of a kind: and tensors) of the file confirm it."""

    asset: Asset
    certainty: str
    confirmed: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is better."""
        return CERTAINTIES.index(self.certainty), -self.confirmed


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found; ``matches`` are sorted, best first."""

    path: Path
    contents: Contents
    matches: tuple[Match, ...] = ()

    @property
    def best(self) -> tuple[Match, ...]:
        """The matches that nothing in the file tells apart; empty if the file is not known."""
        return tuple(m for m in self.matches if m.rank == self.matches[0].rank)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods and bases that the best matches belong to; of facelab's own files, the one that is stored."""
        if self.contents.meta is not None:
            return (str(self.contents.meta.get("method", "not stored")),)
        return tuple(dict.fromkeys(method for match in self.best for method in match.asset.methods))

    @property
    def text(self) -> str:
        """A line for people."""
        parts = [f"{self.path}: {self.contents.container}"]
        if self.contents.meta is not None:
            return f"{parts[0]} of method {self.methods[0]}, step {self.contents.meta.get('step', 'not stored')}"
        if self.contents.average is not None:
            parts.append(f"moving average of {len(self.contents.average)} tensors")
        groups = [
            f"{len(shapes)} tensors" + (f" under '{key}'" if key else "")
            for key, shapes in self.contents.groups.items()
        ]
        parts.append(", ".join(groups))
        classes = {record.class_path for record in self.contents.records.values()}
        parts.append(f"class {', '.join(sorted(classes))}" if classes else "")
        if self.best:
            words = {
                "checksum": "known by its checksum",
                "structure": "known by its tensors",
                "kind": "of the same kind",
            }
            names = " or ".join(m.asset.name for m in self.best)
            parts.append(f"{names} ({words[self.best[0].certainty]}; {', '.join(self.methods)})")
        else:
            parts.append("not a file of the manifest")
        return printable("; ".join(filter(None, parts)))


def describe(path: str | Path, entries: Iterable[Asset] | None = None) -> Description:
    """Recognise a file by content, whatever its name.

    Args:
        path: official file, or a checkpoint of facelab (folder or file).
        entries: manifest entries to compare with; all by default.

    Raises:
        UserError: missing, unreadable or refused (see ``legacy_pickle``).
    """
    path = Path(path)
    entries = list(assets.manifest().values() if entries is None else entries)
    by_checksum = [Match(asset, "checksum") for asset in entries if path.is_file() and has_checksum_of(path, asset)]
    if by_checksum:
        try:
            contents = read_contents(path)
        except UserError:  # a known file of a kind that is not read here
            contents = Contents("known file")
        return Description(path, contents, tuple(by_checksum))
    contents = read_contents(path)
    found = [match for asset in entries if (match := _match(asset, contents)) is not None]
    return Description(path, contents, tuple(sorted(found, key=lambda match: match.rank)))


def read_contents(path: str | Path) -> Contents:
    """Names and shapes in a file. UserError if it cannot be read."""
    path = Path(path)
    if path.is_dir() or not path.exists() or path.name == checkpoint_format.INDEX:
        loaded = checkpoint_format.load_checkpoint(path, with_state=False)
        return Contents("facelab checkpoint", {g: _shapes(t) for g, t in loaded.weights.items()}, meta=loaded.meta)
    if path.suffix == ".safetensors":
        return _safetensors_contents(path)
    with refusing(path), open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"MATLAB 5.0"):
        return _mat_contents(path)
    if head.startswith(b"PK\x03\x04") and _is_torchscript(path):
        return Contents("TorchScript archive", {"": _shapes(read_torchscript(path))})
    tree = read_pickle_checkpoint(path)
    average = legacy_modules.find_average(tree)
    if average is not None:
        shapes = tuple(tuple(tensor.shape) for tensor in average.shadow_params)
        return Contents(
            "pickle", average=shapes, attributes={"decay": average.decay, "num_updates": average.num_updates}
        )
    groups = {key: _shapes(state) for key, state in legacy_modules.find_state_dicts(tree).items()}
    records = {"": tree} if isinstance(tree, LegacyObject) else tree if isinstance(tree, dict) else {}
    modules = {str(key): record for key, record in records.items() if legacy_modules.is_module(record)}
    return Contents("pickle", groups, records=modules)


def digest_of(shapes: Shapes | Sequence[tuple[int, ...]], optional: Iterable[str] = ()) -> str:
    """16 hex digits of the SHA-256 over sorted ``name shape`` lines (of a sequence: over its shapes in order)."""
    if isinstance(shapes, Mapping):
        left_out = set(optional)
        lines = sorted(f"{name} {_text(shape)}" for name, shape in shapes.items() if name not in left_out)
    else:
        lines = [_text(shape) for shape in shapes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def has_checksum_of(path: Path, asset: Asset) -> bool:
    """Whether a file has the known checksum (SHA-256, else MD5) of an entry. False where none is known."""
    if asset.sha256 is None and asset.md5 is None:
        return False
    if asset.size is not None and path.stat().st_size != asset.size:
        return False
    name, expected = ("sha256", asset.sha256) if asset.sha256 else ("md5", asset.md5)
    return checksum(path, name) == expected


def checksum(path: Path, name: str = "sha256") -> str:
    """Hex digest of a file."""
    total = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()


def _match(asset: Asset, contents: Contents) -> Match | None:
    structure = asset.structure
    if structure is None or contents.meta is not None:
        return None
    if structure.average != (contents.average is not None):
        return None
    if contents.average is not None:
        confirmed = _confirmed(structure.attributes, contents.attributes)
        exact = digest_of(contents.average) == structure.digest
        if confirmed is None or not exact:
            return None
        return Match(asset, "structure", confirmed)
    shapes = contents.groups.get(structure.group)
    if shapes is None or not all(_fits(shapes.get(key), wanted) for key, wanted in structure.has.items()):
        return None
    record = contents.records.get(structure.group)
    confirmed = 0
    if record is not None:
        found = _confirmed(structure.attributes, record.state)
        if found is None:
            return None
        confirmed = found
    exact = structure.digest is not None and digest_of(shapes, structure.optional) == structure.digest
    if record is not None and structure.class_path is not None:
        same_class = structure.class_path in legacy_modules.module_classes(record).values()
        confirmed += same_class
        exact = exact and same_class
    if not exact and not structure.has:
        return None
    if exact:
        return Match(asset, "structure", confirmed)
    return Match(asset, "kind", confirmed + len(structure.has))  # what asks for more tensors fits better


def _confirmed(wanted: Mapping[str, object], state: Mapping[str, object]) -> int | None:
    """How many of the wanted attributes the file has with that value; None if one has another value."""
    count = 0
    for path, value in wanted.items():
        found: object = state
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            continue
        if not _equal(found, value):
            return None
        count += 1
    return count


def _equal(found: object, wanted: object) -> bool:
    if isinstance(found, Tensor):
        found = found.tolist()  # type: ignore[attr-defined]
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(wanted) and all(map(_equal, found, wanted))
    if isinstance(wanted, float) or isinstance(found, float):
        return (
            isinstance(found, (int, float))
            and isinstance(wanted, (int, float))
            and math.isclose(found, wanted, rel_tol=1e-6)
        )
    return found == wanted


def _fits(shape: tuple[int, ...] | None, wanted: Sequence[int | str]) -> bool:
    if shape is None or len(shape) != len(wanted):
        return False
    return all(size in ("*", n) for n, size in zip(shape, wanted, strict=True))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _text(shape: Sequence[int]) -> str:
    return "(" + ",".join(str(n) for n in shape) + ")"


def _safetensors_contents(path: Path) -> Contents:
    header, named = tensor_files.read_metadata(path)
    shapes = {name: shape for name, (_, shape) in named.items()}
    if header.get("format") != "facelab":
        return Contents("safetensors", {"": shapes})
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = shape
    return Contents("facelab model", groups, meta=tensor_files.model_meta(header))


def _mat_contents(path: Path) -> Contents:
    from scipy.io import whosmat

    try:
        return Contents("MATLAB file", {"": {name: tuple(shape) for name, shape, _ in whosmat(path)}})
    except (ValueError, TypeError, OSError, EOFError, KeyError, IndexError) as error:
        raise UserError(f"cannot read {path}: expected a MATLAB 5 file, got '{error}'; download it again") from error


def _is_torchscript(path: Path) -> bool:
    with refusing(path), open_archive(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
