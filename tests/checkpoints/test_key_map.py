# SPDX-License-Identifier: Apache-2.0
"""Renaming rules: both directions, first match wins, strict messages."""

from __future__ import annotations

import doctest
from collections import OrderedDict

import pytest
import torch

from facelab.checkpoints import key_map
from facelab.checkpoints.key_map import KeyMap, check_keys
from facelab.errors import UserError

RULES = [
    ("siren.network.{i:n}.layer.{p}", "trunk.{i:n}.{p}"),
    ("siren.final.{p}", "density.{p}"),
    ("siren.map.{i:2n}.{p}", "mapping.{i:n}.{p}"),
    ("siren.late.{i:n}.{rest:*}", "late.{i:n-3}.{rest:*}"),
    ("b{res:n}.conv{k:n}.{p}", "blocks.{res:n}.convs.{k:n}.{p}"),
]


def _map() -> KeyMap:
    return KeyMap(RULES, dropped=["{where:*}.resample_filter"])


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("siren.network.0.layer.weight", "trunk.0.weight"),
        ("siren.network.11.layer.bias", "trunk.11.bias"),
        ("siren.final.weight", "density.weight"),
        ("siren.map.6.bias", "mapping.3.bias"),
        ("siren.late.4.a.b.weight", "late.1.a.b.weight"),
        ("b64.conv1.weight", "blocks.64.convs.1.weight"),
    ],
)
def test_both_directions(original: str, ours: str) -> None:
    assert _map().to_ours(original) == ours and _map().to_original(ours) == original


@pytest.mark.parametrize(
    "key", ["siren.map.3.bias", "siren.network.x.layer.weight", "siren.network.01.layer.weight", "siren.final.a.b"]
)
def test_keys_outside_the_rules(key: str) -> None:
    assert _map().to_ours(key) is None


def _state() -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(
        [
            ("siren.network.0.layer.weight", torch.ones(4, 3)),
            ("siren.map.2.bias", torch.ones(5)),
            ("b4.resample_filter", torch.ones(4)),
        ]
    )


def test_a_state_dict_there_and_back() -> None:
    ours = _map().from_original(_state(), {"trunk.0.weight": (4, 3), "mapping.1.bias": torch.zeros(5)})
    assert list(ours) == ["trunk.0.weight", "mapping.1.bias"] and ours["mapping.1.bias"] is not None
    back = _map().back_to_original(ours, expected=_state())
    assert list(back) == list(_state())[:2]


def test_strictness_names_keys_and_candidates() -> None:
    keys = _map()
    with pytest.raises(
        UserError, match=r"no rule for 'siren\.netwrk\.0\.layer\.weight'\. Did you mean 'siren\.network"
    ):
        keys.from_original({"siren.netwrk.0.layer.weight": torch.ones(1)})
    with pytest.raises(
        UserError,
        match=r"missing 'trunk\.1\.weight' Did you mean 'trunk\.0\.weight'\?; not expected 'trunk\.0\.weight'",
    ):
        keys.from_original({"siren.network.0.layer.weight": torch.ones(1)}, ["trunk.1.weight"], what="x.pth")
    with pytest.raises(UserError, match=r"'mapping\.1\.bias' should have shape \(6,\), got \(5,\)"):
        keys.from_original(_state(), {"trunk.0.weight": None, "mapping.1.bias": (6,)})
    with pytest.raises(UserError, match="7 more"):
        check_keys({}, [f"k{i}" for i in range(12)])
    with pytest.raises(UserError, match="both become 'same'"):
        KeyMap([("a", "same"), ("b", "same")]).from_original({"a": torch.ones(1), "b": torch.ones(1)})


def test_rules_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="same names"):
        KeyMap([("a.{i:n}", "b.{j:n}")])
    with pytest.raises(ValueError, match=r"got '\{i:x\}'"):
        KeyMap([("a.{i:x}", "b.{i:n}")])


def test_the_example_in_the_text() -> None:
    assert doctest.testmod(key_map).failed == 0
