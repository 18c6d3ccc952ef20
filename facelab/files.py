# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from facelab.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` if the block succeeds.

    The temporary file keeps the suffix of ``path`` (writers that choose a format by name work),
    is flushed to disk before the rename and removed on failure.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush_to_disk(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from error
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise UserError(describe_os_error(OSError(number, os.strerror(number)), path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _system_error(error: Exception) -> int | None:
    """The error number in a message of safetensors, whose failed writes are no OSError; None where there is none."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__module__.startswith("safetensors") else None
    return None if found is None else int(found[1])


def describe_os_error(error: OSError, path: str | Path) -> str:
    """One line for a failed read or write of ``path``, with the remedy."""
    import errno

    remedies = {
        errno.ENOSPC: "the disk is full; free some space or choose another output folder, what was there before is intact",
        errno.EACCES: "permission denied; choose a folder you may write to",
        errno.EPERM: "permission denied; choose a folder you may write to",
        errno.EROFS: "the file system is read-only; choose another output folder",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another output folder",
        errno.EEXIST: "a file stands where a folder is needed; choose another output folder",
        errno.ENOENT: "no such file or folder; check the path",
        errno.EISDIR: "a folder stands where a file is needed; choose another name",
    }
    reason = remedies.get(error.errno or 0, error.strerror or str(error))
    return f"cannot write {path}: {reason}"


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents and prove that it can be written; UserError otherwise."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from error
    return path


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
