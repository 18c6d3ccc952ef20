# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of StyleSDF's and CNeRF's checkpoints <-> ours: the decoder, and what all of them have in common.

    decoder.style.1.weight                  <-> decoder.mapping.0.weight        (index 0 is the normalisation)
    decoder.conv1.conv.weight (1,O,I,k,k)   <-> decoder.blocks.0.conv1.weight (O,I,k,k)
    decoder.convs.2.conv.modulation.bias    <-> decoder.blocks.2.conv0.affine.bias
    decoder.to_segs.0.bias (1,K,1,1)        <-> decoder.blocks.1.to_semantics.bias (K,)
    decoder.noises.noise_3 (1,1,r,r)        <-> decoder.blocks.2.conv0.noise_const (r,r)

The 4x4 ``kernel`` buffers are constants and each StyledConv holds a ``bias`` that it does not use: they are left out on
the way in and made again on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from facelab.checkpoints.key_map import KeyMap, check_keys
from facelab.errors import UserError

Rules = list[tuple[str, str]]

KERNELS = ("{path:*}.kernel",)
_HEADS = (("to_rgb", "to_rgb"), ("to_seg", "to_semantics"))
_STYLED = re.compile(r"(?P<layer>(?:.*\.)?(?:conv1|convs\.\d+))\.conv\.weight")
_UPSAMPLED = re.compile(r"(?P<layer>(?:.*\.)?convs\.\d*[02468])\.conv\.weight")
_LATER_HEAD = re.compile(r"(?P<layer>(?:.*\.)?to_(?:rgb|seg)s\.\d+)\.conv\.weight")
_HEAD_BIAS = re.compile(r"(?:.*\.)?to_(?:rgb1|seg1|rgbs\.\d+|segs\.\d+)\.bias")


def decoder_rules(original: str = "decoder.", ours: str = "decoder.") -> Rules:
    """Rules of a decoder that stands under these prefixes."""
    places = (
        ("conv1", "noise_0", "0.conv1"),
        ("convs.{i:2n}", "noise_{i:2n+1}", "{i:n+1}.conv0"),
        ("convs.{i:2n+1}", "noise_{i:2n+2}", "{i:n+1}.conv1"),
    )
    rules: Rules = [(f"{original}style.{{i:n+1}}.{{p}}", f"{ours}mapping.{{i:n}}.{{p}}")]
    for theirs, noise, place in places:
        here = f"{ours}blocks.{place}"
        rules += [
            *_modulated(f"{original}{theirs}", here),
            (f"{original}{theirs}.noise.weight", f"{here}.noise_strength"),
            (f"{original}{theirs}.activate.bias", f"{here}.bias"),
            (f"{original}noises.{noise}", f"{here}.noise_const"),
        ]
    for theirs, name in _HEADS:
        for head, place in ((f"{theirs}1", "0"), (f"{theirs}s.{{i:n}}", "{i:n+1}")):
            here = f"{ours}blocks.{place}.{name}"
            rules += [*_modulated(f"{original}{head}", here), (f"{original}{head}.bias", f"{here}.bias")]
    return rules


def decoder_dropped(original: str = "decoder.") -> tuple[str, ...]:
    """Patterns of the keys under this prefix that have no counterpart."""
    return (*KERNELS, f"{original}conv1.bias", f"{original}convs.{{i:n}}.bias")


def from_original(
    state: Mapping[str, Tensor], keys: KeyMap, expected: Mapping[str, object], what: str = "the file"
) -> dict[str, Tensor]:
    """Original state dict -> ours, strictly: names, shapes, and the filters that the file was made with.

    Args:
        expected: our names with tensors or sizes, all that must come out.

    Raises:
        UserError: unknown, missing or doubled keys (named, with the nearest ones), another shape or another filter.
    """
    check_kernels(state, what)
    renamed = keys.from_original({key: _without_ones(key, value) for key, value in state.items()}, what=what)
    check_keys(renamed, expected, what)
    return dict(renamed)


def to_original(state: Mapping[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """Our state dict -> the original's names and shapes, with the constants and unused biases of a decoder."""
    renamed = keys.back_to_original(state)
    restored = {key: _with_ones(key, value) for key, value in renamed.items()}
    return {**restored, **decoder_constants(restored)}


def decoder_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the original's decoder holds beside these original keys and shapes: filters and unused biases."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if value.ndim != 5:
            continue
        for pattern, name in ((_UPSAMPLED, "conv.blur.kernel"), (_LATER_HEAD, "upsample.kernel")):
            match = pattern.fullmatch(key)
            if match:
                found[f"{match['layer']}.{name}"] = filter_kernel(4)
        match = _STYLED.fullmatch(key)
        if match:
            found[f"{match['layer']}.bias"] = torch.zeros(1, value.shape[1], 1, 1)
    return found


def filter_kernel(gain: float = 1.0) -> Tensor:
    """(4, 4) binomial [1, 3, 3, 1] with itself, divided by its sum, times ``gain``."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) * (gain / 64)


def check_kernels(state: Mapping[str, Tensor], what: str) -> None:
    """UserError unless every stored filter is the binomial one, with the gain of upsampling or without."""
    for key, value in state.items():
        if not key.endswith(".kernel"):
            continue
        if value.shape != (4, 4) or not any(
            torch.allclose(value.float(), filter_kernel(gain), atol=1e-6) for gain in (1.0, 4.0)
        ):
            raise UserError(
                f"{what}: '{key}' should be the filter [1, 3, 3, 1] with itself, got another one; "
                "models with other filters are not supported"
            )


def count_of(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow ``prefix`` in these names."""
    found = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    return len({part for part in found if part.isdigit()})


def _modulated(theirs: str, ours: str) -> Rules:
    return [
        (f"{theirs}.conv.weight", f"{ours}.weight"),
        (f"{theirs}.conv.modulation.{{p}}", f"{ours}.affine.{{p}}"),
    ]


def _without_ones(key: str, value: Tensor) -> Tensor:
    """The tensor in our shape; one of an unexpected shape stays as it is and is refused later."""
    shape = tuple(value.shape)
    if key.endswith(".conv.weight") and len(shape) == 5 and shape[0] == 1:
        return value[0]
    if key.endswith(".noise.weight") and shape == (1,):
        return value.reshape(())
    if _HEAD_BIAS.fullmatch(key) and len(shape) == 4 and (shape[0], *shape[2:]) == (1, 1, 1):
        return value.reshape(-1)
    if ".noises.noise_" in f".{key}" and len(shape) == 4 and shape[:2] == (1, 1):
        return value[0, 0]
    return value


def _with_ones(key: str, value: Tensor) -> Tensor:
    """The tensor in the original's shape."""
    if key.endswith(".conv.weight") and value.ndim == 4:
        return value[None]
    if key.endswith(".noise.weight") and value.ndim == 0:
        return value.reshape(1)
    if _HEAD_BIAS.fullmatch(key):
        return value.reshape(1, -1, 1, 1)
    if ".noises.noise_" in f".{key}":
        return value[None, None]
    return value
