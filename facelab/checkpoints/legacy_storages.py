# SPDX-License-Identifier: Apache-2.0
"""The storages behind foreign tensors, read within what the file can hold, and refusals in one printable line."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from facelab.checkpoints.pickle_machine import Operations, Refused
from facelab.errors import UserError

_MAX_EXPANDED = 1 << 27  # elements that stride-0 views may claim beyond their storage, for a whole file
_MAX_DIRECTORY = 1 << 21  # bytes of an archive's list of contents: some twenty thousand entries
# What Python's zip reader raises on damaged archives.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError,
)  # fmt: skip

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class GlobalName:
    """A global that a pickle names: text, never the thing itself."""

    path: str


@dataclass(frozen=True)
class Storage:
    """The flat tensor behind a persistent id, or one that is still to be filled."""

    flat: Tensor


@dataclass
class Budget:
    """What one file may cost, nested streams included."""

    bytes_left: int
    expanded_left: int = _MAX_EXPANDED
    operations: Operations = field(default_factory=Operations)

    def take(self, count: int, what: str) -> None:
        """Pay for ``count`` bytes; Refused when the file cannot have so many."""
        if count < 0 or count > self.bytes_left:
            raise Refused(f"{what} claims {count} bytes, more than the file holds")
        self.bytes_left -= count

    def take_items(self, items: object) -> None:
        """Pay for a copy of a container: one container copied again and again would cost quadratic memory."""
        self.take(len(items), "a collection that is copied again and again")  # type: ignore[arg-type]


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a foreign file provokes into a UserError of one printable line."""
    try:
        yield
    except Refused as refusal:
        raise UserError(printable(f"{path} was not read: {refusal}")) from None
    except ARCHIVE_ERRORS as error:
        raise UserError(
            printable(f"{path} was not read: its archive is cut off or damaged ({error}); download it again")
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def printable(text: str) -> str:
    """Text that may come from a foreign file, in one line and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


class _LimitedReader(io.BufferedReader):
    """A file whose single reads are limited while ``limit`` is set."""

    limit: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.limit is not None:
            here = self.tell()
            wanted = size if size is not None and size >= 0 else self.seek(0, 2) - here
            self.seek(here)
            if wanted > self.limit:
                raise Refused(f"its archive lists its contents in {wanted} bytes, far more than a checkpoint needs")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file. Refused when it lists hundreds of thousands of entries, which Python reads one by one."""
    with _LimitedReader(io.FileIO(path)) as file:
        file.limit = _MAX_DIRECTORY
        with zipfile.ZipFile(file) as archive:
            file.limit = None
            yield archive


class ZipStorages:
    """The storages of a torch zip archive, each read once, never more than the file can hold."""

    def __init__(self, archive: zipfile.ZipFile, root: str, size: int, budget: Budget, folder: str = "data") -> None:
        self._archive, self._root, self._size, self._budget, self._folder = archive, root, size, budget, folder
        self._loaded: dict[str, Storage] = {}
        order = self.read("byteorder").strip() if f"{root}byteorder" in archive.NameToInfo else b"little"
        if order != b"little":
            raise Refused(f"expected little-endian data, got {order[:16]!r}")

    def read(self, name: str) -> bytes:
        """One member. Refused if it is compressed or larger than the archive."""
        try:
            info = self._archive.getinfo(self._root + name)
        except KeyError:
            raise Refused(f"the archive has no entry {name}; it is damaged, download it again") from None
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._size:
            raise Refused(f"entry {name} is compressed or larger than the file; torch writes neither")
        self._budget.take(info.file_size, f"entry {name}")
        return self._archive.read(info)

    def load(self, identifier: object) -> Storage:
        """The storage of a persistent id ('storage', type, key, location, count); the location is ignored."""
        dtype, key, count = storage_request(identifier)
        if key not in self._loaded:
            data = self.read(f"{self._folder}/{key}")
            if len(data) != count * dtype.itemsize:
                raise Refused(
                    f"storage {key} should hold {count * dtype.itemsize} bytes, got {len(data)}; download it again"
                )
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._loaded[key] = Storage(flat)
        storage = self._loaded[key]
        return storage if storage.flat.dtype == dtype else Storage(storage.flat.view(dtype))


def storage_request(identifier: object) -> tuple[torch.dtype, str, int]:
    """(dtype, key, element count) of a persistent id; Refused if it does not look like torch's."""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
        raise Refused("it refers to something outside itself that is no tensor storage")
    _, kind, key, _, count = identifier[:5]
    name = kind.path.rpartition(".")[2] if isinstance(kind, GlobalName) else ""
    if type(key) is not str or not re.fullmatch(r"\w{1,64}", key) or type(count) is not int or count < 0:
        raise Refused("it has a storage with an unusual name or size")
    if name not in STORAGE_DTYPES:
        raise Refused(f"it has a storage of unknown kind '{name[:40] or type(kind).__name__}'")
    return STORAGE_DTYPES[name], key, count


class StreamStorages:
    """Storages of the old format: made when the pickle names them, filled from the data behind it."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._made: dict[str, Tensor] = {}

    def load(self, identifier: object) -> Storage:
        dtype, key, count = storage_request(identifier)
        if key not in self._made:
            self._budget.take(count * dtype.itemsize, f"storage {key}")
            self._made[key] = torch.empty(count, dtype=dtype)
        flat = self._made[key]
        view = identifier[5] if len(identifier) > 5 else None  # type: ignore[arg-type, index]
        if view is None:
            return Storage(flat)
        _, start, length = view
        if not 0 <= start <= start + length <= flat.numel():
            raise Refused(f"a view of storage {key} reaches outside of it")
        return Storage(flat[start : start + length])

    def fill(self, view: memoryview, keys: object, position: int) -> None:
        if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(self._made):
            raise Refused("its list of storages does not fit its tensors")
        for key in keys:
            flat = self._made[key]
            end = position + 8 + flat.numel() * flat.itemsize
            if end > len(view):
                raise Refused(
                    f"the file is cut off: storage {key} needs {end - len(view)} bytes more; download it again"
                )
            (count,) = struct.unpack("<q", view[position : position + 8])
            if count != flat.numel():
                raise Refused(f"storage {key} should hold {flat.numel()} numbers, got {count}")
            if count:
                flat.copy_(torch.frombuffer(bytearray(view[position + 8 : end]), dtype=flat.dtype))
            position = end
