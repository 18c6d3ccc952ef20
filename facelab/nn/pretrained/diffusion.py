# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL, read from a folder in the layout of diffusers, part by part.

Only what guidance needs is loaded: denoiser, picture encoder, schedule; the text encoder for as long as it takes to
encode a prompt, and not at all where the embeddings are stored. Nothing is downloaded, and of weights only safetensors
files are read. The parts are those of the packages diffusers and transformers (``pip install facelab[text]``).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.files import atomic_path

Kind = Literal["sd", "sdxl"]
Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
INSTALL = "pip install 'facelab[text]'"
DOWNLOAD = (
    "download the whole folder in the diffusers layout (Stable Diffusion 1.5, 2.1 base or XL base 1.0; the 2.x ones are "
    "found under sd2-community since their publisher withdrew them)"
)
TINY = "tiny-random"  # what the pipeline without weights is called wherever a number of it stands


@dataclass(frozen=True)
class PromptEmbeddings:
    """A negative prompt and a prompt, encoded.

    Attributes:
        tokens: (2, T, C), of the negative prompt and of the prompt.
        pooled: (2, P), Stable Diffusion XL only.
        prompt, negative: the texts.
        source: what encoded them.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    prompt: str = ""
    negative: str = ""
    source: str = ""

    def extra(self, count: int, side: int) -> dict[str, Tensor] | None:
        """XL's ``text_embeds`` (2 count, P) and ``time_ids`` (2 count, 6): original size, crop corner, target size."""
        if self.pooled is None:
            return None
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
        return {
            "text_embeds": self.pooled.repeat_interleave(count, dim=0),
            "time_ids": sizes.expand(2 * count, -1),
        }

    def to(self, device: torch.device | str) -> PromptEmbeddings:
        """On another device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return PromptEmbeddings(self.tokens.to(device), pooled, self.prompt, self.negative, self.source)


@dataclass(frozen=True)
class DiffusionParts:
    """What guidance needs; frozen and in evaluation mode.

    Attributes:
        unet: diffusers' UNet2DConditionModel.
        vae: diffusers' AutoencoderKL.
        scheduler: diffusers' DDIMScheduler.
        kind: ``sd`` (1.x, 2.x) or ``sdxl``.
        source: the folder, or :data:`TINY`.
    """

    unet: Any
    vae: Any
    scheduler: Any
    kind: Kind
    source: str
