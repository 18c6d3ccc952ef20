# SPDX-License-Identifier: Apache-2.0
"""fp32, TF32, fp16 with a loss scale, bf16: autocast, device switches, the scale itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(precision: str, device: torch.device, enabled: bool = True) -> AbstractContextManager:
    """Autocast of a run on a device; only for fp16 and bf16. ``enabled=False`` switches a running one off."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision], enabled=enabled)


@contextmanager
def device_switches(precision: str, device: torch.device) -> Iterator[None]:
    """TF32 for ``tf32``, for ``tf32_convolutions`` in these alone; cuDNN's search for fast convolutions; put back
    afterwards. Nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
    matmul.allow_tf32, cudnn.allow_tf32 = precision == "tf32", precision in ("tf32", "tf32_convolutions")
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


class LossScale:
    """The factor that keeps fp16 gradients from vanishing, one for all optimisers; it never waits for the device.

    It halves after an iteration in which some gradient overflowed, doubles after ``interval`` good iterations in a
    row, and stays at 1 or above. Disabled (fp32, bf16) it is ``rest`` for ever.

    Args:
        enabled: True for fp16.
        device: where the scale lives.
        rest: while it is disabled. A power of two changes nothing but what is lost below the smallest half.
        start: first value.
        interval: good iterations before it doubles.
    """

    def __init__(
        self, enabled: bool, device: torch.device, rest: float = 1.0, start: float = 65536.0, interval: int = 2000
    ) -> None:
        self.enabled, self.interval = enabled, interval
        self.scale = torch.full((), start if enabled else rest, device=device)
        self._good = torch.zeros((), device=device)  # iterations without overflow since the last change
        self._overflow = torch.zeros((), device=device)  # 1 if some phase of this iteration overflowed

    def record(self, overflow: Tensor) -> None:
        """Note a phase's flag (1 = overflow) for :meth:`update`."""
        if self.enabled:
            self._overflow = torch.maximum(self._overflow, overflow)

    def update(self) -> None:
        """Once per iteration, after all phases."""
        if not self.enabled:
            return
        bad = self._overflow > 0
        good = torch.where(bad, torch.zeros_like(self._good), self._good + 1)
        grow = good >= self.interval
        factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(min=1.0)  # in place: recorded phases read it where it lies
        self._good = torch.where(grow, torch.zeros_like(good), good)
        self._overflow = torch.zeros_like(self._overflow)

    def at_floor(self) -> Tensor:
        """1 where an overflow cannot be cured by a smaller scale, else 0 (scalar tensor)."""
        return (self.scale <= 1.0).to(self.scale.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale.clone(), "good": self._good.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a stored scale; a run without fp16 keeps its own."""
        if self.enabled:
            self.scale.copy_(state["scale"])
            self._good = state["good"].to(self._good)
