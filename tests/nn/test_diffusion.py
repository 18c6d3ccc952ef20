# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion folders: whole ones, against diffusers' own pipelines, and every way of being incomplete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from facelab.draws import Draws
from facelab.errors import UserError
from facelab.losses.score_distillation import GuidanceSettings, NoiseSchedule, ScoreDistillation
from facelab.nn.pretrained import diffusion, text_packages
from facelab.nn.pretrained.diffusion import (
    PromptEmbeddings,
    check_folder,
    encode_prompt,
    load_diffusion,
    read_embeddings,
    save_embeddings,
)
from facelab.nn.pretrained.random_diffusion import (
    FULL_UNET,
    FULL_VAE,
    UNET,
    VAE,
    full_size_diffusion,
    tiny_diffusion,
    tiny_embeddings,
    write_tiny_folder,
)

for _package in ("diffusers", "transformers"):
    pytest.importorskip(_package, reason=f"needs {_package}: pip install 'facelab[text]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Stable Diffusion and a tiny XL."""
    place = tmp_path_factory.mktemp("diffusion")
    return {kind: write_tiny_folder(place / kind, kind=kind) for kind in ("sd", "sdxl")}  # type: ignore[arg-type]


def copy_of(folder: Path, place: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(folder, place / "copy"))


def test_a_folder_is_read_part_by_part(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        assert check_folder(folder) == kind
        parts = load_diffusion(folder, "fp32")
        made = tiny_diffusion(kind=kind)  # type: ignore[arg-type]
        for ours, theirs in ((parts.unet, made.unet), (parts.vae, made.vae)):
            expected = theirs.state_dict()
            assert ours.state_dict().keys() == expected.keys()
            assert all(value.equal(expected[name]) for name, value in ours.state_dict().items())
            assert not ours.training and not any(value.requires_grad for value in ours.parameters())
        assert parts.kind == kind and parts.source == str(folder) and made.source == f"tiny-random/{kind}/seed0"
        assert not any("decoder" in name for name in parts.vae.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the pipelines' advice on schedules
def test_prompts_are_encoded_as_diffusers_pipelines_do(folders: dict[str, Path]) -> None:
    import diffusers
    import transformers

    for kind, folder in folders.items():
        parts = load_diffusion(folder, "fp32")
        given: dict[str, Any] = {"unet": parts.unet, "scheduler": parts.scheduler}
        given["vae"] = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False)
        for tail in ("", "_2") if kind == "sdxl" else ("",):
            encoder = transformers.CLIPTextModelWithProjection if tail else transformers.CLIPTextModel
            given[f"text_encoder{tail}"] = encoder.from_pretrained(folder / f"text_encoder{tail}")
            given[f"tokenizer{tail}"] = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{tail}")
        if kind == "sdxl":
            pipeline: Any = diffusers.StableDiffusionXLPipeline(**given, add_watermarker=False)
        else:
            lacking = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**given, **lacking)
        for negative in ("", "ugly, blurred"):
            asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
            own = None if kind == "sdxl" and not negative else negative  # the pipeline's zeros need None
            with torch.no_grad():
                prompted, empty, *pooled = pipeline.encode_prompt("A Man, smiling!", **asked, negative_prompt=own)
            found = encode_prompt(folder, "A Man, smiling!", negative)
            torch.testing.assert_close(found.tokens, torch.cat([empty, prompted]))
            if kind == "sdxl":
                assert found.pooled is not None
                torch.testing.assert_close(found.pooled, torch.cat(pooled[::-1]))
                sizes = pipeline._get_add_time_ids(
                    (96, 96), (0, 0), (96, 96), dtype=torch.float32, text_encoder_projection_dim=8
                )
                extra = found.extra(2, 96)
                assert extra is not None
                torch.testing.assert_close(extra["time_ids"], sizes.expand(4, -1))
                assert extra["text_embeds"].equal(found.pooled.repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_folder_guides_a_picture(folders: dict[str, Path], kind: str) -> None:
    parts, embeddings = load_diffusion(folders[kind], "fp32"), encode_prompt(folders[kind], "a man")
    guided = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, embeddings, GuidanceSettings(rows=1))
    assert guided.side == 128 and guided.scaling == 0.18215
    torch.testing.assert_close(guided.schedule.alphas, NoiseSchedule.scaled_linear(0.00085, 0.012).alphas)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gradient, found = guided.gradient(x, Draws(0), timesteps=torch.tensor([300, 300]))
    assert gradient.shape == x.shape and bool(gradient.isfinite().all()) and float(gradient.abs().mean()) > 0
    other = guided.with_embeddings(encode_prompt(folders[kind], "a cat"))
    moved = other.gradient(x, Draws(0), timesteps=torch.tensor([300, 300]))[1]
    assert not moved.latent_gradient.equal(found.latent_gradient)
    # the denoiser, called by hand on the first picture
    alpha, noise = guided.schedule.alphas[300], Draws(0).normal("sds/noise", (1, 2, 4, 16, 16))[0, :1]
    noisy = alpha.sqrt() * found.latents[:1] + (1 - alpha).sqrt() * noise
    extra = embeddings.extra(1, 128)
    with torch.no_grad():
        said = parts.unet(noisy.expand(2, -1, -1, -1), 300, embeddings.tokens, added_cond_kwargs=extra).sample
    expected = (1 - alpha) * (said[1] + 100 * (said[1] - said[0]) - noise[0])
    torch.testing.assert_close(found.latent_gradient[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_parts_may_lie_on_another_device_than_the_pictures(folders: dict[str, Path]) -> None:
    x, found = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    tokens = encode_prompt(folders["sdxl"], "a man")
    for device in ("cpu", "cuda"):
        parts = load_diffusion(folders["sdxl"], "fp32", device)
        guided = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, tokens, GuidanceSettings(guidance=1.0))
        leaf = x.clone().requires_grad_()
        loss = guided.loss(leaf, Draws(0))
        loss.sum().backward()
        assert loss.device == x.device and leaf.grad is not None and leaf.grad.device == x.device
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3 * float(found[0].abs().max()))


def test_checkpointing_and_precision_change_memory_and_rounding_alone(folders: dict[str, Path]) -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = encode_prompt(folders["sd"], "a man")

    def gradient(precision: Any, checkpointing: bool) -> torch.Tensor:
        parts = load_diffusion(folders["sd"], precision, checkpointing=checkpointing)
        assert next(parts.unet.parameters()).dtype == next(parts.vae.parameters()).dtype == diffusion.DTYPES[precision]
        assert parts.vae.encoder.gradient_checkpointing == checkpointing
        guided = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, tokens, GuidanceSettings(guidance=1.0))
        return guided.gradient(x, Draws(0))[0]

    exact = gradient("fp32", False)
    torch.testing.assert_close(gradient("fp32", True), exact, rtol=1e-3, atol=1e-6)
    rough = gradient("bf16", False)
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.3


def test_embeddings_are_stored_and_read_instead_of_encoded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_prompt(folders["sdxl"], "a man", "ugly", cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(diffusion, "_encode_one", None)
    again = encode_prompt(folders["sdxl"], "a man", "ugly", cache=tmp_path)
    assert again.pooled is not None and first.pooled is not None
    assert again.tokens.equal(first.tokens) and again.pooled.equal(first.pooled)
    assert (again.prompt, again.negative, again.source) == ("a man", "ugly", str(folders["sdxl"]))
    with pytest.raises(TypeError):  # other texts are not in the store
        encode_prompt(folders["sdxl"], "a man", "", cache=tmp_path)


def test_another_encoder_has_other_stored_embeddings(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny_folder(tmp_path / "other", seed=8)
    found = [encode_prompt(folder, "a man", cache=tmp_path / "store") for folder in (folders["sd"], other)]
    assert len(list((tmp_path / "store").iterdir())) == 2
    assert not found[0].tokens.equal(found[1].tokens)


def test_stored_embeddings_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    save_embeddings(path, tiny_embeddings("a man"))
    assert read_embeddings(path).tokens.equal(tiny_embeddings("a man").tokens)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"expected stored prompt embeddings.*remove it"):
        read_embeddings(path)
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(UserError, match="holds no prompt embeddings"):
        read_embeddings(path)


def test_tiny_embeddings_are_a_function_of_the_texts() -> None:
    first, second = tiny_embeddings("a man", kind="sdxl"), tiny_embeddings("a cat", kind="sdxl")
    assert first.tokens.shape == (2, 77, 32) and first.source == "tiny-random"
    assert first.tokens[0].equal(second.tokens[0]) and not first.tokens[1].equal(second.tokens[1])
    assert isinstance(first, PromptEmbeddings) and first.extra(3, 64) is not None


def test_the_full_size_is_that_of_stable_diffusion_2_1() -> None:
    """The published networks have 865 910 724 and 83 653 863 weights."""
    import diffusers

    with torch.device("meta"):
        parts = diffusers.UNet2DConditionModel(**FULL_UNET), diffusers.AutoencoderKL(**FULL_VAE)
    assert [sum(value.numel() for value in part.parameters()) for part in parts] == [865_910_724, 83_653_863]


def test_random_networks_of_any_size_guide_a_picture() -> None:
    parts, embeddings = full_size_diffusion("fp32", unet=UNET, vae=VAE)
    again = full_size_diffusion("fp32", unet=UNET, vae=VAE)[0]
    assert parts.source == embeddings.source == "random-sd-2.1-base-sizes"
    assert all(a.equal(b) for a, b in zip(parts.unet.parameters(), again.unet.parameters(), strict=True))
    guided = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, embeddings)
    gradient = guided.gradient(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), Draws(0))[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().mean()) > 0


def test_the_prediction_of_the_folder_counts(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "v", prediction="v_prediction")
    assert NoiseSchedule.of(load_diffusion(folder).scheduler).prediction == "v_prediction"


def test_files_of_the_fp16_variant_are_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["sd"], tmp_path)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert check_folder(folder) == "sd"
    expected = load_diffusion(folders["sd"], "fp32").unet.state_dict()
    assert all(value.equal(expected[name]) for name, value in load_diffusion(folder, "fp32").unet.state_dict().items())
    assert encode_prompt(folder, "a man").tokens.equal(encode_prompt(folders["sd"], "a man").tokens)


# ---------------------------------------------------------------- bad folders


def _remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _pickled(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def _inpainting(folder: Path) -> None:
    _set(folder / "unet" / "config.json", in_channels=9)


def _flux(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")


def _set(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no_unet": ("sd", _remove("unet"), "incomplete: unet: config.json is missing"),
    "no_vae_weights": (
        "sd",
        _remove("vae/diffusion_pytorch_model.safetensors"),
        r"incomplete: vae: its weights \(a \.safetensors file\) are missing",
    ),
    "no_scheduler": ("sd", _remove("scheduler"), "incomplete: scheduler: scheduler_config.json is missing"),
    "no_encoder": ("sd", _remove("text_encoder"), "incomplete: text_encoder: config.json is missing"),
    "no_second_encoder": ("sdxl", _remove("text_encoder_2"), "incomplete: text_encoder_2"),
    "no_words": ("sd", _remove("tokenizer/merges.txt"), "incomplete: tokenizer: vocab.json and merges.txt"),
    "no_second_words": ("sdxl", _remove("tokenizer_2"), "incomplete: tokenizer_2"),
    "pickle": ("sd", _pickled, r"unet has its weights as diffusion_pytorch_model\.bin, a pickle, which is not opened"),
    "inpainting": ("sd", _inpainting, "takes 9 channels, the encoder gives 4"),
    "another_family": ("sd", _flux, "holds 'transformer' instead of 'unet'"),
    "damaged_config": ("sd", lambda f: (f / "vae" / "config.json").write_text("{") and None, "expected JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_incomplete_folder_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, damage, message = BAD[case]
    folder = copy_of(folders[kind], tmp_path)
    damage(folder)
    for read in (check_folder, load_diffusion, lambda f: encode_prompt(f, "a man")):
        with pytest.raises(UserError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Stable Diffusion folder at .*diffusers layout"):
        load_diffusion(tmp_path / "nowhere")
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a single file: expected a folder"):
        load_diffusion(tmp_path / "v1-5.safetensors")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _resize(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(n for n, v in tensors.items() if v.ndim == 4)
    tensors[name] = torch.zeros(3, *tensors[name].shape[1:])
    save_file(tensors, path, metadata={"format": "pt"})


def _forget(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_cut, _resize, _forget])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_wrong_sized_and_lacking_weights_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str, damage: Callable[[Path], None]
) -> None:
    folder = copy_of(folders["sd"], tmp_path)
    damage(folder / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"{part} cannot be read") as caught:
        load_diffusion(folder, "fp32")
    assert "\n" not in str(caught.value)


def test_a_lacking_weight_of_the_text_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["sd"], tmp_path)
    _forget(folder / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match="text_encoder cannot be read"):
        encode_prompt(folder, "a man")


def test_a_damaged_or_foreign_word_list_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["sd"], tmp_path)
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    moved = {word: number + 1000 for word, number in words.items()}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match=r"word list in tokenizer is not that of text_encoder.*less than 514"):
        encode_prompt(folder, "a man")
    (folder / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="the word list cannot be read") as caught:
        encode_prompt(folder, "a man")
    assert "\n" not in str(caught.value)


def test_an_empty_prompt_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(folders["sd"], "  ")


def test_missing_packages_are_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(text_packages.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"need the package diffusers.*pip install 'facelab\[text\]'"):
        load_diffusion(folders["sd"])


def test_importing_the_loader_loads_neither_package() -> None:
    code = (
        "import sys, facelab, facelab.nn.pretrained.random_diffusion, facelab.losses.score_distillation, "
        "facelab.metrics.clip_score; print({'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
