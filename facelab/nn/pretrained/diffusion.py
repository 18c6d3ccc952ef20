# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL, read from a folder in the layout of diffusers, part by part.

Only what guidance needs is loaded: denoiser, picture encoder, schedule; the text encoder for as long as it takes to
encode a prompt, and not at all where the embeddings are stored. Nothing is downloaded, and of weights only safetensors
files are read. The parts are those of the packages diffusers and transformers (``pip install facelab[text]``).
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from facelab.errors import UserError
from facelab.files import atomic_path
from facelab.nn.pretrained.text_packages import has_words, package, quiet, read_tokenizer

Kind = Literal["sd", "sdxl"]
Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
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


# ---------------------------------------------------------------- reading a folder


def check_folder(folder: str | Path) -> Kind:
    """Which family a folder holds, without reading weights.

    Raises:
        UserError: one line that names the first missing part and says how to get it.
    """
    folder = Path(folder)
    _refuse_what_is_no_folder(folder)
    unet = _json(folder / "unet" / "config.json", folder, "unet")
    kind: Kind = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd"
    for part in ("unet", "vae", *_text_parts(kind)[0]):
        _json(folder / part / "config.json", folder, part)
        if weight_file(folder / part) is None:
            pickles = sorted(p.name for p in (folder / part).glob("*.bin"))
            if pickles:
                raise UserError(
                    f"{folder}: {part} has its weights as {pickles[0]}, a pickle, which is not opened; expected a "
                    ".safetensors file beside it; download that one too"
                )
            raise _incomplete(folder, part, "its weights (a .safetensors file) are missing")
    _json(folder / "scheduler" / "scheduler_config.json", folder, "scheduler")
    for part in _text_parts(kind)[1]:
        if not has_words(folder / part):
            raise _incomplete(folder, part, "vocab.json and merges.txt are missing")
    channels = unet.get("in_channels", 4)
    latent = _json(folder / "vae" / "config.json", folder, "vae").get("latent_channels", 4)
    if channels != latent:
        raise UserError(
            f"{folder}: the denoiser takes {channels} channels, the encoder gives {latent}: made for inpainting or "
            "another task; expected a text-to-image model"
        )
    return kind


def load_diffusion(
    folder: str | Path,
    precision: Precision = "bf16",
    device: torch.device | str = "cpu",
    checkpointing: bool = False,
) -> DiffusionParts:
    """Denoiser, picture encoder and schedule of a folder; the text encoder is left alone.

    Args:
        precision: of both networks. XL's published encoder overflows in fp16 (its configuration says so) and is then
            kept in fp32.
        device: where they go; another one than the generator's keeps the memory of the two apart.
        checkpointing: the encoder's activations are computed twice instead of kept: less memory, some more time.

    Raises:
        UserError: the packages are not installed, the folder is incomplete, or weights do not fit the configuration.
    """
    kind = check_folder(folder)
    diffusers = package("diffusers")
    dtype = DTYPES[precision]
    with quiet("diffusers", "transformers"):
        unet = _model(diffusers.UNet2DConditionModel, Path(folder), "unet", dtype)
        upcast = json.loads((Path(folder) / "vae" / "config.json").read_text()).get("force_upcast", False)
        keep = kind == "sdxl" and upcast and precision == "fp16"
        vae = _model(diffusers.AutoencoderKL, Path(folder), "vae", torch.float32 if keep else dtype)
    scheduler = ddim_schedule(_json(Path(folder) / "scheduler" / "scheduler_config.json", Path(folder), "scheduler"))
    return frozen_parts(unet, vae, scheduler, kind, str(folder), device, checkpointing)


def frozen_parts(
    unet: Any, vae: Any, scheduler: Any, kind: Kind, source: str, device: Any, checkpointing: bool
) -> DiffusionParts:
    """Without the decoder, which guidance does not need; no gradients for weights, evaluation mode, on a device."""
    vae.decoder = None
    vae.post_quant_conv = None
    for part in (unet, vae):
        part.requires_grad_(False).eval().to(device)
        if torch.device(device).type == "cuda":  # the order that half precision convolutions want
            part.to(memory_format=torch.channels_last)
    if checkpointing:
        recompute_encoder(vae)
    return DiffusionParts(unet, vae, scheduler, kind, source)


def recompute_encoder(vae: Any) -> None:
    """Keep nothing of the encoder for the backward. No random state is read: no layer draws, and a CUDA graph (in which a
    step may be recorded) could not."""
    vae.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def _model(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One network, strictly: no missing weight, no weight of another size."""
    options: dict[str, Any] = {"torch_dtype": dtype} if part in ("unet", "vae") else {}
    if part in ("unet", "vae"):
        options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
    file = weight_file(folder / part)
    variant = None if file is None else _variant(file)
    try:
        model, info = kind.from_pretrained(
            str(folder),
            subfolder=part,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # both packages raise many kinds for damaged and wrong sized files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder}: {part} cannot be read: expected weights that fit its config.json, got: {reason}; {DOWNLOAD}"
        ) from error
    wrong = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    wrong = [name for name in wrong if not name.endswith("position_ids")]
    if wrong:
        raise UserError(
            f"{folder}: {part} cannot be read: {len(wrong)} weights are missing or of another size than its "
            f"config.json says, the first is {wrong[0]}; {DOWNLOAD}"
        )
    return model.to(dtype)


def ddim_schedule(entries: Mapping[str, Any]) -> Any:
    """A DDIM schedule with the betas of whatever scheduler the folder names."""
    names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas", "prediction_type")
    known = {name: entries[name] for name in (*names, "rescale_betas_zero_snr") if entries.get(name) is not None}
    return package("diffusers").DDIMScheduler(**known)


# ---------------------------------------------------------------- prompts


def encode_prompt(
    folder: str | Path,
    prompt: str,
    negative: str = "",
    device: torch.device | str = "cpu",
    cache: str | Path | None = None,
) -> PromptEmbeddings:
    """Encode a prompt and a negative one, in float32, and drop the text encoder.

    Args:
        device: where it is done; the result lies on the CPU.
        cache: folder of stored embeddings. Those of the same texts and the same encoder are read, others stored.

    Raises:
        UserError: an empty prompt, packages that are not installed, or an incomplete folder.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty: expected a description such as 'a man with a beard'")
    kind, folder = check_folder(folder), Path(folder)
    stored = None if cache is None else Path(cache) / f"{_key(folder, kind, prompt, negative)}.safetensors"
    if stored is not None and stored.is_file():
        return read_embeddings(stored)
    rows = [
        _encode_one(folder, part, words, [negative, prompt], kind, device) for part, words in zip(*_text_parts(kind))
    ]
    tokens = torch.cat([row[0] for row in rows], dim=-1)
    pooled = rows[-1][1] if kind == "sdxl" else None
    if kind == "sdxl" and not negative and _zeros_for_empty(folder):
        tokens = torch.stack([torch.zeros_like(tokens[0]), tokens[1]])
        pooled = None if pooled is None else torch.stack([torch.zeros_like(pooled[0]), pooled[1]])
    found = PromptEmbeddings(tokens, pooled, prompt, negative, str(folder))
    if stored is not None:
        save_embeddings(stored, found)
    return found


def _encode_one(
    folder: Path, part: str, words: str, texts: list[str], kind: Kind, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """((2, T, C), (2, P) or None), float32, on the CPU. SD takes the last layer, XL the last but one (arXiv 2307.01952)."""
    tokenizer, name = read_tokenizer(folder / words), f"CLIPTextModel{'WithProjection' if part.endswith('_2') else ''}"
    with quiet("transformers"):
        encoder = _model(getattr(package("transformers"), name), folder, part, torch.float32).eval().to(device)
    length = encoder.config.max_position_embeddings
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    if int(ids.max()) >= encoder.config.vocab_size:
        raise UserError(
            f"{folder}: the word list in {words} is not that of {part}: it numbers words up to {int(ids.max())}, expected "
            f"less than {encoder.config.vocab_size}; download both again"
        )
    with torch.no_grad():
        answer = encoder(ids.to(device), output_hidden_states=kind == "sdxl")
    hidden = answer.hidden_states[-2] if kind == "sdxl" else answer.last_hidden_state
    pooled = getattr(answer, "text_embeds", None)
    result = hidden.float().cpu(), None if pooled is None else pooled.float().cpu()
    del encoder, answer
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return result


def save_embeddings(path: str | Path, embeddings: PromptEmbeddings) -> None:
    """Write embeddings and their texts as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {"tokens": embeddings.tokens.cpu().contiguous()}
    if embeddings.pooled is not None:
        tensors["pooled"] = embeddings.pooled.cpu().contiguous()
    words = {"prompt": embeddings.prompt, "negative": embeddings.negative, "source": embeddings.source}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"facelab_embeddings": json.dumps(words)})


def read_embeddings(path: str | Path) -> PromptEmbeddings:
    """What :func:`save_embeddings` wrote. UserError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            words = json.loads((file.metadata() or {}).get("facelab_embeddings", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: expected stored prompt embeddings, got a damaged or other file; remove it"
        ) from error
    tokens = tensors.get("tokens")
    if tokens is None or tokens.ndim != 3 or len(tokens) != 2 or not words:
        raise UserError(f"{path} holds no prompt embeddings: expected a tensor 'tokens' (2, T, C); remove it")
    return PromptEmbeddings(tokens, tensors.get("pooled"), words["prompt"], words["negative"], words["source"])


def _key(folder: Path, kind: Kind, prompt: str, negative: str) -> str:
    """A name for embeddings: of the texts and of the encoder's files (their sizes and three pieces of each)."""
    digest = hashlib.blake2b(json.dumps([kind, prompt, negative, _zeros_for_empty(folder)]).encode(), digest_size=16)
    for part in [part for parts in _text_parts(kind) for part in parts]:
        for path in sorted(p for p in (folder / part).iterdir() if p.suffix in (".json", ".txt", ".safetensors")):
            size = path.stat().st_size
            digest.update(f"{part}/{path.name}/{size}".encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, max(size - (1 << 20), 0)):
                    file.seek(start)
                    digest.update(file.read(1 << 20))
    return digest.hexdigest()


# ---------------------------------------------------------------- pieces


def weight_file(folder: Path) -> Path | None:
    """The safetensors file of a part, or the index of several; plain ones before fp16 ones."""
    found = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index*.json")]
    names = ("diffusion_pytorch_model", "model")
    usable = [p for p in found if p.name.split(".")[0] in names]
    return min(usable, key=lambda p: (_variant(p) is not None, p.name), default=None)


def _variant(file: Path) -> str | None:
    """``fp16`` of ``model.fp16.safetensors`` and of ``model.safetensors.index.fp16.json``."""
    middle = [piece for piece in file.name.split(".")[1:] if piece not in ("safetensors", "index", "json")]
    return middle[0] if middle else None


def _text_parts(kind: Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders of the text encoders, and of their tokenizers."""
    if kind == "sdxl":
        return ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
    return ("text_encoder",), ("tokenizer",)


def _zeros_for_empty(folder: Path) -> bool:
    """XL: an empty negative prompt counts as zeros instead of being encoded."""
    try:
        return bool(json.loads((folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError):
        return True


def _refuse_what_is_no_folder(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a single file: expected a folder with unet, vae, text_encoder ...; {DOWNLOAD}")
    if not folder.is_dir():
        raise UserError(f"no Stable Diffusion folder at {folder}: check the path, or {DOWNLOAD}")
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise UserError(
            f"{folder} holds 'transformer' instead of 'unet' (Stable Diffusion 3, Flux ...): "
            "expected Stable Diffusion 1.x, 2.x or XL"
        )


def _json(path: Path, folder: Path, part: str) -> dict[str, Any]:
    if not path.is_file():
        raise _incomplete(folder, part, f"{path.name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: expected JSON; {DOWNLOAD}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, got {type(content).__name__}; {DOWNLOAD}")
    return content


def _incomplete(folder: Path, part: str, what: str) -> UserError:
    return UserError(f"the Stable Diffusion folder {folder} is incomplete: {part}: {what}; {DOWNLOAD}")
