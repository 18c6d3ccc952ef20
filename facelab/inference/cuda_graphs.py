# SPDX-License-Identifier: Apache-2.0
"""Functions of nested tensors, recorded once as a CUDA graph and replayed with new numbers.

A picture of batch 1 is a thousand small kernels, and starting them takes longer than running them; a graph starts all
of them at once. What a graph can hold: static shapes, no random draws, nothing that waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from facelab.tensors import map_tensors, tensors_of

WARMUP_CALLS = 3  # compile kernels, let cuDNN choose its algorithms


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest with other tensors, taken from an iterator in the order of :func:`tensors_of`."""
    return map_tensors(lambda _: next(tensors), value)


def signature(value: Any) -> Hashable:
    """What two nests must have in common to be served by one graph: structure, shapes, dtypes, devices, constants.

    Raises:
        TypeError: a leaf is neither a tensor nor hashable.
    """
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device)
    parts = list(_parts(value))
    if parts or isinstance(value, (tuple, list, Mapping)) or _is_record(value):
        return (type(value).__name__, *((key, signature(part)) for key, part in parts))
    hash(value)
    return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, part) of a container; nothing for a leaf."""
    if isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from value.items()
    elif _is_record(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)


class CapturedCall:
    """One function, recorded for arguments of one :func:`signature`.

    Numbers that enter are copied into the graph's own memory and those that leave it are copied out, so results stay
    when the graph is replayed. Weights are read where they lie: changed in place, they count at the next replay;
    moved or replaced, they do not.

    Args:
        function: arguments -> a nest of tensors; no random draws, no waiting for the device.
        arguments: an example on a GPU.

    Raises:
        RuntimeError: the function cannot be recorded (whatever CUDA says), or raised by itself in the warm-up.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        device = tensors_of(arguments)[0].device
        self._inputs = with_tensors(arguments, (x.detach().clone() for x in tensors_of(arguments)))
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_CALLS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)

    def __call__(self, *arguments: Any) -> Any:
        """Replay with arguments of the same signature -> results of their own."""
        with torch.no_grad():
            for own, given in zip(tensors_of(self._inputs), tensors_of(arguments), strict=True):
                own.copy_(given)
            self.graph.replay()
            return with_tensors(self._outputs, (x.clone() for x in tensors_of(self._outputs)))
