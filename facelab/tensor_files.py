# SPDX-License-Identifier: Apache-2.0
"""Files of tensors that other programs wrote: safetensors and torch.save, nothing in them runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from facelab.errors import UserError


@contextmanager
def one_line_for(path: str | Path, expected: str, remedy: str) -> Iterator[None]:
    """UserError of one line for whatever a reader raises on a damaged or foreign file.

    The readers' own text stays away: torch's is advice to run what stands in the file.

    Args:
        path: of the file.
        expected: what it should be, "MTCNN weights".
        remedy: how the user gets it.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{path}: expected {expected}, got a file that is damaged or holds more than tensors "
            f"({type(error).__name__}); {remedy}"
        ) from error


def read_tensor_file(path: str | Path, expected: str, remedy: str) -> Any:
    """What a file holds: tensors by name of ``.safetensors``, otherwise tensors, numbers, text and containers of them.

    Args:
        path, expected, remedy: see :func:`one_line_for`.

    Raises:
        UserError: the file cannot be read, is damaged or holds something else.
    """
    path = Path(path)
    with one_line_for(path, expected, remedy):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
