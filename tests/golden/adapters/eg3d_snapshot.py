# SPDX-License-Identifier: Apache-2.0
"""A network pickle written by the original classes: every tensor, setting and refusal."""

from __future__ import annotations

import torch
from torch import Tensor

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
        tensors = [network.state[key].double() for key in shapes]
        outputs[f"{name}_sum"] = torch.stack([t.sum() for t in tensors])
        outputs[f"{name}_abs"] = torch.stack([t.abs().sum() for t in tensors])
        outputs[f"{name}_first"] = torch.stack([_first(t) for t in tensors])
    return outputs


ADAPTERS = {"eg3d/snapshot_tiny": snapshot}
