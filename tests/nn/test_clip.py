# SPDX-License-Identifier: Apache-2.0
"""Our CLIP against transformers', and both namings of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.nn.pretrained.clip import likely_activation, text_from_published, vision_from_published

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 24, "patch_size": 8, "projection_dim": 10}
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"vocab_size": 60, "max_position_embeddings": 9, "projection_dim": 10, "eos_token_id": 59, "bos_token_id": 58}


def clip_model(activation: str = "quick_gelu", **text: Any) -> Any:
    """transformers' CLIP with random weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'facelab[text]'")
    config = transformers.CLIPConfig(
        vision_config={**VISION, "hidden_act": activation},
        text_config={**TEXT, **text, "hidden_act": activation},
        projection_dim=10,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.CLIPModel(config)
        for value in model.parameters():
            torch.nn.init.normal_(value, 0.0, 0.2)
    return model.eval()


def as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under open_clip's names, written out from its documentation of the layout."""
    found = {
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for ours, theirs, layers in (("visual.transformer", "vision_model", 2), ("transformer", "text_model", 3)):
            for i in range(layers):
                a, b = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                found[f"{a}.ln_1.{kind}"] = state[f"{b}.layer_norm1.{kind}"]
                found[f"{a}.ln_2.{kind}"] = state[f"{b}.layer_norm2.{kind}"]
                found[f"{a}.attn.out_proj.{kind}"] = state[f"{b}.self_attn.out_proj.{kind}"]
                found[f"{a}.attn.in_proj_{kind}"] = torch.cat([state[f"{b}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
                found[f"{a}.mlp.c_fc.{kind}"] = state[f"{b}.mlp.fc1.{kind}"]
                found[f"{a}.mlp.c_proj.{kind}"] = state[f"{b}.mlp.fc2.{kind}"]
    return found


def features(answer: Any) -> Tensor:
    """What transformers returns for features: a tensor (4.x), or an object that holds it (5.x)."""
    return answer if isinstance(answer, Tensor) else answer.pooler_output


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("names", ["transformers", "open_clip"])
def test_both_towers_equal_those_of_transformers(activation: Any, names: str) -> None:
    model = clip_model(activation)
    state = dict(model.state_dict())
    tensors = as_open_clip(state) if names == "open_clip" else state
    pictures = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[58, 3, 7, 59, 59, 59], [58, 9, 11, 30, 2, 59]])
    with torch.no_grad():
        seen = vision_from_published(tensors, activation, heads=4)(pictures)
        read = text_from_published(tensors, activation, heads=2)(tokens)
        torch.testing.assert_close(
            seen, features(model.get_image_features(pixel_values=pictures)), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(read, features(model.get_text_features(input_ids=tokens)), rtol=1e-4, atol=1e-5)
        other = "gelu" if activation == "quick_gelu" else "quick_gelu"
        assert (vision_from_published(tensors, other, heads=4)(pictures) - seen).abs().max() > 1e-3


def test_the_activation_is_guessed_from_openais_marks() -> None:
    assert likely_activation({"visual.proj": torch.zeros(1)}) == "gelu"
    assert likely_activation({"input_resolution": torch.tensor(224)}) == "quick_gelu"


def test_other_tensors_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"not CLIP: the picture tower needs a tensor visual.conv1.weight"):
        vision_from_published({"conv1.weight": torch.zeros(3)})
    tensors = as_open_clip(dict(clip_model().state_dict()))
    tensors["visual.positional_embedding"] = tensors["visual.positional_embedding"][:-1]
    with pytest.raises(UserError, match=r"places must be .*; get the file again, from open_clip"):
        vision_from_published(tensors)
    del tensors["transformer.resblocks.1.ln_1.weight"]
    with pytest.raises(UserError, match=r"transformer\.resblocks\.1\.ln_1\.weight"):
        text_from_published(tensors)


def test_the_published_sizes_of_vit_b_32() -> None:
    """Shapes as OpenAI's ViT-B/32 has them; the text tower's ends are checked, its middle is small."""
    width, tensors = 768, {}
    shapes = {"conv1.weight": (width, 3, 32, 32), "class_embedding": (width,), "positional_embedding": (50, width)}
    shapes |= {"ln_pre.weight": (width,), "ln_pre.bias": (width,), "ln_post.weight": (width,), "ln_post.bias": (width,)}
    shapes |= {"proj": (width, 512)}
    block = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,)}
    block |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    block |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    block |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"transformer.resblocks.0.{name}": shape for name, shape in block.items()}
    tensors = {f"visual.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    vision = vision_from_published(tensors)
    assert vision.side == 224 and vision.blocks[0].heads == 12
    with pytest.raises(ValueError, match=r"CLIP sees \(N, 3, 224, 224\)"):
        vision(torch.zeros(1, 3, 112, 112))


def test_pickles_are_not_needed(tmp_path: Path) -> None:
    """A folder that transformers wrote is read as tensors; see tests/metrics/test_clip_score.py."""
    from safetensors.torch import load_file

    model = clip_model()
    model.save_pretrained(tmp_path)
    pictures = torch.zeros(1, 3, 24, 24)
    with torch.no_grad():
        stored = vision_from_published(load_file(tmp_path / "model.safetensors"), "quick_gelu", heads=4)(pictures)
        expected = vision_from_published(dict(model.state_dict()), "quick_gelu", heads=4)(pictures)
    torch.testing.assert_close(stored, expected, rtol=0, atol=0)
