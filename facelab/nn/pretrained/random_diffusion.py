# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion with random weights: real diffusers networks, built from configurations.

The tiny one has a few thousand weights and serves tests and the demonstration without a download. It has learnt
nothing: guidance by it runs every step of the real thing and changes a picture at random. Everything it makes is labelled
:data:`~facelab.nn.pretrained.diffusion.TINY`. The one of full size serves measurements of time and memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facelab.files import atomic_path
from facelab.nn.pretrained.diffusion import (
    DTYPES,
    TINY,
    DiffusionParts,
    Kind,
    Precision,
    PromptEmbeddings,
    ddim_schedule,
    frozen_parts,
)
from facelab.nn.pretrained.text_packages import package, quiet

TOKENS, WIDTH, POOLED = 77, 16, 8
BETAS: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
UNET: Mapping[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 128,
    "scaling_factor": 0.18215,
}
TEXT: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
}
FULL = "random-sd-2.1-base-sizes"  # what the one of full size is called
FULL_WIDTH = 1024  # of its embeddings
FULL_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": FULL_WIDTH,
    "use_linear_projection": True,
}
FULL_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def tiny_diffusion(seed: int = 0, kind: Kind = "sd", device: torch.device | str = "cpu") -> DiffusionParts:
    """Denoiser, encoder and schedule with weights that depend on the seed alone. UserError without the packages."""
    unet, vae = _networks(seed, kind)
    return frozen_parts(unet, vae, ddim_schedule(BETAS), kind, f"{TINY}/{kind}/seed{seed}", device, False)


def full_size_diffusion(
    precision: Precision = "bf16",
    device: torch.device | str = "cpu",
    checkpointing: bool = False,
    unet: Mapping[str, Any] = FULL_UNET,
    vae: Mapping[str, Any] = FULL_VAE,
) -> tuple[DiffusionParts, PromptEmbeddings]:
    """Networks of Stable Diffusion 2.1 base's sizes with random weights, and embeddings as random: it costs the same time
    and memory as the real one. Drawn where they lie, so two kinds of device hold other numbers.

    Args:
        precision, device, checkpointing: as for :func:`~facelab.nn.pretrained.diffusion.load_diffusion`.
        unet, vae: other sizes.

    UserError without the packages.
    """
    diffusers, dtype = package("diffusers"), DTYPES[precision]
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae)
    generator = torch.Generator(device).manual_seed(0)
    parts = [_drawn(part, dtype, device, generator) for part in made]
    tokens = torch.randn(2, TOKENS, unet["cross_attention_dim"], generator=torch.Generator().manual_seed(0))
    found = frozen_parts(parts[0], parts[1], ddim_schedule(BETAS), "sd", FULL, device, checkpointing)
    return found, PromptEmbeddings(tokens, source=FULL)


def tiny_embeddings(prompt: str, negative: str = "", kind: Kind = "sd") -> PromptEmbeddings:
    """Random numbers in the place of embeddings, a pure function of the texts."""
    width = 2 * WIDTH if kind == "sdxl" else WIDTH
    tokens = torch.stack([_numbers(text, (TOKENS, width)) for text in (negative, prompt)])
    pooled = torch.stack([_numbers(text, (POOLED,)) for text in (negative, prompt)]) if kind == "sdxl" else None
    return PromptEmbeddings(tokens, pooled, prompt, negative, TINY)


def write_tiny_folder(folder: str | Path, seed: int = 0, kind: Kind = "sd", prediction: str = "epsilon") -> Path:
    """The whole of it, text encoders and byte tokenizers included, in the layout of diffusers; for tests."""
    folder, transformers = Path(folder), package("transformers")
    unet, vae = _networks(seed, kind)
    with quiet("diffusers", "transformers"):
        unet.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        for number in range(2 if kind == "sdxl" else 1):
            tail = f"_{number + 1}" if number else ""
            words = write_tokenizer(folder / f"tokenizer{tail}")
            ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
            config = transformers.CLIPTextConfig(**TEXT, vocab_size=len(words), projection_dim=POOLED, **ends)
            made = transformers.CLIPTextModelWithProjection if number else transformers.CLIPTextModel
            _fill(made(config), seed + 2 + number).save_pretrained(folder / f"text_encoder{tail}")
    index = {"force_zeros_for_empty_prompt": kind == "sdxl", "facelab": TINY}
    _write(folder / "model_index.json", index)
    _write(folder / "scheduler" / "scheduler_config.json", {**BETAS, "prediction_type": prediction})
    return folder


def _networks(seed: int, kind: Kind) -> tuple[Any, Any]:
    diffusers = package("diffusers")
    extra: dict[str, Any] = {}
    if kind == "sdxl":  # the pooled text and six sizes, each as 8 waves, are added to the time
        extra = {"cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        extra["projection_class_embeddings_input_dim"] = POOLED + 6 * 8
    with torch.random.fork_rng(devices=[]):
        unet = diffusers.UNet2DConditionModel(**{**UNET, **extra})
        vae = diffusers.AutoencoderKL(**VAE)
    return _fill(unet, seed), _fill(vae, seed + 1)


def _fill(module: Any, seed: int) -> Any:
    """Weights by name from numpy's PCG64, whose stream does not change: scaled normal numbers, ones, zeros."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim < 2:
                nn.init.constant_(value, 1.0 if name.endswith("weight") else 0.0)
                continue
            spread = (value[0].numel()) ** -0.5
            value.copy_(_numbers(f"{seed}/{name}", tuple(value.shape)) * spread)
    return module.eval()


def _drawn(part: nn.Module, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> nn.Module:
    """A network on the meta device -> the same with memory and scaled normal numbers, ones and zeros."""
    for child in part.modules():
        for name, value in list(child.named_parameters(recurse=False)):
            drawn = torch.empty(value.shape, dtype=dtype, device=device)
            if value.ndim < 2:
                drawn.fill_(1.0 if name == "weight" else 0.0)
            else:
                drawn.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
            setattr(child, name, nn.Parameter(drawn, requires_grad=False))
    return part


def _numbers(text: str, shape: tuple[int, ...]) -> Tensor:
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64(key)).standard_normal(shape).astype(np.float32))


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A CLIP tokenizer without merges: every byte is a token, alone or at the end of a word."""
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: number for number, word in enumerate(words)}
    _write(folder / "vocab.json", numbers)
    with atomic_path(folder / "merges.txt") as path:
        path.write_text("#version: 0.2\n", encoding="utf-8")
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": TOKENS,
            "bos_token": words[-2],
            "eos_token": words[-1],
            "unk_token": words[-1],
            "pad_token": words[-1],
        },
    )
    return numbers


def byte_letters() -> list[str]:
    """A visible character for each of the 256 bytes: printable Latin-1 for itself, others from U+0100 on."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    return [*map(chr, itself), *(chr(256 + number) for number in range(len(others)))]


def _write(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
