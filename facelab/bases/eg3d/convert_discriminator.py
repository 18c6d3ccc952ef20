# SPDX-License-Identifier: Apache-2.0
"""Parameter names of EG3D's discriminators: original <-> ours. Filters are constants and are not kept.

b512.fromrgb.weight  <-> blocks.512.fromrgb.weight
b4.conv.weight       <-> epilogue.conv.weight
mapping.fc0.weight   <-> mapping.layers.0.weight
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from facelab.bases.eg3d.keys import key_map, mapping_rules
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig

KEYS = key_map(
    [
        *mapping_rules("mapping.", "mapping."),
        ("b4.{p:*}", "epilogue.{p:*}"),
        ("b{i:n}.{p:*}", "blocks.{i:n}.{p:*}"),
    ]
)


def discriminator_from_original(
    original: Mapping[str, Tensor], expected: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """Original names -> ours, strictly. UserError names a key that is unknown or, with ``expected``, missing."""
    return dict(KEYS.from_original(original, expected, "the discriminator"))


def discriminator_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> the original's, without its constant filters."""
    return dict(KEYS.back_to_original(state))


def discriminator_shapes(config: StyleGan2DiscriminatorConfig) -> dict[str, tuple[int, ...]]:
    """Original name -> shape of every weight of an architecture."""
    state = StyleGan2Discriminator(config).state_dict()
    return {key: tuple(value.shape) for key, value in discriminator_to_original(state).items()}


def config_from_original(
    kwargs: Mapping[str, object], class_path: str = "DualDiscriminator"
) -> StyleGan2DiscriminatorConfig:
    """The architecture of an official discriminator from its constructor's arguments.

    The groups of the minibatch statistic stay contiguous, our default; a released network was trained with strided
    ones, which changes which samples of a batch it compares and nothing else.
    """
    epilogue = kwargs.get("epilogue_kwargs") or {}
    block = kwargs.get("block_kwargs") or {}
    mapping = kwargs.get("mapping_kwargs") or {}
    assert isinstance(epilogue, Mapping) and isinstance(block, Mapping) and isinstance(mapping, Mapping)
    get = {"conv_clamp": None, "num_fp16_res": 0, "architecture": "resnet", **kwargs}.__getitem__
    return StyleGan2DiscriminatorConfig(
        resolution=int(get("img_resolution")),  # type: ignore[call-overload]
        dual=class_path.rpartition(".")[2] != "SingleDiscriminator",
        label_dim=int(get("c_dim")),  # type: ignore[call-overload]
        channel_base=int(kwargs.get("channel_base", 32768)),  # type: ignore[call-overload]
        channel_max=int(kwargs.get("channel_max", 512)),  # type: ignore[call-overload]
        architecture=get("architecture"),  # type: ignore[arg-type]
        clamp=get("conv_clamp"),  # type: ignore[arg-type]
        half_blocks=int(get("num_fp16_res")),  # type: ignore[call-overload]
        group_size=epilogue.get("mbstd_group_size", 4),
        group_channels=epilogue.get("mbstd_num_channels", 1),
        mapping_layers=int(mapping.get("num_layers", 8)),
        freeze_layers=int(block.get("freeze_layers", 0)),
    )
