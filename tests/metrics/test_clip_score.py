# SPDX-License-Identifier: Apache-2.0
"""CLIP from a folder of transformers and from a file of open_clip, its word lists, and the score over views."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.losses.clip_similarity import ClipSimilarity, clip_input
from facelab.metrics import clip_score
from facelab.metrics.clip_score import clip_score_report, load_clip
from facelab.nn.pretrained.random_diffusion import byte_letters, write_tokenizer
from tests.nn.test_clip import as_open_clip, clip_model, features

WORDS = 514  # 256 bytes, alone and at the end of a word, and two signs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with random weights and a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("clip")
    ends = {"eos_token_id": WORDS - 1, "bos_token_id": WORDS - 2}
    clip_model(vocab_size=WORDS, max_position_embeddings=20, **ends).save_pretrained(place)
    write_tokenizer(place)
    return place


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The same network as a file of open_clip; the attention has heads of 64, so there is one."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: value.contiguous() for name, value in as_open_clip(load_file(folder / "model.safetensors")).items()
    }
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path / "open_clip_model.safetensors"


def test_a_folder_gives_what_transformers_computes(folder: Path) -> None:
    import transformers

    vision, prompt, name = load_clip(folder, "A Man")
    theirs: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    ids = transformers.CLIPTokenizer.from_pretrained(folder)(["A Man"], return_tensors="pt").input_ids
    pictures = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(prompt, features(theirs.get_text_features(input_ids=ids)), rtol=1e-4, atol=1e-5)
        answer = theirs(input_ids=ids, pixel_values=clip_input(pictures, 24))
        expected = answer.logits_per_image[:, 0] / theirs.logit_scale.exp()
        torch.testing.assert_close(ClipSimilarity(vision, prompt).similarity(pictures), expected, rtol=1e-4, atol=1e-5)
    assert name.startswith("clip ") and "2 layers, patches of 8" in name
    assert not load_clip(folder, "A Cat")[1].allclose(prompt)


def test_a_file_of_open_clip_is_read_with_the_words_beside_it(packed: Path) -> None:
    vision, prompt, _ = load_clip(packed, "a man")
    assert vision.blocks[0].activation == "gelu" and vision.blocks[0].heads == 1
    by_folder = load_clip(packed.parent, "a man")
    assert by_folder[1].equal(prompt)
    assert load_clip(packed, "a man", activation="quick_gelu")[0].blocks[0].activation == "quick_gelu"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is old, and what OpenAI published
def test_openais_torchscript_is_read_without_running_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors stand in an archive of code; it carries three numbers that tell its activation."""
    from safetensors.torch import load_file

    class Archive(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    archive = Archive()
    tensors = {**load_file(packed), "input_resolution": torch.tensor(24)}
    for name, value in tensors.items():
        *parents, last = name.split(".")
        place: Any = archive
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.register_buffer(last, value)
    target = packed.with_name("ViT-B-32.pt")
    torch.jit.script(archive).save(target)
    monkeypatch.setattr(torch.jit, "load", None)
    vision, prompt, _ = load_clip(target, "a man")
    assert vision.blocks[0].activation == "quick_gelu"
    assert prompt.equal(load_clip(packed, "a man", activation="quick_gelu")[1])


def test_the_packed_word_list_is_understood(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_clip(packed, "a man")[1]
    for name in ("vocab.json", "merges.txt"):
        (packed.parent / name).unlink()
    with pytest.raises(UserError, match=r"no vocab\.json and merges\.txt .*put them there"):
        load_clip(packed, "a man")
    (packed.parent / clip_score.MERGES_GZ).write_bytes(gzip.compress(b"#version\n"))
    assert load_clip(packed, "a man")[1].equal(expected)
    (packed.parent / clip_score.MERGES_GZ).write_bytes(gzip.compress(b"#version\nm a\nma n</w>\nx y\n"))
    with pytest.raises(UserError, match="last word is number 516, expected 513"):
        load_clip(packed, "a man")
    monkeypatch.setattr(clip_score, "MERGES", 2)  # lines after these do not count
    clip_score._unpack_words(packed.parent / clip_score.MERGES_GZ, packed.parent)
    words = json.loads((packed.parent / "vocab.json").read_text())
    assert list(words)[512:] == ["ma", "man</w>", "<|startoftext|>", "<|endoftext|>"]
    assert list(words)[:3] == ["!", '"', "#"] and words["!</w>"] == 256 and len(set(byte_letters())) == 256


def test_what_is_no_clip_is_refused_in_one_line(folder: Path, packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "vit.pth").write_bytes(b"nothing")
    torch.save({"conv1.weight": torch.zeros(2)}, other / "resnet.pth")
    for path, prompt, message in (
        (folder / "absent", "a man", "no CLIP weights at .*check the path"),
        (other, "a man", "holds no CLIP: expected model.safetensors"),
        (other / "vit.pth", "a man", "damaged or holds more than tensors"),
        (other / "resnet.pth", "a man", "resnet.pth: this is not CLIP: the picture tower needs"),
        (packed, " ", "the prompt is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_clip(path, prompt)
        assert "\n" not in str(caught.value)


def test_the_score_is_the_mean_over_views_and_heads() -> None:
    values = torch.tensor([[0.1, 0.5], [0.3, 0.7], [0.2, 0.6]])
    brightness = {0: "front", 1: "side"}

    def chunk(start: int, number: int) -> Any:
        """Pictures whose brightness is the head's value from the camera asked for."""
        return lambda camera: SimpleNamespace(image=values[start : start + number, camera][:, None, None, None])

    cameras: Any = [lambda start, number, view=view: view for view in brightness]
    seen = clip_score_report([chunk(0, 2), chunk(2, 1)], 3, 2, cameras, lambda x: (x[:, 0, 0, 0] + 1) / 2)
    assert seen["value"] == pytest.approx(0.4) and seen["per_view"] == pytest.approx([0.2, 0.6])
    assert seen["lowest_view"] == pytest.approx(0.2) and seen["count"] == 3
    assert seen["std"] == pytest.approx(float(values.mean(1).std(correction=0)))
    with pytest.raises(ValueError, match="at least one view"):
        clip_score_report([], 0, 1, [], lambda x: x)
    with pytest.raises(ValueError, match=r"gives \(2,\), got \(2, 1\)"):
        clip_score_report([chunk(0, 2)], 2, 2, cameras, lambda x: x[:, :, 0, 0])
