# SPDX-License-Identifier: Apache-2.0
"""The two optional packages behind text prompts: imported when they are needed, quiet, told not to download."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from facelab.errors import UserError

INSTALL = "pip install 'facelab[text]'"
WORD_FILES = ("vocab.json", "merges.txt")


def package(name: str) -> Any:
    """diffusers or transformers. UserError with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"text prompts need the package {name}, which is not installed or not complete: {INSTALL}"
        ) from error


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the packages' progress bars and notes; both are put back."""
    tools = [package(name).utils.logging for name in names]
    before = [(tool.get_verbosity(), tool.is_progress_bar_enabled()) for tool in tools]
    try:
        for tool in tools:
            tool.set_verbosity_error()
            tool.disable_progress_bar()
        yield
    finally:
        for tool, (level, bars) in zip(tools, before, strict=True):
            tool.set_verbosity(level)
            if bars:
                tool.enable_progress_bar()


def has_words(folder: Path) -> bool:
    """Whether a CLIP tokenizer's word list lies there."""
    return all((folder / name).is_file() for name in WORD_FILES)


def read_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer of a folder. UserError where its word list is damaged."""
    transformers = package("transformers")
    try:
        with quiet("transformers"):
            return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # json, tokenizers and transformers raise many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{folder}: the word list cannot be read: expected {' and '.join(WORD_FILES)} of CLIP, got: {reason}; "
            "download both again"
        ) from error
