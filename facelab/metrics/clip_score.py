# SPDX-License-Identifier: Apache-2.0
"""CLIP from files the user has, and how well the views of a head fit a prompt.

Read are a file with open_clip's names (``open_clip_model.safetensors``, ``open_clip_pytorch_model.bin``, OpenAI's
``ViT-B-32.pt``, of which only tensors are read) or a CLIPModel folder of transformers. A prompt becomes token numbers
through transformers' tokenizer and the word list that lies beside the weights.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.errors import UserError
from facelab.metrics.evaluate import HeadChunk, Tick
from facelab.metrics.features import read_tensor_file
from facelab.nn.pretrained.clip import Activation, ClipText, ClipVision, text_from_published, vision_from_published
from facelab.nn.pretrained.text_packages import has_words, read_tokenizer

MERGES_GZ = "bpe_simple_vocab_16e6.txt.gz"  # the word list as OpenAI and open_clip ship it
MERGES = 49152 - 256 - 2  # of its lines that count
WORDS = f"vocab.json and merges.txt (or open_clip's {MERGES_GZ})"
CameraOf = Callable[[int, int], Camera]  # first head, number of heads -> their cameras


def load_clip(
    path: str | Path, prompt: str, tokenizer: str | Path | None = None, activation: Activation | None = None
) -> tuple[ClipVision, Tensor, str]:
    """The picture tower, the (1, D) embedding of a prompt, and a name for both; the text tower is gone afterwards.

    Args:
        path: a file with open_clip's names, or a CLIPModel folder.
        prompt: the text, at most 75 tokens are seen.
        tokenizer: folder with the word list; None: where the weights lie.
        activation: see :func:`~facelab.nn.pretrained.clip.likely_activation`; a folder's configuration says it itself.

    Raises:
        UserError: nothing there, another network, no word list, an empty prompt, or transformers is not installed.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty: expected a description such as 'a man with a beard'")
    file, config = _weights_and_config(Path(path))
    tensors = read_tensor_file(file)
    vision_says, text_says = (_told(config, tower) for tower in ("vision_config", "text_config"))
    try:
        vision = vision_from_published(tensors, activation or vision_says[0], vision_says[1])
        text = text_from_published(tensors, activation or text_says[0], text_says[1])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tokens = tokenize(prompt, file.parent if tokenizer is None else Path(tokenizer), text)
    with torch.no_grad():
        embedding = text(tokens)
    layers, patch = len(vision.blocks), vision.patches.kernel_size[0]
    return vision, embedding, f"clip {file.parent.name}/{file.name} ({layers} layers, patches of {patch})"


def tokenize(prompt: str, folder: Path, text: ClipText) -> Tensor:
    """(1, L) token numbers. UserError without a word list, or with one that is not the tower's."""
    if has_words(folder):
        tokens = _tokens(prompt, folder, text.length)
    elif (folder / MERGES_GZ).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            _unpack_words(folder / MERGES_GZ, Path(scratch))
            tokens = _tokens(prompt, Path(scratch), text.length)
    else:
        raise UserError(f"CLIP needs a word list to read a prompt: no {WORDS} in {folder}; put them there")
    largest = len(text.words.weight) - 1
    if int(tokens.max()) != largest:
        raise UserError(
            f"the word list in {folder} is not that of the CLIP weights: its last word is number {int(tokens.max())}, "
            f"expected {largest}; take the one that was published with them"
        )
    return tokens


@torch.no_grad()
def clip_score_report(
    chunks: Iterable[HeadChunk],
    count: int,
    batch: int,
    cameras: Sequence[CameraOf],
    similarity: Callable[[Tensor], Tensor],
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Cosine of prompt and picture, of each head from each of some cameras.

    Args:
        chunks: the heads, ``batch`` at a time, in order.
        count: of heads in all.
        cameras: one function for each view.
        similarity: (N, 3, S, S) in [-1, 1] -> (N,), such as ``ClipSimilarity.similarity``.

    Returns:
        ``value``: mean of all; ``std``: over heads, of their means over views; ``lowest_view``: mean of the worst view;
        ``per_view``: means; ``count``: heads.

    Raises:
        ValueError: no view, or a similarity of another form.
    """
    if not cameras:
        raise ValueError("a CLIP score needs at least one view")
    rows: list[Tensor] = []
    start = 0
    for see in chunks:
        number = min(batch, count - start)
        columns = [similarity(see(camera(start, number)).image * 2 - 1) for camera in cameras]
        for column in columns:
            if column.shape != (number,):
                raise ValueError(f"a similarity gives ({number},), got {tuple(column.shape)}")
        rows.append(torch.stack(columns, dim=1).double().cpu())
        start += number
        if tick is not None:
            tick(number)
    table = torch.cat(rows)
    views = table.mean(dim=0)
    return {
        "value": float(table.mean()),
        "std": float(table.mean(dim=1).std(correction=0)),
        "lowest_view": float(views.min()),
        "per_view": views.tolist(),
        "count": len(table),
    }


def _weights_and_config(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The weight file, and what config.json beside a CLIPModel says (else nothing)."""
    if path.is_file():
        return path, {}
    if not path.is_dir():
        raise UserError(
            f"no CLIP weights at {path}: expected a file of open_clip or a CLIPModel folder; check the path"
        )
    if (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / 'config.json'} is damaged: expected JSON; download it again") from error
        return path / "model.safetensors", config if isinstance(config, dict) else {}
    found = sorted(
        [*path.glob("open_clip*.safetensors"), *path.glob("open_clip*.bin")], key=lambda p: p.suffix != ".safetensors"
    )
    if not found:
        raise UserError(
            f"{path} holds no CLIP: expected model.safetensors with config.json, or open_clip_model.safetensors, got "
            "neither; download them too"
        )
    return found[0], {}


def _told(config: Mapping[str, Any], tower: str) -> tuple[Activation | None, int | None]:
    """Activation and number of heads, where a configuration says them; transformers' own defaults are those of B/32."""
    if not config:
        return None, None
    own = config.get(tower) or {}
    activation = own.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"config.json: {tower}.hidden_act is '{activation}', expected gelu or quick_gelu")
    heads = own.get("num_attention_heads", 12 if tower == "vision_config" else 8)
    return activation, int(heads)


def _tokens(prompt: str, folder: Path, length: int) -> Tensor:
    return read_tokenizer(folder)([prompt], truncation=True, max_length=length, return_tensors="pt").input_ids


def _unpack_words(packed: Path, folder: Path) -> None:
    """open_clip's packed merges -> vocab.json and merges.txt. UserError for another file."""
    from facelab.nn.pretrained.random_diffusion import byte_letters

    try:
        lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{packed} is damaged: expected the packed word list of CLIP; download it again") from error
    merges = [line for line in lines[1 : MERGES + 1] if line]
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
