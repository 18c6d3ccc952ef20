# SPDX-License-Identifier: Apache-2.0
"""CLIP (arXiv 2103.00020): a picture or a text -> a vector; both meet in one space.

The architecture is ours: two transformers with normalisation before each block. Sizes follow from the tensors, so one
class serves ViT-B/32, B/16 and L/14. Accepted are tensors with open_clip's names (which are OpenAI's) and with those
of a CLIPModel folder of transformers.

Shape legend: N pictures or texts, L tokens, W width, D common space.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of every published model
Activation = Literal["gelu", "quick_gelu"]


class Block(nn.Module):
    """Attention and a two-layer network, each added to what is normalised before it."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.heads, self.activation = heads, activation

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(N, L, W) -> the same; ``causal``: no token sees later ones."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inputs(self.norm1(x)).chunk(3, 2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.output(seen.transpose(1, 2).flatten(2))
        y = self.widen(self.norm2(x))
        return x + self.narrow(y * torch.sigmoid(1.702 * y) if self.activation == "quick_gelu" else F.gelu(y))


class ClipVision(nn.Module):
    """(N, 3, side, side), standardised -> (N, D), not normalised.

    Attributes:
        side: pixels.
    """

    def __init__(
        self, side: int, patch: int, width: int, layers: int, hidden: int, space: int, activation: Activation,
        heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.side, heads = side, heads or max(width // HEAD_WIDTH, 1)
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.summary = nn.Parameter(torch.zeros(width))
        self.places = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation) for _ in range(layers))
        self.project = nn.Linear(width, space, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"CLIP sees (N, 3, {self.side}, {self.side}), got {tuple(x.shape)}")
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm_in(torch.cat([self.summary.expand(len(x), 1, -1), x], dim=1) + self.places)
        for block in self.blocks:
            x = block(x, causal=False)
        return self.project(self.norm_out(x[:, 0]))


class ClipText(nn.Module):
    """(N, L) token numbers -> (N, D), not normalised, read where the text ends.

    Attributes:
        length: L, tokens of a text.
        end: number of the token that ends a text; None: the largest number of each row.
    """

    def __init__(
        self, words: int, length: int, width: int, layers: int, hidden: int, space: int, activation: Activation,
        heads: int | None = None, end: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.end, heads = length, end, heads or max(width // HEAD_WIDTH, 1)
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, space, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.length:
            raise ValueError(f"a text has at most {self.length} tokens, expected (N, L), got {tuple(tokens.shape)}")
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        last = tokens.argmax(dim=1) if self.end is None else (tokens == self.end).int().argmax(dim=1)
        return self.project(self.norm_out(x[torch.arange(len(x), device=x.device), last]))
