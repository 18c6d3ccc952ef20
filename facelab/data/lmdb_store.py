# SPDX-License-Identifier: Apache-2.0
"""LMDB as StyleSDF and CNeRF keep pictures: ``"{size}-{index:05d}"`` -> PNG bytes, ``"length"`` -> number of pictures.

Nothing here needs torch. The ``lmdb`` package is an extra: ``pip install facelab[lmdb]``.
"""

from __future__ import annotations

import json
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from facelab.errors import UserError
from facelab.files import make_folder

LENGTH = b"length"
PROGRESS = b"facelab-progress"  # there while a conversion is under way, never together with LENGTH
DATA = "data.mdb"
_ENTRY = re.compile(rb"(\d+)-(\d{5,})")
_UNWRITTEN = 16  # last pages that a whole file may lack, because a transaction freed them before they were written
_FIRST_MAP = 1 << 28  # bytes of address space to begin with; doubled when full


def key_of(size: int, index: int) -> bytes:
    """The key of a picture.

    >>> key_of(64, 7), key_of(512, 123456)
    (b'64-00007', b'512-123456')
    """
    return f"{size}-{index:05d}".encode()


def is_lmdb(path: str | Path) -> bool:
    """Whether ``path`` is a folder with ``data.mdb`` or a single ``.mdb`` file."""
    path = Path(path)
    return (path / DATA).is_file() or (path.is_file() and path.suffix.lower() in (".mdb", ".lmdb"))


class LmdbStore:
    """A finished set, read only and without locks.

    Threads share one store. Processes may inherit or unpickle it: each opens the file for itself. Several stores of
    one path share what is open, because LMDB must not open a file twice in a process.

    Args:
        path: folder with ``data.mdb``, or a single file.

    Attributes:
        length: number of pictures.

    Raises:
        UserError: no LMDB there, cut short, not finished, or the ``lmdb`` package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        if not is_lmdb(self.root):
            got = "a folder without it" if self.root.is_dir() else "a file" if self.root.exists() else "nothing"
            raise UserError(
                f"no LMDB at {self.root}: expected a folder with {DATA}, got {got}; check the path or make one with "
                "scripts/prepare_data.py lmdb"
            )
        self._opened = _Opened.at(self.root)
        self.length = self._read_length()

    def __len__(self) -> int:
        return self.length

    def __reduce__(self) -> tuple[Any, ...]:
        return LmdbStore, (self.root,)

    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of which there are entries, ascending. Leaps from size to size, reads no picture."""
        found = []
        with self._cursor() as cursor:
            there = cursor.first()
            while there:
                match = _ENTRY.fullmatch(bytes(cursor.key()))
                if match:
                    found.append(int(match[1]))
                    there = cursor.set_range(match[1] + b".")  # "." follows "-": behind all entries of this size
                else:
                    there = cursor.next()
        return tuple(sorted(found))

    def indices(self, size: int) -> list[int]:
        """Numbers of the entries of a size, ascending; reads keys only."""
        prefix, found = f"{size}-".encode(), []
        with self._cursor() as cursor:
            there = cursor.set_range(prefix)
            while there and bytes(cursor.key()).startswith(prefix):
                match = _ENTRY.fullmatch(bytes(cursor.key()))
                if match:
                    found.append(int(match[2]))
                there = cursor.next()
        return sorted(found)

    def read(self, size: int, index: int) -> bytes:
        """PNG bytes of a picture. UserError if there is no such entry."""
        key = key_of(size, index)
        with _explained(self.root), self._opened.environment().begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise UserError(
                f"{self.name_of(size, index)}: no such entry, though the set states {self.length} pictures; "
                "make the set again with scripts/prepare_data.py lmdb"
            )
        return value

    def name_of(self, size: int, index: int) -> str:
        """What messages call an entry."""
        return f"{self.root}/{key_of(size, index).decode()}"

    def _read_length(self) -> int:
        with _explained(self.root), self._opened.environment().begin() as transaction:
            length, progress = transaction.get(LENGTH), transaction.get(PROGRESS)
        if progress is not None or length is None:
            done = (
                "" if progress is None else f" ({read_progress(progress, self.root).get('index', 0)} pictures so far)"
            )
            raise UserError(
                f'{self.root}: the conversion into this LMDB was not finished{done}: it has no "length"; '
                "give the same prepare_data.py lmdb command again"
            )
        if not length.isdigit() or int(length) < 1:
            raise UserError(f'{self.root}: "length" must be a positive number, got {length[:20]!r}; make the set again')
        return int(length)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        with (
            _explained(self.root),
            self._opened.environment().begin(buffers=True) as transaction,
            transaction.cursor() as cursor,
        ):
            yield cursor


class LmdbWriter:
    """An LMDB that is being filled; each :meth:`commit` is all or nothing, whatever happens to the process.

    Until :meth:`finish` there is no ``length``, so neither :class:`LmdbStore` nor other readers take the set for whole.

    Args:
        path: folder; made if it is not there.

    Attributes:
        progress: what the last commit of an earlier run stored, or None in a fresh set.
        length: number of pictures if the set is finished, else None.

    Raises:
        UserError: the folder cannot be written, holds another kind of file, or another process is writing into it.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = make_folder(path)
        lmdb = _package()
        self._full: type[Exception] = lmdb.MapFullError
        with _explained(self.root):
            self._environment = lmdb.open(str(self.root), map_size=_FIRST_MAP, readahead=False, meminit=False)
        try:
            _check_whole(self._environment, self.root / DATA)
        except UserError:
            self._environment.close()
            raise
        with _explained(self.root):
            used = os.path.getsize(self.root / DATA)
            if used > self._environment.info()["map_size"]:
                self._environment.set_mapsize(2 * used)
            with self._environment.begin() as transaction:
                self._stored = transaction.get(PROGRESS)
                length = transaction.get(LENGTH)
        self.progress = None if self._stored is None else read_progress(self._stored, self.root)
        self.length = int(length) if length is not None and length.isdigit() else None

    def commit(self, entries: Mapping[bytes, bytes], progress: Mapping[str, Any]) -> None:
        """Write entries and how far the conversion is, as one step. UserError if the disk is full."""
        record = json.dumps(dict(progress)).encode()
        self._write({**entries, PROGRESS: record}, remove=LENGTH)
        self._stored, self.progress = record, dict(progress)

    def finish(self, length: int) -> None:
        """State the number of pictures: from here on the set is whole."""
        self._write({LENGTH: str(length).encode()}, remove=PROGRESS)
        self._stored, self.progress, self.length = None, None, length

    def close(self) -> None:
        """Close the file; safe to repeat."""
        self._environment.close()

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, entries: Mapping[bytes, bytes], remove: bytes) -> None:
        with _explained(self.root):
            while True:
                try:
                    with self._environment.begin(write=True) as transaction:
                        if transaction.get(PROGRESS) != self._stored:
                            raise UserError(
                                f"{self.root}: another process is writing into this LMDB; wait for it or choose another "
                                "folder"
                            )
                        for key, value in entries.items():
                            transaction.put(key, value)
                        transaction.delete(remove)
                    return
                except self._full:  # nothing of the transaction was kept
                    self._environment.set_mapsize(2 * self._environment.info()["map_size"])


class _Opened:
    """A file opened once in a process, for all stores of its path; opened again after a fork."""

    _all: ClassVar[weakref.WeakValueDictionary[str, _Opened]] = weakref.WeakValueDictionary()
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = -1
        self._environment: Any = None

    @classmethod
    def at(cls, path: Path) -> _Opened:
        name = os.path.realpath(path)
        with cls._guard:
            opened = cls._all.get(name)
            if opened is None:
                opened = cls._all[name] = cls(path)
        return opened

    def environment(self) -> Any:
        if self._process == os.getpid():
            return self._environment
        with _Opened._guard:
            if self._process != os.getpid():
                if self._environment is not None:
                    self._environment.close()  # a parent's handle must not be used here
                self._environment = self._open()
                self._process = os.getpid()
        return self._environment

    def _open(self) -> Any:
        lmdb = _package()
        with _explained(self.path):
            environment = lmdb.open(
                str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
            )
        try:
            _check_whole(environment, self.path / DATA if self.path.is_dir() else self.path)
        except UserError:
            environment.close()
            raise
        return environment

    def __del__(self) -> None:
        if self._environment is not None:
            self._environment.close()


def _new_guard() -> None:
    _Opened._guard = threading.Lock()  # another thread of the parent may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_guard)


def _check_whole(environment: Any, file: Path) -> None:
    """UserError if the file is shorter than its last page says: touching what is missing would kill the process."""
    page = environment.stat()["psize"]
    needed, size = (environment.info()["last_pgno"] + 1) * page, file.stat().st_size
    if size + _UNWRITTEN * page < needed:
        raise UserError(f"{file}: cut short, expected {needed} bytes, got {size}; copy or make the set again")


def read_progress(record: bytes, origin: Path) -> dict[str, Any]:
    """The record of an unfinished conversion. UserError if it is not one of ours."""
    try:
        content = json.loads(record)
        if isinstance(content, dict) and isinstance(content.get("index"), int):
            return content
    except ValueError:
        pass
    raise UserError(f"{origin}: the record of its conversion is damaged; remove the folder and convert again")


def _package() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LMDB sets need the lmdb package, which is not installed; pip install facelab[lmdb]") from error
    return lmdb


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """LMDB's and the system's errors as one line."""
    lmdb = _package()
    try:
        yield
    except lmdb.MapFullError:
        raise
    except (lmdb.Error, OSError) as error:
        reason = " ".join(str(error).split())
        if "No space left" in reason or "ENOSPC" in reason:
            reason = (
                "the disk is full; free some space, what was written before is intact and the command goes on there"
            )
        elif "already open" in reason:
            reason = "it is open in this process already; close the other reader or writer first"
        else:
            reason = f"{reason.removeprefix(f'{path}: ')}; check the path, or make the set again"
        raise UserError(f"{path}: cannot be used as LMDB: {reason}") from error
