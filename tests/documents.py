# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/ as tests read them: tables after markers, names of functions, commands with their options."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

import click

from tests.conftest import CHECKOUT


def page(name: str) -> str:
    """The text of ``docs/<name>.md``."""
    return (CHECKOUT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str, marker: str) -> list[list[str]]:
    """Cells of the table after ``<!-- marker``, without its header; `|` between letters belongs to a cell."""
    lines = text.split(f"<!-- {marker}")[1].splitlines()[1:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in re.split(r"(?<!\w)\|(?!\w)", line.strip("|"))] for line in table[2:]]


def functions(text: str) -> list[str]:
    """Dotted names in the last column of the table of functions."""
    return [path for row in rows(text, "functions") for path in re.findall(r"`([\w.]+)`", row[-1])]


def find(path: str) -> Any:
    """What a dotted name means: an attribute of a module, or of a class in one."""
    parts = path.split(".")
    split = next((i for i, part in enumerate(parts) if part[0].isupper()), len(parts) - 1)
    return reduce(getattr, parts[split:], importlib.import_module(".".join(parts[:split])))


def options_of(*commands: click.Command) -> set[str]:
    """Every option of the commands, as it is written."""
    parameters = [p for command in commands for p in command.params if isinstance(p, click.Option)]
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)}


def shown_commands(path: Path, folder: str = "scripts") -> list[tuple[str, list[str]]]:
    """(script, its words) of every ``<folder>/<script>.py ...`` in a document."""
    code = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    lines = re.findall(rf"\b{folder}/(\w+)\.py((?: [^\n`&|]*)?)", code)
    return [(script, shlex.split(words.replace("'", ""), comments=True)) for script, words in lines]


def wrong_words(command: click.Command, words: list[str]) -> list[str]:
    """Subcommands and options among ``words`` that are not the command's."""
    if isinstance(command, click.Group):
        plain = [word for word in words if not word.startswith("-")]
        if not plain:
            return []
        if plain[0] not in command.commands:
            return plain[:1]
        command = command.commands[plain[0]]
    known = {*options_of(command), "--help"}
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
