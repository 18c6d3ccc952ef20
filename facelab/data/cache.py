# SPDX-License-Identifier: Apache-2.0
"""Prepared samples kept as plain arrays, so that training decodes every file once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from facelab.files import atomic_path, make_folder

AUTO_LIMIT = 2 << 30  # bytes; "auto" keeps data sets up to this size in memory

Sample = tuple[np.ndarray, "np.ndarray | None"]


class PreparedCache:
    """Uint8 pictures (N, S, S, 3) and masks (N, S, S), filled as they are first asked for.

    Threads and processes may fill the same entry twice: they write the same bytes. The flag of
    an entry is set after its bytes.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray | None, filled: np.ndarray) -> None:
        self.images, self.masks, self.filled = images, masks, filled

    @staticmethod
    def in_memory(count: int, side: int, masks: bool) -> PreparedCache:
        """An empty cache in this process's memory."""
        return PreparedCache(
            np.empty((count, side, side, 3), np.uint8),
            np.empty((count, side, side), np.uint8) if masks else None,
            np.zeros(count, bool),
        )

    @staticmethod
    def on_disk(folder: Path, files: list[Path], key: str, side: int, masks: bool) -> PreparedCache:
        """Memory-mapped ``.npy`` files, shared by all processes and kept for the next run.

        The names hold a digest of the chain and of every file's name, size and time, so a changed
        data set gets a new cache.

        Raises:
            UserError: the folder cannot be written or the disk is full.
        """
        make_folder(folder)
        digest = hashlib.blake2b(key.encode(), digest_size=8)
        for path in files:
            state = path.stat()
            digest.update(f"{path.name}/{state.st_size}/{state.st_mtime_ns}\n".encode())
        name = digest.hexdigest()
        count = len(files) // 2 if masks else len(files)
        return PreparedCache(
            _mapped(folder / f"{name}_images.npy", (count, side, side, 3)),
            _mapped(folder / f"{name}_masks.npy", (count, side, side)) if masks else None,
            _mapped(folder / f"{name}_filled.npy", (count,)),
        )

    @staticmethod
    def bytes_needed(count: int, side: int, masks: bool) -> int:
        return count * side * side * (4 if masks else 3)

    def get(self, index: int, make: Callable[[], Sample]) -> Sample:
        """Entry ``index``; ``make`` is called if it is not there yet."""
        if not self.filled[index]:
            image, mask = make()
            self.images[index] = image
            if self.masks is not None and mask is not None:
                self.masks[index] = mask
            self.filled[index] = 1
        return self.images[index], None if self.masks is None else self.masks[index]


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.exists():
        with atomic_path(path) as temporary:
            np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape).flush()
    return np.lib.format.open_memmap(path, mode="r+")
