# SPDX-License-Identifier: Apache-2.0
"""Steps that are not finite, noticed without making the host wait for the device."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LAG = 2  # steps that the host may be ahead of a GPU


class FiniteGuard:
    """A flag that keeps an optimiser from moving once a step was not finite, until the host has seen it.

    Hand :attr:`flag` to a fused optimiser as ``found_inf`` at each step.

    Attributes:
        flag: float32 scalar on the device, 1 from the first step on that was not finite.
        lag: steps after which the host waits for the device; 0 on a CPU, where nothing is gained by it.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)
        self.lag = LAG if device.type == "cuda" else 0
        self._pending: collections.deque[tuple[int, Tensor, Any, dict[str, Tensor]]] = collections.deque()

    def record(self, step: int, finite: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Note a step; ``finite`` is a boolean scalar on the device, ``parts`` are its losses."""
        self.flag.copy_(torch.maximum(self.flag, (~finite).to(self.flag.dtype)))
        told, event = self.flag.clone(), None
        if self.flag.is_cuda:
            told = torch.empty((), pin_memory=True).copy_(told, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.flag.device))
        self._pending.append((step, told, event, {name: value.detach() for name, value in parts.items()}))

    def found(self, wait: bool = False) -> tuple[int, dict[str, Tensor]] | None:
        """The first step that was not finite with its losses, if it is known by now; the flag is down again then.

        Args:
            wait: for all steps that were recorded.
        """
        while self._pending and (wait or len(self._pending) > self.lag or self._ready()):
            step, told, event, parts = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if bool(told):
                self._pending.clear()
                self.flag.zero_()
                return step, parts
        return None

    def _ready(self) -> bool:
        event = self._pending[0][2]
        return event is not None and event.query()
