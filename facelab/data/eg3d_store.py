# SPDX-License-Identifier: Apache-2.0
"""The container of EG3D's data sets: a folder, a zip, or a folder of zips, with labels in ``dataset.json``."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from facelab.data.reading import IMAGE_SUFFIXES
from facelab.errors import UserError

DESCRIPTION = "dataset.json"
LABEL_WIDTH = 25
LARGEST_FILE = 1 << 30  # bytes of one file in an archive, so that a hostile one cannot fill the memory
MASK_FOLDERS = {"images": "masks", "celebahq_mask_img": "celebahq_mask_mask"}
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)


class NamedBytes(io.BytesIO):
    """The bytes of a file under the name that messages show."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


class Store(Protocol):
    """Files by relative name, in whatever they lie."""

    root: Path

    def names(self) -> list[str]:
        """Every file, sorted, with ``/`` between folders."""
        ...

    def read(self, name: str) -> bytes:
        """UserError if the file is missing or damaged."""
        ...


class FolderStore:
    """A folder and its subfolders; names that begin with a dot are unfinished, not data."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(folder).relative_to(self.root)
            found += [(inside / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / name}: cannot be read ({error.strerror}); restore or remove it") from error


class OpenZips:
    """Open zip archives of this thread, the least recently used closed beyond ``limit``.

    Each thread of each process has its own file handles: a handle carried over a fork would share
    its position with the parent.
    """

    def __init__(self, limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"at least 1 archive must stay open, got {limit}")
        self.limit = limit
        self._local = threading.local()

    def get(self, path: Path) -> zipfile.ZipFile:
        """The open archive. zipfile's and the system's errors are passed on."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process, self._local.table = os.getpid(), OrderedDict()
        table: OrderedDict[Path, zipfile.ZipFile] = self._local.table
        if path not in table:
            table[path] = zipfile.ZipFile(path)
        table.move_to_end(path)
        while len(table) > self.limit:
            table.popitem(last=False)[1].close()
        return table[path]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenZips, (self.limit,)  # handles do not travel to other processes


class ZipStore:
    """One archive, or the ``*.zip`` files of a folder, whose members are called ``archive.zip/member``."""

    def __init__(self, root: Path, zips: OpenZips | None = None) -> None:
        self.root, self._zips = root, zips or OpenZips()
        self.archives = [root] if root.is_file() else sorted(root.glob("*.zip"))

    def names(self) -> list[str]:
        found = []
        for path in self.archives:
            members = [m.filename for m in self._open(path).infolist() if not m.is_dir()]
            found += [name if path == self.root else f"{path.name}/{name}" for name in members]
        return sorted(set(found))  # of members written twice the last one counts

    def read(self, name: str) -> bytes:
        path, member = self._locate(name)
        try:
            archive = self._open(path)
            size = archive.getinfo(member).file_size
            if size > LARGEST_FILE:
                raise UserError(
                    f"{path}/{member}: {size >> 20} MiB are no picture and no label file (limit {LARGEST_FILE >> 20}); "
                    "remove it from the archive"
                )
            return archive.read(member)
        except KeyError as error:
            raise UserError(f"{path}: holds no file {member}; make the data set again") from error
        except _ZIP_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}/{member}: damaged in the archive ({reason}); make the data set again") from error

    def _locate(self, name: str) -> tuple[Path, str]:
        if self.root.is_file():
            return self.root, name
        archive, _, member = name.partition("/")
        return self.root / archive, member

    def _open(self, path: Path) -> zipfile.ZipFile:
        try:
            return self._zips.get(path)
        except _ZIP_ERRORS as error:
            raise UserError(
                f"{path}: expected a zip archive, got a damaged or unfinished file ({error}); make or copy it again"
            ) from error


def open_store(root: str | Path) -> Store:
    """The container at ``root``. UserError if there is none."""
    root = Path(root)
    expected = f"expected a zip, or a folder with pictures and {DESCRIPTION}"
    if root.is_dir():
        inside = [path.suffix.lower() for path in root.iterdir() if not path.name.startswith(".")]
        return ZipStore(root) if inside and set(inside) == {".zip"} else FolderStore(root)
    if not root.is_file():
        raise UserError(f"no data set at {root}: {expected}, got no such file; check the path")
    if root.suffix.lower() != ".zip":
        raise UserError(f"no data set at {root}: {expected}, got a {root.suffix or 'nameless'} file; check the path")
    return ZipStore(root)


def split_names(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """-> (pictures, the mask of each picture that has one).

    Where ``images/`` has a neighbour ``masks/`` (or FENeRF's two folders have each other), PNG files of the
    second are masks of the pictures of the same name, and no pictures themselves.
    """
    pictures = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    folders = {part for name in pictures for part in name.split("/")[:-1]}
    present = {i: m for i, m in MASK_FOLDERS.items() if i in folders and m in folders}
    masks = {name for name in pictures if set(name.split("/")[:-1]) & set(present.values())}
    partners = {}
    for name in pictures:
        if name in masks:
            continue
        parts = name.split("/")
        for image_folder, mask_folder in present.items():
            if image_folder in parts[:-1]:
                parts[parts.index(image_folder)] = mask_folder
                mask = str(Path("/".join(parts)).with_suffix(".png").as_posix())
                if mask in masks:
                    partners[name] = mask
                break
    return [name for name in pictures if name not in masks], partners


def read_description(store: Store, names: list[str]) -> dict[str, Any] | None:
    """The content of ``dataset.json`` (of every archive, their labels under the archive's name); None without one.

    Raises:
        UserError: no JSON object.
    """
    found = [name for name in names if name == DESCRIPTION or name.split("/")[1:] == [DESCRIPTION]]
    inside = [name for name in found if name != DESCRIPTION and name.split("/")[0].endswith(".zip")]
    if DESCRIPTION in found:
        return _json_of(store, DESCRIPTION)
    if not inside:
        return None
    labels: list[Any] = []
    for name in inside:
        archive, part = name.split("/")[0], _json_of(store, name).get("labels")
        if part is None:
            return {"labels": None}
        labels += [[f"{archive}/{entry[0]}", *entry[1:]] for entry in _entries(part, store.root / name)]
    return {"labels": labels}


def read_labels(description: dict[str, Any] | None, names: list[str], origin: Path) -> Tensor | None:
    """(N, 25) float32 labels of the pictures ``names`` in this order; None if the set has none.

    Raises:
        UserError: one picture without a label, a label of another width or type, NaN or infinite numbers,
            one label per class instead of a camera.
    """
    path = origin / DESCRIPTION
    if description is None or description.get("labels") is None:
        return None
    table: dict[str, Any] = {}
    for entry in _entries(description["labels"], path):
        if entry[0] in table and table[entry[0]] != entry[1]:
            raise UserError(f"{path}: {entry[0]} has two different labels; expected one, remove one")
        table[entry[0]] = entry[1]
    rows = []
    for name in names:
        if name not in table:
            missing = sum(n not in table for n in names)
            raise UserError(
                f"{path}: no label for {name} ({missing} of {len(names)} pictures have none); add or remove them"
            )
        rows.append(_label(table[name], name, path))
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, LABEL_WIDTH)


def labelled_names(description: dict[str, Any] | None, origin: Path) -> set[str]:
    """Names of the pictures that the labels of a set are for, be they there or not."""
    if description is None or description.get("labels") is None:
        return set()
    return {entry[0] for entry in _entries(description["labels"], origin / DESCRIPTION)}


def _label(value: Any, name: str, path: Path) -> list[float]:
    if isinstance(value, int) and not isinstance(value, bool):
        raise UserError(
            f"{path}: the label of {name} is the class {value}, expected a camera of {LABEL_WIDTH} numbers; "
            "give the set camera labels with prepare_data.py eg3d --cameras"
        )
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != LABEL_WIDTH:
        got = f"{len(value)} values" if isinstance(value, list) else f"{type(value).__name__}"
        kind = "" if numbers or not isinstance(value, list) else " that are not all numbers"
        raise UserError(
            f"{path}: the label of {name} must be {LABEL_WIDTH} numbers (16 camera-to-world, 9 intrinsics), "
            f"got {got}{kind}; mend the label"
        )
    if not all(abs(v) < float("inf") for v in value):  # false for NaN too
        raise UserError(f"{path}: the label of {name} holds NaN or infinite numbers; mend or remove it")
    return [float(v) for v in value]


def _entries(labels: Any, path: Path) -> list[Any]:
    if isinstance(labels, dict):
        labels = [[name, value] for name, value in labels.items()]
    good = isinstance(labels, list) and all(
        isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in labels
    )
    if not good:
        raise UserError(f'{path}: "labels" must be a list of [file name, {LABEL_WIDTH} numbers]; mend the file')
    return [[e[0].replace("\\", "/").removeprefix("./"), e[1]] for e in labels]


def _json_of(store: Store, name: str) -> dict[str, Any]:
    try:
        content = json.loads(store.read(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{store.root / name}: expected JSON, got {' '.join(str(error).split())}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{store.root / name}: expected a JSON object with labels, got {type(content).__name__}; mend it"
        )
    return content
