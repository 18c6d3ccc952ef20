# SPDX-License-Identifier: Apache-2.0
"""Gradients of a phase in one flat buffer: one all-reduce, one norm, one check for NaN.

The parameters' ``.grad`` are views of the buffer, so the backward pass adds to it in place and a parameter that got
no gradient counts as zero, on every process alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from facelab.training.precision import LossScale

REFERENCE_INF = 1e5  # what the EG3D program puts in the place of an infinite gradient


class GradientArena:
    """Memory for the gradients of the largest phase; phases run one after the other and use it in turn."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, size: int, device: torch.device) -> Tensor:
        """The first ``size`` numbers, fp32."""
        memory = self._memory
        if memory is None or memory.numel() < size:
            memory = self._memory = torch.zeros(size, device=device)
        return memory[:size]


class FlatGradients:
    """The gradients of one phase.

    Args:
        parameters: what the phase trains, fp32, on one device.
        arena: where the gradients lie; used by one phase at a time.

    Raises:
        ValueError: a parameter has another dtype than float32.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], arena: GradientArena) -> None:
        wrong = {str(p.dtype) for p in parameters if p.dtype != torch.float32}
        if wrong:
            raise ValueError(f"trained parameters must be float32 (precision is autocast's task), got {sorted(wrong)}")
        self.parameters = list(parameters)
        self.size = sum(p.numel() for p in self.parameters)
        self._arena = arena
        self._views: list[Tensor] = []
        self.flat = torch.empty(0)

    def attach(self) -> None:
        """Zero the buffer and hang its views on the parameters."""
        flat = self._arena.take(self.size, self.parameters[0].device)
        if flat.data_ptr() != self.flat.data_ptr() or flat.numel() != self.flat.numel():
            self.flat, self._views = flat, _views(flat, self.parameters)
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def detach(self) -> None:
        """Take the views off again."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def finish(self, scale: Tensor, clip: float | None, replace: bool) -> tuple[Tensor, Tensor]:
        """Divide by the loss scale, judge, clip. -> (norm before clipping, flag: 1.0 if not finite), on the device.

        ``replace`` puts numbers in the place of NaN and infinities and reports a finite gradient.
        """
        if replace:
            self.flat.div_(scale)
            torch.nan_to_num_(self.flat, nan=0.0, posinf=REFERENCE_INF, neginf=-REFERENCE_INF)
            norm = self.flat.norm()
            factor = torch.ones_like(norm)
        else:
            norm = self.flat.norm() / scale
            factor = 1.0 / scale
        bad = (~torch.isfinite(norm)).to(torch.float32)
        if clip is not None:
            factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
        self.flat.mul_(factor)
        return norm, bad


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views with the shapes and strides of the parameters; optimisers are fastest when the strides agree."""
    views, offset = [], flat.storage_offset()
    for parameter in parameters:
        strides = parameter.stride()
        if not _dense(parameter):
            strides = torch.empty(parameter.shape, device="meta").stride()
        views.append(torch.as_strided(flat, parameter.shape, strides, offset))
        offset += parameter.numel()
    return views


def _dense(tensor: Tensor) -> bool:
    """True if the tensor covers a block of memory exactly once (contiguous, channels-last ...)."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class NanWatch:
    """Counts iterations in a row with gradients that are not finite, without waiting for the device.

    On CUDA the count of an iteration is read one iteration later, when it has long been computed, at the same
    iteration on every process. An overflow that a smaller loss scale can cure does not count.

    Args:
        limit: iterations in a row that end the run.
        device: where the flags are.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit, self._delayed = limit, device.type == "cuda"
        self._row = torch.zeros((), device=device)
        self._flags: dict[str, Tensor] = {}
        self._waiting: list[tuple[Tensor, torch.cuda.Event | None, list[str]]] = []

    def record(self, phase: str, bad: Tensor) -> None:
        """A phase's flag, 1.0 = not finite."""
        self._flags[phase] = bad

    def end_step(self, scale: LossScale) -> None:
        """Close an iteration: extend or reset the row."""
        names, flags = list(self._flags), torch.stack(list(self._flags.values()))
        self._flags = {}
        bad = flags.max() * scale.at_floor() if scale.enabled else flags.max()
        self._row = torch.where(bad > 0, self._row + 1, torch.zeros_like(self._row))
        report, event = torch.cat([self._row[None], flags]), None
        if self._delayed:
            host = torch.empty(report.shape, pin_memory=True)
            host.copy_(report, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            report = host
        self._waiting.append((report, event, names))

    def exceeded(self) -> list[str]:
        """Names of the phases that were not finite when the limit was reached; empty if it was not."""
        if len(self._waiting) <= int(self._delayed):
            return []
        report, event, names = self._waiting.pop(0)
        if event is not None:
            event.synchronize()
        row, *flags = report.tolist()
        return [name for name, flag in zip(names, flags, strict=True) if flag] if row >= self.limit else []
