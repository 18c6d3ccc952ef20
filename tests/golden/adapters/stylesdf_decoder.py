# SPDX-License-Identifier: Apache-2.0
"""StyleSDF: the decoder by itself, with its fixed noise maps, style mixing and truncation."""

from __future__ import annotations

import torch

from facelab.bases.stylesdf.keys import decoder_dropped, decoder_rules, from_original, to_original
from facelab.checkpoints.key_map import KeyMap
from facelab.nn.skip_decoder import SkipDecoder, SkipDecoderConfig

from ..harness import Arrays, Meta, case_weights

PREFIX = "decoder."  # the rules of the weights look at the names in the whole generator


@torch.no_grad()
def decoder(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    model = SkipDecoder(
        SkipDecoderConfig(
            size=case["size"],
            in_resolution=case["in_resolution"],
            in_channels=case["in_channels"],
            style_dim=case["style_dim"],
            channel_multiplier=case["channel_multiplier"],
            lr_mapping=case["lr_mapping"],
        )
    ).eval()
    keys = KeyMap(decoder_rules(PREFIX, ""), decoder_dropped(PREFIX))
    original = to_original(model.state_dict(), keys)
    shapes = {key: tuple(value.shape) for key, value in original.items()}
    weights = {**original, **case_weights(meta, shapes)}
    model.load_state_dict(from_original(weights, keys, model.state_dict()))
    step, psi = case["stored_step"], case["truncation_ratio"]
    style, mean = model.style(arrays["in_w"]), model.style(arrays["in_mean_w"]).mean(0, keepdim=True)
    plain = model(arrays["in_features"], model.broadcast(style))
    first, second = (torch.lerp(mean, x, psi) for x in (style, model.style(arrays["in_w2"])))
    mixed = model.broadcast(first, second, case["inject_index"])
    drawn = model(arrays["in_features"], mixed)
    return {
        "out_img": plain.rgb[:, :, ::step, ::step],
        "out_latent": style,
        "out_mix_img": drawn.rgb[:, :, ::step, ::step],
        "out_mix_latent": mixed,
        "out_mean_latent": mean,
    }


ADAPTERS = {"stylesdf/decoder": decoder}
