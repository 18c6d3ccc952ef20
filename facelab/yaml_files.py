# SPDX-License-Identifier: Apache-2.0
"""YAML as people expect it: safe, YAML 1.2 scalars, no duplicate keys, errors in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from facelab.errors import UserError

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (``6e-5`` is a number, ``off`` is a word), no aliases, no duplicate keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way to start without YAML 1.1 words)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a plain name", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key_node.value}'", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would not read back as the same text; short lists in one line."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quoted with escapes where PyYAML would otherwise fold a Unicode line break into a space."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
     list("-+.0123456789")),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """Text -> plain dicts, lists and scalars; one of :data:`YAML_ERRORS` if it is malformed.

    >>> parse_yaml("{rate: 6e-5, mode: off, steps: [1, 2]}")
    {'rate': 6e-05, 'mode': 'off', 'steps': [1, 2]}
    """
    return yaml.load(text, _Loader)


def dump_yaml(data: Any) -> str:
    """Plain data -> text that :func:`parse_yaml` reads back as the same data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file that holds a mapping (or nothing) -> dict. UserError in one line if it cannot be read."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the configuration file {path}: {reason}") from error
    except YAML_ERRORS as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(data).__name__}; write 'key: value' lines")
    return data or {}


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = str(getattr(error, "problem", None) or error).split("\n")[0]
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark else text
