# SPDX-License-Identifier: Apache-2.0
"""A network pickle written by the original classes: every tensor and setting, through our key names and back."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.bases.eg3d import convert_discriminator
from facelab.bases.eg3d.originals import LABEL_STD, generator_keys
from facelab.checkpoints.legacy_networks import Network, read_network_pickle
from tests.golden.harness import Arrays, Meta, given


def _first(tensor: Tensor, count: int = 4) -> Tensor:
    """The first four values, zero padded."""
    found = tensor.flatten()[:count].double()
    return torch.cat([found, found.new_zeros(count - len(found))])


def _check_settings(network: Network, expected: dict) -> None:
    assert network.init_kwargs == expected["init_kwargs"]
    stored = {key: value for key, value in expected.items() if key != "init_kwargs"}
    assert {key: network.attributes[key] for key in stored} == stored


def _round_trip(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original names -> ours -> original names. The constant filters, which we do not keep, are made anew."""
    keys = convert_discriminator.KEYS if name == "D" else generator_keys()
    apart = {key: value for key, value in state.items() if key == LABEL_STD}
    ours = keys.from_original({key: value for key, value in state.items() if key not in apart})
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = {key: torch.outer(taps, taps) for key in state if keys.is_dropped(key)}
    return {**keys.back_to_original(ours), **filters, **apart}


@given()
def snapshot(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    found = read_network_pickle(meta["folder"] / "snapshot_tiny.pkl")
    assert found.training_set == meta["training_set_kwargs"]
    assert "augment_pipe" not in found.networks and meta["augment_pipe"] is None
    outputs = {}
    for name, entries in meta["state_dicts"].items():
        network = found.networks[name]
        if name in meta:
            _check_settings(network, meta[name])
        shapes = {key: tuple(shape) for key, shape in entries}
        assert {key: tuple(tensor.shape) for key, tensor in network.state.items()} == shapes
        back = _round_trip(name, network.state)
        assert set(back) == set(shapes)
        tensors = [back[key].double() for key in shapes]
        outputs[f"{name}_sum"] = torch.stack([t.sum() for t in tensors])
        outputs[f"{name}_abs"] = torch.stack([t.abs().sum() for t in tensors])
        outputs[f"{name}_first"] = torch.stack([_first(t) for t in tensors])
    return outputs


ADAPTERS = {"eg3d/snapshot_tiny": snapshot}
