# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

DecaySchedule = Callable[[int], float]
"""Number of the update, from 1 -> decay in [0, 1)."""


def warmup_decay(decay: float) -> DecaySchedule:
    """min(decay, (1 + n) / (10 + n)) at update n: the average forgets the first weights quickly.

    >>> schedule = warmup_decay(0.999)
    >>> round(schedule(1), 4), schedule(100_000)
    (0.1818, 0.999)
    """
    _check_decay(decay)
    return lambda n: min(decay, (1 + n) / (10 + n))


def constant_decay(decay: float) -> DecaySchedule:
    """The same decay at every update."""
    _check_decay(decay)
    return lambda n: decay


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """0-d bool tensor on their device: no NaN or Inf in the floating-point tensors. Nothing waits for the device.

    The largest magnitude is looked at, not a sum of squares, which may overflow for finite weights.
    """
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return torch.tensor(True)
    return torch.stack([norm.double() for norm in torch._foreach_norm(floating, float("inf"))]).isfinite().all()


class Ema:
    """Average of the parameters of a model: ``s <- s - (1 - d) (s - p)`` (as used by pi-GAN and FENeRF).

    All parameters are averaged, whether they require gradients at the moment or not, since a
    training loop freezes and unfreezes them. The average never takes in NaN or Inf: such an update
    leaves it as it was.

    Args:
        model: the model whose present weights start the average. It is not kept.
        decay: a schedule, or a number, which means :func:`warmup_decay` of it.
        buffers: ``copy`` the model's persistent buffers at each update, or ``ignore`` them.

    Attributes:
        updates: how many updates were counted, n of the schedule. An update that a device tensor or
            the finite check suppresses is counted (nothing waits for the device); one skipped by a
            Python bool is not.
        shadow: name -> average, on the device of the model.

    Raises:
        ValueError: parameters in half precision (small updates would be lost; keep float32 master weights).
    """

    def __init__(
        self, model: nn.Module, decay: float | DecaySchedule, buffers: Literal["copy", "ignore"] = "copy"
    ) -> None:
        if buffers not in ("copy", "ignore"):
            raise ValueError(f"buffers must be copy or ignore, got {buffers!r}")
        self.schedule = decay if callable(decay) else warmup_decay(decay)
        self.buffers = buffers
        self.updates = 0
        parameters = dict(model.named_parameters())
        half = [name for name, p in parameters.items() if p.dtype not in (torch.float32, torch.float64)]
        if half:
            raise ValueError(
                f"an average needs float32 or float64 parameters, {half[0]} is {parameters[half[0]].dtype}"
            )
        self._parameter_names = list(parameters)
        self._buffer_names = _persistent_buffers(model) if buffers == "copy" else []
        live = self._live(model)
        self.shadow = {name: live[name].detach().clone() for name in (*self._parameter_names, *self._buffer_names)}

    @torch.no_grad()
    def update(self, model: nn.Module, skip: bool | Tensor = False) -> None:
        """Move the average towards the model's weights.

        Args:
            model: the same (uncompiled) module the average was made from, or one of its kind.
            skip: True leaves everything as it is. A 0-d bool tensor on the device of the model does
                the same to the average without waiting for its value.
        """
        if isinstance(skip, Tensor) or not skip:
            live = self._live(model)
            self._move(live, self._may_move(live, skip))

    def averaged_state(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with the averages in place of the live weights; ignored buffers stay live."""
        self._live(model)  # the same names, or ValueError
        live = model.state_dict()
        return {name: self.shadow[name] if name in self.shadow else value.detach() for name, value in live.items()}

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights inside the ``with`` block, its own weights afterwards.

        Storages are exchanged, nothing is copied. Do not train or update the average inside.
        """
        live = self._live(model)
        self._exchange(live)
        try:
            yield model
        finally:
            self._exchange(live)

    def state_dict(self) -> dict[str, Any]:
        """``{"updates": int, "shadow": {name: tensor}}``; the tensors are those of the average, not copies."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, on the device of this average.

        Raises:
            ValueError: other names or shapes.
        """
        shadow = state["shadow"]
        if set(shadow) != set(self.shadow):
            raise ValueError(_name_difference("the saved average", shadow, "this one", self.shadow))
        for name, value in self.shadow.items():
            if shadow[name].shape != value.shape:
                raise ValueError(
                    f"the saved average of {name} has shape {tuple(shadow[name].shape)}, this one {tuple(value.shape)}"
                )
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
        self.updates = int(state["updates"])

    def _may_move(self, live: Mapping[str, Tensor], skip: bool | Tensor) -> Tensor:
        finite = all_finite([live[name].detach() for name in self.shadow])
        return finite & ~skip if isinstance(skip, Tensor) else finite

    def _move(self, live: Mapping[str, Tensor], keep: Tensor) -> None:
        self.updates += 1
        names, weight = self._parameter_names, 1.0 - self.schedule(self.updates)
        moved = torch._foreach_lerp([self.shadow[n] for n in names], [live[n].detach() for n in names], weight)
        values = [*moved, *(live[name] for name in self._buffer_names)]
        for name, value in zip((*names, *self._buffer_names), values, strict=True):
            # A choice, not a weight of zero: zero times NaN is NaN.
            torch.where(keep, value, self.shadow[name], out=self.shadow[name])

    def _live(self, model: nn.Module) -> dict[str, Tensor]:
        live: dict[str, Tensor] = dict(model.named_parameters())
        if list(live) != self._parameter_names:
            raise ValueError(_name_difference("the model", live, "its average", self._parameter_names))
        buffers = dict(model.named_buffers())
        return live | {name: buffers[name] for name in self._buffer_names}

    def _exchange(self, live: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            live[name].data, self.shadow[name] = shadow, live[name].data


class EmaGroup:
    """Several averages of one model, by name (pi-GAN and FENeRF keep ``ema`` 0.999 and ``ema2`` 0.9999)."""

    def __init__(
        self,
        model: nn.Module,
        decays: Mapping[str, float | DecaySchedule],
        buffers: Literal["copy", "ignore"] = "copy",
    ) -> None:
        self.averages = {name: Ema(model, decay, buffers) for name, decay in decays.items()}

    def __getitem__(self, name: str) -> Ema:
        return self.averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.averages)

    @torch.no_grad()
    def update(self, model: nn.Module, skip: bool | Tensor = False) -> None:
        """:meth:`Ema.update` of every average; the weights are checked for NaN and Inf once."""
        averages = list(self.averages.values())
        if averages and (isinstance(skip, Tensor) or not skip):
            live = averages[0]._live(model)
            keep = averages[0]._may_move(live, skip)
            for average in averages:
                average._move(live, keep)

    def state_dict(self) -> dict[str, Any]:
        """Name -> :meth:`Ema.state_dict`."""
        return {name: average.state_dict() for name, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. ValueError for other names or shapes."""
        if set(state) != set(self.averages):
            raise ValueError(_name_difference("the saved averages", state, "these", self.averages))
        for name, average in self.averages.items():
            average.load_state_dict(state[name])


def _persistent_buffers(model: nn.Module) -> list[str]:
    saved = set(model.state_dict())
    return [name for name, _ in model.named_buffers() if name in saved]


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"a decay lies in [0, 1), got {decay}")


def _name_difference(what: str, names, other: str, other_names) -> str:
    first, second = set(names), set(other_names)
    if first == second:
        return f"{what} and {other} hold the same names in another order"
    return (
        f"{what} and {other} differ: only the first has {sorted(first - second)[:3]}, "
        f"only the second {sorted(second - first)[:3]}"
    )
