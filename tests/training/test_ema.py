# SPDX-License-Identifier: Apache-2.0
"""Moving averages of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from facelab.training.ema import Ema, EmaGroup, all_finite, constant_decay, warmup_decay


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


@torch.no_grad()
def step(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.mean.fill_(seed)
    model.count.add_(1)


def test_average_follows_the_formula_with_warm_up() -> None:
    model = Model()
    ema = Ema(model, 0.5)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for n in range(1, 30):
        step(model, n)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        for name, parameter in model.named_parameters():
            expected[name] -= (1 - decay) * (expected[name] - parameter.detach())
    assert ema.updates == 29
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name], value)


def test_schedules() -> None:
    assert [constant_decay(0.9)(n) for n in (1, 100)] == [0.9, 0.9]
    assert warmup_decay(0.999)(1) == 2 / 11
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay"):
            Ema(Model(), bad)


@pytest.mark.parametrize("buffers", ["copy", "ignore"])
def test_buffers(buffers) -> None:
    model = Model()
    ema = Ema(model, 0.9, buffers)
    step(model, 7)
    ema.update(model)
    model.mean.fill_(-1)
    copied = {name: ema.shadow[name].tolist() for name in ("mean", "count") if name in ema.shadow}
    assert copied == ({"mean": [7, 7], "count": 1} if buffers == "copy" else {})
    assert "scratch" not in ema.shadow
    assert ema.averaged_state(model)["mean"].tolist() == ([7, 7] if buffers == "copy" else [-1, -1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_never_enter(bad: float) -> None:
    model = Model()
    ema = Ema(model, 0.9)
    step(model, 1)
    ema.update(model)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    step(model, 2)
    with torch.no_grad():
        model.linear.weight[1, 2] = bad
    ema.update(model)
    assert all(torch.equal(ema.shadow[name], value) for name, value in before.items())
    step(model, 3)
    ema.update(model)
    assert not torch.equal(ema.shadow["linear.bias"], before["linear.bias"])
    assert all_finite(list(ema.shadow.values()))


def test_large_finite_weights_are_finite() -> None:
    assert all_finite([torch.full((4,), 3e38), torch.tensor([], dtype=torch.float32), torch.tensor([1])])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, torch.nan])])


@pytest.mark.parametrize(("skip", "counted"), [(True, 0), (torch.tensor(True), 1)])
def test_skipped_updates_change_nothing(skip, counted: int) -> None:
    model = Model()
    ema = Ema(model, 0.9)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    step(model, 1)
    ema.update(model, skip)
    assert all(torch.equal(ema.shadow[name], value) for name, value in before.items())
    assert ema.updates == counted
    ema.update(model, torch.tensor(False))
    assert not torch.equal(ema.shadow["linear.weight"], before["linear.weight"])


def test_swap_and_restore_also_after_an_error() -> None:
    model = Model()
    ema = Ema(model, 0.9)
    step(model, 1)
    live = copy.deepcopy(model.state_dict())
    averaged = {name: value.clone() for name, value in ema.averaged_state(model).items()}
    parameters, pointer = list(model.parameters()), model.linear.weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), ema.applied_to(model) as inner:
        assert inner is model
        assert all(torch.equal(model.state_dict()[name], value) for name, value in averaged.items())
        assert not torch.equal(model.linear.weight, live["linear.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())
    assert all(torch.equal(ema.averaged_state(model)[name], value) for name, value in averaged.items())
    # The same parameters at the same addresses: optimisers and captured graphs go on working.
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.linear.weight.data_ptr() == pointer


def test_state_round_trip_continues_exactly() -> None:
    model = Model()
    first = EmaGroup(model, {"ema": 0.999, "ema2": 0.9999})
    for seed in (1, 2):
        step(model, seed)
        first.update(model)
    second = EmaGroup(Model(), {"ema": 0.999, "ema2": 0.9999})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 20):
        step(model, seed)
        first.update(model)
        second.update(model)
    for name in first:
        assert first[name].updates == second[name].updates == 19
        assert all(torch.equal(first[name].shadow[key], second[name].shadow[key]) for key in first[name].shadow)


def test_group_equals_single_averages() -> None:
    model = Model()
    group, fast, slow = EmaGroup(model, {"fast": 0.2, "slow": 0.7}), Ema(model, 0.2), Ema(model, 0.7)
    for seed in range(1, 9):
        step(model, seed)
        for average in (group, fast, slow):
            average.update(model, torch.tensor(seed == 4))
    for name, single in (("fast", fast), ("slow", slow)):
        assert all(torch.equal(group[name].shadow[key], single.shadow[key]) for key in single.shadow)
    assert not torch.equal(fast.shadow["linear.weight"], slow.shadow["linear.weight"])


def test_other_models_and_states_are_refused() -> None:
    model = Model()
    ema = Ema(model, 0.9)
    with pytest.raises(ValueError, match="only the first has \\['bias', 'weight'\\], only the second \\['frozen'"):
        ema.update(nn.Linear(3, 2))
    state = ema.state_dict()
    with pytest.raises(ValueError, match="only the first has \\['extra'\\]"):
        ema.load_state_dict({"updates": 1, "shadow": {**state["shadow"], "extra": torch.zeros(1)}})
    with pytest.raises(ValueError, match="linear.bias has shape"):
        ema.load_state_dict({"updates": 1, "shadow": {**state["shadow"], "linear.bias": torch.zeros(9)}})
    with pytest.raises(ValueError, match="saved averages"):
        EmaGroup(model, {"ema": 0.9}).load_state_dict({"ema2": state})
    with pytest.raises(ValueError, match="float32"):
        Ema(nn.Linear(2, 2).half(), 0.9)
    with pytest.raises(ValueError, match="copy or ignore"):
        Ema(model, 0.9, "copied")  # type: ignore[arg-type]
