# SPDX-License-Identifier: Apache-2.0
"""What the original program wrote: tuned generators as pickles, and ``.pth`` files of ``{"G_ema": weights}``.

(Its latents, ``.npy`` of (1, L, W) or (1, 1, W), are read by :mod:`facelab.inference.latent_files`.) Both become EG3D
models; nothing in the files is run.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from facelab.bases.eg3d import convert as eg3d
from facelab.bases.eg3d.config import PRESETS, RenderConfig
from facelab.checkpoints.legacy_networks import Network, NetworkPickle, is_network_tree, networks_of
from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.errors import UserError, nearest
from facelab.nn.stylegan2 import KINDS

AVERAGE = "G_ema"
CLASSES = {  # super-resolution -> the original's class
    "8xdc": "SuperresolutionHybrid8XDC",
    "8x": "SuperresolutionHybrid8X",
    "4x": "SuperresolutionHybrid4X",
    "2x": "SuperresolutionHybrid2X",
}
RENDERING_SIDE = {"ffhq": 128, "afhq": 128, "shapenet": 64}  # pixels, of the released models
COUNTS = ("depth_resolution", "depth_resolution_importance")


def is_weights_file(tree: object) -> bool:
    """Whether a file that was read holds ``{"G_ema": {name: tensor}}`` of an EG3D generator."""
    state = tree.get(AVERAGE) if isinstance(tree, Mapping) else None
    return isinstance(state, Mapping) and any(str(key).startswith("backbone.synthesis.") for key in state)


def read_original(path: str | Path, tree: object = None, domain: str = "ffhq") -> eg3d.Original:
    """Read and convert a generator that the original wrote (or the official one that it started from).

    Args:
        tree: what the file holds, where it has been read already.
        domain: ``ffhq``, ``afhq`` or ``shapenet``: cameras and rendering of a ``.pth`` file, which holds none.

    Raises:
        UserError: refused, damaged, another network, an unknown domain; one line.
    """
    path = Path(path)
    tree = read_pickle_checkpoint(path) if tree is None else tree
    if is_weights_file(tree):
        return _from_weights(path, tree[AVERAGE], domain)  # type: ignore[index]
    if not is_network_tree(tree):
        keys = ", ".join(str(key)[:40] for key in list(tree)[:4]) if isinstance(tree, Mapping) else ""
        got = f"a dictionary of {keys or 'nothing'}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise UserError(
            f"{path}: expected an EG3D pickle or a .pth file of {{'G_ema': weights}}, got {got}; check the path"
        )
    return _from_pickle(path, tree)


# ---------------------------------------------------------------- tuned pickles


def _from_pickle(path: Path, tree: object) -> eg3d.Original:
    """A pickle as EG3D's. The original doubles the samples per ray of the generator that it tunes and writes them with it,
    so that its next program doubles them again; the untouched generator beside it tells."""
    found = networks_of(path, tree)
    original = eg3d.convert_networks(found)
    if not {"G", AVERAGE} <= set(found.networks):
        return original
    plain, tuned = (_counts(found.networks[name]) for name in ("G", AVERAGE))
    render = original.config.render
    if plain is None or tuned is None or plain == tuned or tuned[0] * plain[1] != tuned[1] * plain[0]:
        return original
    if tuned[0] < plain[0] or (render.samples, render.importance) != tuned:
        return original
    note = (
        f"{path.name} was written with {tuned[0]} + {tuned[1]} samples per ray where its model has {plain[0]} + {plain[1]}: "
        "the original multiplies them at every load; the model's are kept (the factor belongs to a rendering)"
    )
    config = dataclasses.replace(
        original.config, render=dataclasses.replace(render, samples=plain[0], importance=plain[1])
    )
    return dataclasses.replace(original, config=config, notes=(*original.notes, note))


def _counts(network: Network) -> tuple[int, int] | None:
    """Coarse and fine samples per ray, None where they are no such numbers."""
    options = eg3d.rendering_options(network)
    values = [options.get(name) for name in COUNTS]
    return (values[0], values[1]) if all(type(v) is int and v > 0 for v in values) else None  # type: ignore[return-value]


# ---------------------------------------------------------------- weights alone


def _from_weights(path: Path, state: Mapping[Any, Any], domain: str) -> eg3d.Original:
    """Sizes by the shapes; what shapes do not say is that of the released models of the domain."""
    if domain not in PRESETS:
        raise UserError(f"unknown domain {domain!r}, expected one of {', '.join(PRESETS)}.{nearest(domain, PRESETS)}")
    foreign = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if foreign:
        raise UserError(f"{path}: expected tensors by name in '{AVERAGE}', got {str(foreign[0])!r:.60}; check the file")
    tensors = OrderedDict((str(key), value) for key, value in state.items())
    kind = _superresolution(tensors)
    kwargs = constructor_arguments(path, tensors, domain, CLASSES[kind], KINDS[kind].output_resolution)
    options = {"neural_rendering_resolution": RENDERING_SIDE[domain], "rendering_kwargs": kwargs["rendering_kwargs"]}
    network = Network("TriPlaneGenerator", tensors, init_kwargs=kwargs, attributes=options)
    original = eg3d.convert_networks(NetworkPickle(path, {AVERAGE: network}))
    note = (
        f"{path.name} holds weights alone: cameras and rendering are those of the released {domain} models, "
        f"{RENDERING_SIDE[domain]} px"
    )
    return dataclasses.replace(original, notes=(*original.notes, note))


def _superresolution(state: Mapping[str, Tensor]) -> str:
    """The kind whose sizes the tensors have; the released 512 px models' where none fits."""

    def fits(name: str) -> bool:
        kind = KINDS[name]
        for block, channels in enumerate(kind.channels):
            weight = state.get(f"superresolution.block{block}.conv0.weight")
            noise = state.get(f"superresolution.block{block}.conv1.noise_const")
            side = kind.output_resolution // (2 - block)
            if weight is None or noise is None or (*weight.shape[:1], *noise.shape[:1]) != (channels, side):
                return False
        return True

    return next(filter(fits, CLASSES), next(iter(CLASSES)))


def constructor_arguments(
    path: Path, state: Mapping[str, Tensor], domain: str, superresolution: str, side: int
) -> dict[str, object]:
    """Arguments of the original's generator that fit the shapes of its tensors.

    Raises:
        UserError: tensors that every such generator has are missing or of another kind.
    """
    preset = PRESETS[domain]
    render = RenderConfig(**preset["render"])
    view = preset["view"]
    width = _shape(path, state, "backbone.mapping.w_avg", 1)[0]
    c_dim = (
        _shape(path, state, "backbone.mapping.embed.weight", 2)[1] if "backbone.mapping.embed.weight" in state else 0
    )
    blocks = [int(m[1]) for key in state if (m := re.fullmatch(r"backbone\.synthesis\.b(\d{1,5})\.conv1\.weight", key))]
    layers = sum(re.fullmatch(r"backbone\.mapping\.fc\d+\.weight", key) is not None for key in state)
    if not blocks:
        raise UserError(f"{path}: '{AVERAGE}' has no backbone.synthesis.b4.conv1.weight; it is no EG3D generator")
    largest = max(blocks)
    low, high = (_shape(path, state, f"backbone.synthesis.b{r}.conv1.weight", 4)[0] for r in (min(blocks), largest))
    options: dict[str, object] = {
        "superresolution_module": f"training.superresolution.{superresolution}",
        "superresolution_noise_mode": "none",
        "sr_antialias": True,
        "c_gen_conditioning_zero": False,
        "c_scale": 1.0,
        "depth_resolution": render.samples,
        "depth_resolution_importance": render.importance,
        "ray_start": render.near,
        "ray_end": render.far,
        "box_warp": preset["model"].get("box_side", 1.0),
        "white_back": render.background == "white",
        "avg_camera_radius": view.get("radius", 2.7),
        "avg_camera_pivot": list(view.get("pivot", (0.0, 0.0, 0.2))),
        "decoder_lr_mul": 1.0,
        "density_reg": 0.25,
        "density_reg_p_dist": 0.004,
        "reg_type": "l1",
    }
    return {
        "z_dim": _shape(path, state, "backbone.mapping.fc0.weight", 2)[1] - (width if c_dim else 0),
        "c_dim": c_dim,
        "w_dim": width,
        "img_resolution": side,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": layers},
        "channel_base": high * largest,
        "channel_max": max(low, high),
        "num_fp16_res": 0,
        "sr_num_fp16_res": 4,
        "conv_clamp": None,
        "fused_modconv_default": "inference_only",
        "rendering_kwargs": options,
    }


def _shape(path: Path, state: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    value = state.get(key)
    if value is None or value.ndim != dims:
        got = "none" if value is None else str(tuple(value.shape))
        raise UserError(f"{path}: expected '{key}' with {dims} dimensions in '{AVERAGE}', got {got}; check the file")
    return tuple(value.shape)
