# SPDX-License-Identifier: Apache-2.0
"""Renaming state-dict keys by ordered rules that work in both directions, strictly.

A rule is a pair of patterns, original and ours. In a pattern

* ``{name}`` stands for one part without dots, ``{name:*}`` for any text, dots included;
* ``{i:n}`` stands for a number, and ``{i:2n}``, ``{i:2n+1}``, ``{i:n-3}`` for the number that this expression gives:
  ``net.{i:2n}.weight -> layers.{i:n}.weight`` numbers the layers of a Sequential with activations in between anew;
* all else is literal. Both sides use the same names.

>>> keys = KeyMap([("siren.network.{i:n}.layer.{p}", "trunk.{i:n}.{p}"), ("siren.map.{i:2n}.{p}", "mapping.{i:n}.{p}")])
>>> keys.to_ours("siren.map.4.weight"), keys.to_original("mapping.2.weight")
('mapping.2.weight', 'siren.map.4.weight')
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from facelab.errors import UserError, nearest

_FIELD = re.compile(r"\{(?P<name>[a-z_]\w*)(?::(?P<form>[^{}]*))?\}")
_NUMBER = re.compile(r"(?P<factor>\d*)n(?P<shift>[+-]\d+)?")
_SHOWN = 5


@dataclass(frozen=True)
class _Pattern:
    """One side of a rule: matches a key into values, builds a key from values."""

    text: str
    regex: re.Pattern[str]
    forms: Mapping[str, str | tuple[int, int]]  # name -> '' (part), '*' (anything) or (factor, shift)

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        expression, forms, position = "", {}, 0
        for part in _FIELD.finditer(text):
            name, form = part["name"], part["form"] or ""
            number = _NUMBER.fullmatch(form)
            if name in forms or not (form in ("", "*") or number):
                raise ValueError(
                    f"pattern '{text}': expected {{name}}, {{name:*}} or {{name:2n+1}}, each name once, got '{part[0]}'"
                )
            forms[name] = (int(number["factor"] or 1), int(number["shift"] or 0)) if number else form
            piece = r"\d+" if number else (".+" if form == "*" else r"[^.]+")
            expression += re.escape(text[position : part.start()]) + f"(?P<{name}>{piece})"
            position = part.end()
        return cls(text, re.compile(expression + re.escape(text[position:])), forms)

    def match(self, key: str) -> dict[str, str | int] | None:
        found = self.regex.fullmatch(key)
        if found is None:
            return None
        values: dict[str, str | int] = {}
        for name, form in self.forms.items():
            if isinstance(form, str):
                values[name] = found[name]
                continue
            number, rest = divmod(int(found[name]) - form[1], form[0])
            if rest or number < 0 or str(int(found[name])) != found[name]:
                return None
            values[name] = number
        return values

    def build(self, values: Mapping[str, str | int]) -> str | None:
        def fill(part: re.Match[str]) -> str:
            form, value = self.forms[part["name"]], values[part["name"]]
            return str(value) if isinstance(form, str) else str(int(value) * form[0] + form[1])

        return _FIELD.sub(fill, self.text)


class KeyMap:
    """Ordered rules between original and our key names; the first that fits a key applies.

    Args:
        rules: pairs (original pattern, our pattern).
        dropped: original patterns that have no counterpart (constant filters, unused heads); silently left out.

    Raises:
        ValueError: a pattern that cannot be read, or sides with different names.
    """

    def __init__(self, rules: Sequence[tuple[str, str]], dropped: Iterable[str] = ()) -> None:
        self._rules = [(_Pattern.parse(original), _Pattern.parse(ours)) for original, ours in rules]
        self._dropped = [_Pattern.parse(pattern) for pattern in dropped]
        for original, ours in self._rules:
            if set(original.forms) != set(ours.forms):
                raise ValueError(f"rule '{original.text}' -> '{ours.text}': expected the same names on both sides")

    def to_ours(self, key: str) -> str | None:
        """Our name of an original key; None if no rule fits."""
        return self._apply(key, 0)

    def to_original(self, key: str) -> str | None:
        """The original name of one of our keys; None if no rule fits."""
        return self._apply(key, 1)

    def is_dropped(self, key: str) -> bool:
        """Whether an original key is left out on purpose."""
        return any(pattern.match(key) is not None for pattern in self._dropped)

    def from_original(
        self,
        state: Mapping[str, Tensor],
        expected: Mapping[str, object] | Iterable[str] | None = None,
        what: str = "the file",
    ) -> OrderedDict[str, Tensor]:
        """Rename an original state dict to our keys, strictly.

        Args:
            expected: our keys (and shapes, where the values are tensors or sizes) that must come out, no more, no less.
            what: how messages call the source.

        Raises:
            UserError: a key that no rule knows, two keys that become one, a key missing or left over, another shape.
        """
        kept = {key: tensor for key, tensor in state.items() if not self.is_dropped(key)}
        return self._convert(kept, 0, expected, what)

    def back_to_original(
        self,
        state: Mapping[str, Tensor],
        expected: Mapping[str, object] | Iterable[str] | None = None,
        what: str = "the model",
    ) -> OrderedDict[str, Tensor]:
        """Rename one of our state dicts to original keys, as strictly. Dropped keys do not come back."""
        if expected is not None:
            table = expected if isinstance(expected, Mapping) else dict.fromkeys(expected)
            expected = {key: shape for key, shape in table.items() if not self.is_dropped(key)}
        return self._convert(state, 1, expected, what)

    def _apply(self, key: str, side: int) -> str | None:
        for rule in self._rules:
            values = rule[side].match(key)
            if values is not None:
                return rule[1 - side].build(values)
        return None

    def _convert(
        self, state: Mapping[str, Tensor], side: int, expected: Mapping[str, object] | Iterable[str] | None, what: str
    ) -> OrderedDict[str, Tensor]:
        renamed: OrderedDict[str, Tensor] = OrderedDict()
        sources: dict[str, str] = {}
        unknown = []
        for key, tensor in state.items():
            name = self._apply(key, side)
            if name is None:
                unknown.append(key)
                continue
            if name in sources:
                raise UserError(
                    f"{what}: '{sources[name]}' and '{key}' both become '{name}'; the file mixes two models"
                )
            renamed[name], sources[name] = tensor, key
        if unknown:
            known = [rule[side].text for rule in self._rules]
            raise UserError(
                f"{what}: no rule for {_shown(unknown)}.{nearest(unknown[0], known)} Expected another kind of model; "
                "check that the file belongs to this method"
            )
        if expected is not None:
            check_keys(renamed, expected, what)
        return renamed


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, object] | Iterable[str], what: str = "the file"
) -> None:
    """Compare the keys, and the shapes where ``expected`` gives them (tensors or sizes), of a state dict.

    Raises:
        UserError: missing and left-over keys in one line, each with its nearest candidate; or the first other shape.
    """
    shapes = expected if isinstance(expected, Mapping) else dict.fromkeys(expected)
    missing = [key for key in shapes if key not in state]
    unknown = [key for key in state if key not in shapes]
    if missing or unknown:
        parts = []
        if missing:
            hint = nearest(missing[0], unknown or state)
            parts.append(f"missing {_shown(missing)}{hint}")
        if unknown:
            hint = nearest(unknown[0], missing or shapes)
            parts.append(f"not expected {_shown(unknown)}{hint}")
        raise UserError(
            f"{what}: expected {len(shapes)} tensors, got {len(state)}; {'; '.join(parts)} "
            "Check that the file belongs to this model and its configuration"
        )
    for key, wanted in shapes.items():
        if wanted is None:
            continue
        shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else tuple(wanted)  # type: ignore[arg-type]
        if tuple(state[key].shape) != shape:
            raise UserError(
                f"{what}: '{key}' should have shape {shape}, got {tuple(state[key].shape)}; "
                "check that the configuration has the sizes of this file"
            )


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(f"'{key}'" for key in keys[:_SHOWN]) + more
