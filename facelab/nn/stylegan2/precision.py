# SPDX-License-Identifier: Apache-2.0
"""In which number type and memory order the blocks of a network run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """How a call of a synthesis or super-resolution network computes. Weights are stored in full precision always.

    Attributes:
        dtype: number type of the lowered blocks: ``torch.float16`` or ``torch.bfloat16``.
        blocks: which blocks are lowered: the ``marked`` ones (the highest ``num_fp16_res`` resolutions, as the
            network was built), ``all``, or ``none`` (the original's ``force_fp32``). Images are summed up in full
            precision in each case, and styles are computed in it.
        channels_last: keep the features of all blocks in channels-last memory order; only the speed changes.
        on_cpu: lower the blocks on the CPU too. Off, so that a mixed-precision network gives full-precision
            results there; half floats on a CPU are slow and serve tests.
    """

    dtype: torch.dtype = torch.float16
    blocks: Literal["marked", "all", "none"] = "marked"
    channels_last: bool = False
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected torch.float16 or torch.bfloat16, got {self.dtype}; blocks='none' is full"
            )
        if self.blocks not in ("marked", "all", "none"):
            raise ValueError(f"blocks: expected 'marked', 'all' or 'none', got {self.blocks!r}")

    def dtype_of(self, marked: bool, weight: Tensor) -> torch.dtype:
        """The number type a block computes in; ``weight`` tells its device and its full precision."""
        lowered = self.blocks == "all" or (self.blocks == "marked" and marked)
        return self.dtype if lowered and (weight.is_cuda or self.on_cpu) else weight.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory order of the features."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


AS_BUILT = Precision()
FULL = Precision(blocks="none")
