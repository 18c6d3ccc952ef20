# SPDX-License-Identifier: Apache-2.0
"""CLIP (arXiv 2103.00020): a picture or a text -> a vector; both meet in one space.

The architecture is ours: two transformers with normalisation before each block. Sizes follow from the tensors, so one
class serves ViT-B/32, B/16 and L/14. Accepted are tensors with open_clip's names (which are OpenAI's) and with those
of a CLIPModel folder of transformers.

Shape legend: N pictures or texts, L tokens, W width, D common space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of the attention, in the published models
HEADS = {1280: 16, 1408: 16, 1664: 16}  # but for the picture towers of H/14, g/14 and bigG/14, by width
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
        self.side, heads = side, heads or HEADS.get(width) or max(width // HEAD_WIDTH, 1)
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
    """

    def __init__(
        self, words: int, length: int, width: int, layers: int, hidden: int, space: int, activation: Activation,
        heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, heads = length, heads or max(width // HEAD_WIDTH, 1)
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
        last = tokens.argmax(dim=1)  # the number of the end is the largest, padding after it is not larger
        return self.project(self.norm_out(x[torch.arange(len(x), device=x.device), last]))


# ---------------------------------------------------------------- published tensors

_OPEN_CLIP = (  # ours, theirs; within a block
    ("norm1", "ln_1"), ("norm2", "ln_2"), ("output", "attn.out_proj"), ("widen", "mlp.c_fc"), ("narrow", "mlp.c_proj"),
)  # fmt: skip
_TRANSFORMERS = (
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("output", "self_attn.out_proj"), ("widen", "mlp.fc1"),
    ("narrow", "mlp.fc2"),
)  # fmt: skip
AGAIN = "get the file again, from open_clip, OpenAI or transformers"  # the remedy for one that is not whole
_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")  # numbers that only OpenAI's own files carry


def vision_from_published(
    tensors: Mapping[str, Tensor], activation: Activation | None = None, heads: int | None = None
) -> ClipVision:
    """The picture tower with published weights.

    Args:
        tensors: open_clip's or transformers' names; other tensors may be among them.
        activation: None: what :func:`likely_activation` says.
        heads: of the attention; None: as in the published models of that width.

    Raises:
        UserError: a tensor is missing or of a shape that fits no CLIP.
    """
    state = _VisionNames(tensors).state("the picture tower")
    _, _, patch, _ = _shape(state, "patches.weight", 4)
    places, width = _shape(state, "places", 2)
    side = patch * round((places - 1) ** 0.5)
    hidden, layers = _shape(state, "blocks.0.widen.weight", 2)[0], _count(state)
    space = _shape(state, "project.weight", 2)[0]
    chosen = activation or likely_activation(tensors)
    return _filled(ClipVision(side, patch, width, layers, hidden, space, chosen, heads), state)


def text_from_published(
    tensors: Mapping[str, Tensor], activation: Activation | None = None, heads: int | None = None
) -> ClipText:
    """The text tower with published weights; as :func:`vision_from_published`."""
    state = _TextNames(tensors).state("the text tower")
    (words, width), (length, _) = _shape(state, "words.weight", 2), _shape(state, "places", 2)
    hidden, layers = _shape(state, "blocks.0.widen.weight", 2)[0], _count(state)
    space = _shape(state, "project.weight", 2)[0]
    chosen = activation or likely_activation(tensors)
    return _filled(ClipText(words, length, width, layers, hidden, space, chosen, heads), state)


def likely_activation(tensors: Mapping[str, Tensor]) -> Activation:
    """``quick_gelu`` for OpenAI's own file, else ``gelu``, which open_clip's trainings used. The tensors of both have
    the same names and shapes; what transformers stores says it in its configuration."""
    return "quick_gelu" if any(name in tensors for name in _OPENAI_MARKS) else "gelu"


class _Names:
    """Published tensors by our names."""

    blocks: tuple[str, str]  # prefix of a block in open_clip's and in transformers' files
    singles: tuple[tuple[str, str, str], ...]  # ours, open_clip's, transformers'

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        self.style = 1 if any(name.startswith(self.blocks[1]) for name in self.tensors) else 0

    def state(self, what: str) -> dict[str, Tensor]:
        """Everything, float32. UserError where something is missing."""
        found = {}
        for ours, *theirs in self.singles:
            value = self._take(theirs[self.style], what)
            turned = ours == "project.weight" and self.style == 0  # open_clip keeps it as (W, D)
            found[ours] = value.T.contiguous() if turned else value
        prefix = self.blocks[self.style]
        numbers = [int(m[1]) for name in self.tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
        for number in range(max(numbers, default=-1) + 1):
            for kind in ("weight", "bias"):
                for ours, theirs in (_OPEN_CLIP, _TRANSFORMERS)[self.style]:
                    found[f"blocks.{number}.{ours}.{kind}"] = self._take(f"{prefix}{number}.{theirs}.{kind}", what)
                found[f"blocks.{number}.inputs.{kind}"] = self._inputs(f"{prefix}{number}", kind, what)
        return found

    def _inputs(self, block: str, kind: str, what: str) -> Tensor:
        if self.style == 0:
            return self._take(f"{block}.attn.in_proj_{kind}", what)
        return torch.cat([self._take(f"{block}.self_attn.{part}_proj.{kind}", what) for part in "qkv"])

    def _take(self, name: str, what: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(
                f"this is not CLIP: {what} needs a tensor {name}, got nothing of that name; expected a file of open_clip "
                "or of OpenAI (a vision transformer such as ViT-B-32), or a CLIPModel folder of transformers"
            )
        return self.tensors[name].detach().float()


class _VisionNames(_Names):
    blocks = ("visual.transformer.resblocks.", "vision_model.encoder.layers.")
    singles = (
        ("patches.weight", "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("summary", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("places", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("norm_in.weight", "visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
        ("norm_in.bias", "visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
        ("norm_out.weight", "visual.ln_post.weight", "vision_model.post_layernorm.weight"),
        ("norm_out.bias", "visual.ln_post.bias", "vision_model.post_layernorm.bias"),
        ("project.weight", "visual.proj", "visual_projection.weight"),
    )


class _TextNames(_Names):
    blocks = ("transformer.resblocks.", "text_model.encoder.layers.")
    singles = (
        ("words.weight", "token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("places", "positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("norm_out.weight", "ln_final.weight", "text_model.final_layer_norm.weight"),
        ("norm_out.bias", "ln_final.bias", "text_model.final_layer_norm.bias"),
        ("project.weight", "text_projection", "text_projection.weight"),
    )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].ndim != dimensions:
        got = tuple(state[name].shape) if name in state else "no block at all"
        raise UserError(f"this is not CLIP: {name} must have {dimensions} dimensions, got {got}; {AGAIN}")
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(name.endswith(".widen.weight") for name in state)


def _filled(network: Any, state: Mapping[str, Tensor]) -> Any:
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in state or state[name].shape != value.shape:
            got = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(f"this is not CLIP: {name} must be {tuple(value.shape)}, got {got}; {AGAIN}")
    network.load_state_dict(dict(state))
    return network.requires_grad_(False).eval()
