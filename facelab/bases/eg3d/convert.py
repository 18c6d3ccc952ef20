# SPDX-License-Identifier: Apache-2.0
"""Official EG3D pickles -> our weights and a whole configuration.

The configuration comes from the constructor's arguments and the rendering options that the file stores with each
network; every size in it is checked against the shapes of the tensors before anything is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from facelab.bases.eg3d.config import (
    PRESETS,
    Eg3dConfig,
    ModelConfig,
    RenderConfig,
    ViewConfig,
    generator_config,
)
from facelab.bases.eg3d.convert_discriminator import (
    config_from_original,
    discriminator_from_original,
    discriminator_shapes,
)
from facelab.bases.eg3d.convert_shapes import check_discriminator_sizes, check_generator_sizes, style_width
from facelab.bases.eg3d.model import TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.bases.eg3d.originals import (
    LABEL_STD,
    generator_config_from_original,
    generator_from_original,
    label_std,
    settings_from_original,
)
from facelab.bases.eg3d.training_config import ConditioningConfig, DiscriminatorConfig, LossConfig, ResolutionConfig
from facelab.checkpoints.legacy_networks import Network, NetworkPickle, networks_of, read_network_pickle
from facelab.checkpoints.legacy_storages import printable
from facelab.config import from_dict, to_dict
from facelab.errors import UserError
from facelab.nn.discriminators.stylegan2 import StyleGan2DiscriminatorConfig

Result = TypeVar("Result")
EMBEDDING = "backbone.mapping.embed.weight"
UNUSED = "superresolution"  # group of a super-resolution that does not fit its generator
MAX_MESSAGE = 1200  # characters
MAX_RENDERING = 1024  # side of a rendering, pixels
DENSITY_TYPES = ("l1", "monotonic-detach", "monotonic-fixed")
GENERATORS = {"G": "generator", "G_ema": "ema"}  # in the file -> group of our weights


@dataclass(frozen=True)
class Original:
    """A converted file.

    Attributes:
        config: of a run with this model.
        weights: ``generator``, ``ema``, ``discriminator``, those that the file has; our key names.
        meta: method, step, origin, and what else the file says of itself.
        notes: lines for the user: what was found.
    """

    config: Eg3dConfig
    weights: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = "eg3d"

    @property
    def model(self) -> dict[str, Any]:
        """The ``model`` section of the configuration."""
        return dict(to_dict(self.config)["model"])


@dataclass
class _Findings:
    """What is collected on the way."""

    notes: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def read_original(path: str | Path, tree: object = None) -> Original:
    """Read and convert an official pickle (or one of the same layout). Nothing of it is run.

    Args:
        tree: what the file holds, where it has been read already (see ``legacy_pickle``).

    Raises:
        UserError: refused, damaged, not an EG3D generator, or options that do not fit its tensors; one line.
    """
    return convert_networks(read_network_pickle(path) if tree is None else networks_of(Path(path), tree))


def convert_networks(found: NetworkPickle) -> Original:
    """The networks of a file -> ours. Errors as in :func:`read_original`."""
    try:
        original = _convert(found)
    except UserError as error:  # it may quote what the file says
        raise UserError(_shortened(printable(str(error)))) from None
    return dataclasses.replace(original, notes=tuple(_shortened(printable(note)) for note in original.notes))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


def _convert(found: NetworkPickle) -> Original:
    path = found.path
    names = [name for name in GENERATORS if name in found.networks]
    if not names:
        raise UserError(f"{path}: expected the generators G or G_ema, got {', '.join(found.networks)}; check the file")
    main = found.networks[names[-1]]
    findings = _Findings(found.lines())
    kwargs, options = main.init_kwargs, rendering_options(main)
    architecture, config = _configuration(path, main, kwargs, options, findings)
    for name in names:
        _add_generator(path, name, found.networks[name], architecture, findings)
    config = _add_discriminator(found, config, findings)
    findings.notes.insert(len(found.lines()), describe(path, config))
    std = label_std(main.state)
    augmentation = found.networks.get("augment_pipe")
    p = None if augmentation is None else augmentation.state.get("p")
    meta = {
        "method": "eg3d",
        "step": 0,
        "images": 0,
        "origin": {
            "file": path.name,
            "class": main.class_name,
            "init_kwargs": kwargs,
            "rendering_kwargs": options,
            "training_set_kwargs": found.training_set,
            "augment_p": float(p) if p is not None and p.numel() == 1 else None,
        },
        "label_std": None if std is None else std.tolist(),
    }
    return Original(config, findings.weights, meta, tuple(findings.notes))


def rendering_options(network: Network) -> dict[str, Any]:
    """The rendering options in force: the instance's, which may differ from those it was built with."""
    for options in (network.attributes.get("rendering_kwargs"), network.init_kwargs.get("rendering_kwargs")):
        if isinstance(options, dict):
            return options
    return {}


def describe(path: Path, config: Eg3dConfig) -> str:
    """One line: the model that the file holds."""
    m, r, v = config.model, config.render, config.view
    kind = m.superresolution_kind
    limits = "from the box's near to its far side" if r.box_limits else f"from {r.near:g} to {r.far:g}"
    picture = f"super-resolution {kind} to {m.resolution} px" if kind else "no super-resolution"
    return (
        f"{path.name}: EG3D: codes z {m.latent_dim}, w {m.style_dim}, mapping of {m.mapping_layers} layers, planes "
        f"3 x {m.plane_channels} x {m.plane_resolution} px over a box of {m.box_side:g}, rendering {r.resolution} px with "
        f"{r.samples} + {r.importance} samples {limits}, {picture}, pose conditioning "
        f"{'on' if config.conditioning.pose else 'off'}, cameras at {v.radius:g} around {list(v.pivot)}"
    )


def _configuration(
    path: Path, network: Network, kwargs: Mapping[str, Any], options: Mapping[str, Any], findings: _Findings
) -> tuple[TriPlaneGeneratorConfig, Eg3dConfig]:
    """Architecture and configuration, sizes checked against the tensors."""
    where = f"{path}: {network.class_name}"
    architecture = _tried(where, lambda: generator_config_from_original(kwargs, options))
    with_picture = style_width(network.state) in (None, architecture.w_dim)
    check_generator_sizes(where, network.state, architecture, kwargs, with_picture)
    rendering = network.attributes.get("neural_rendering_resolution", 64)
    if type(rendering) is not int or not 1 <= rendering <= MAX_RENDERING:
        raise UserError(f"{where}: neural_rendering_resolution should be 1 to {MAX_RENDERING}, got {rendering!r:.40}")
    planes = max(int(key.split(".")[2][1:]) for key in network.state if key.startswith("backbone.synthesis.b"))
    architecture = dataclasses.replace(architecture, plane_resolution=planes)
    if not with_picture:
        findings.notes.append(
            f"the super-resolution takes style codes of width {style_width(network.state)}, the mapping network makes "
            f"{architecture.w_dim}: in the original, too, this generator makes no enlarged picture; it is converted "
            f"without, its tensors are kept as '{UNUSED}'"
        )
        architecture = dataclasses.replace(architecture, superresolution=None, legacy_raw=False)
    if architecture.label_scale == 0 and architecture.pose_conditioning:
        findings.notes.append("c_scale is 0 (or not in the file): the mapping network sees no pose")
        architecture = dataclasses.replace(architecture, pose_conditioning=False)
    model = _model(where, architecture, rendering)
    config = Eg3dConfig(
        model=model,
        view=_tried(where, lambda: _view(architecture, findings)),
        render=_tried(where, lambda: _render(options, rendering)),
        neural=ResolutionConfig(initial=rendering),
        conditioning=_tried(where, lambda: _conditioning(architecture, options)),
        loss=_tried(where, lambda: _loss(options, findings)),
    )
    config = dataclasses.replace(
        config, reference=dataclasses.replace(config.reference, legacy_raw=architecture.legacy_raw)
    )
    config = _checked(where, config)
    ours = generator_config(
        config.model, config.view, pose_conditioning=config.conditioning.pose, legacy_raw=config.reference.legacy_raw
    )
    _check_expressed(where, architecture, ours)
    return ours, config


def _checked(where: str, config: Eg3dConfig) -> Eg3dConfig:
    """The configuration as it will be read back, every value of its declared type. UserError where one is not."""
    read = _tried(where, lambda: from_dict(Eg3dConfig, to_dict(config), where="its configuration").at(0))
    _tried(where, lambda: read.render.settings(read.model.box_side))
    return read


def _model(where: str, a: TriPlaneGeneratorConfig, rendering: int) -> ModelConfig:
    return _tried(
        where,
        lambda: ModelConfig(
            resolution=a.image_resolution(rendering),
            superresolution=a.superresolution or "none",
            superresolution_half=a.superresolution_half,
            superresolution_antialias=a.superresolution_antialias,
            superresolution_noise=a.superresolution_noise,
            latent_dim=a.z_dim,
            style_dim=a.w_dim,
            mapping_layers=a.mapping_layers,
            plane_resolution=a.plane_resolution,
            plane_channels=a.field.channels,
            axes=a.field.axes,
            aggregation=a.field.aggregation,
            box_side=a.field.box_side,
            decoder_hidden=a.field.hidden,
            features=a.field.features,
            decoder_lr_mul=a.field.decoder_lr_mul,
            channel_base=a.channel_base,
            channel_max=a.channel_max,
            half_blocks=a.half_blocks,
            clamp=a.clamp,
        ),
    )


def _view(architecture: TriPlaneGeneratorConfig, findings: _Findings) -> ViewConfig:
    """Cameras; the files do not hold the focal length, so it is that of the data set whose cameras stand as far away."""
    radius, pivot = architecture.camera.radius, tuple(float(x) for x in architecture.camera.pivot)
    if len(pivot) != 3 or not radius > 0 or not all(map(math.isfinite, (radius, *pivot))):
        raise ValueError(f"cameras at {radius} around {list(pivot)[:5]}")
    presets = {name: ViewConfig(**values["view"]) for name, values in PRESETS.items()}
    same = [name for name, view in presets.items() if view.radius == radius]
    exact = [name for name in same if presets[name].pivot == pivot]
    chosen = (exact or same or list(presets))[0]
    focal = presets[chosen].focal
    findings.notes.append(f"the focal length is not in the file: {focal:g}, that of {chosen}")
    return ViewConfig(radius, pivot, focal)  # type: ignore[arg-type]


def _render(options: Mapping[str, Any], rendering: int) -> RenderConfig:
    s = settings_from_original(options, rendering)
    limited = s.box_side is not None
    default = RenderConfig()
    if min(s.samples_coarse, s.samples_fine) < 0 or s.samples_coarse < 2 or not 0 < s.near < s.far:
        raise ValueError(f"{s.samples_coarse} + {s.samples_fine} samples from {s.near} to {s.far}")
    return RenderConfig(
        resolution=rendering,
        near=default.near if limited else s.near,
        far=default.far if limited else s.far,
        box_limits=limited,
        samples=s.samples_coarse,
        importance=s.samples_fine,
        spacing=s.spacing,
        background=s.background,  # type: ignore[arg-type]
        density_noise=float(s.sigma_noise),
    )


def _conditioning(architecture: TriPlaneGeneratorConfig, options: Mapping[str, Any]) -> ConditioningConfig:
    swap = options.get("gpc_reg_prob", ConditioningConfig().swap)
    return ConditioningConfig(pose=architecture.pose_conditioning, swap=None if swap is None else float(swap))


def _loss(options: Mapping[str, Any], findings: _Findings) -> LossConfig:
    default = LossConfig()
    kind = options.get("reg_type", default.density_type)
    weight = float(options.get("density_reg", default.density_weight))
    if kind not in DENSITY_TYPES:
        findings.notes.append(f"reg_type {str(kind)[:40]!r} has no effect in the original: no density regulariser")
        kind, weight = default.density_type, 0.0
    distance = float(options.get("density_reg_p_dist", default.density_distance))
    return LossConfig(density_weight=weight, density_distance=distance, density_type=kind)


def _check_expressed(where: str, wanted: TriPlaneGeneratorConfig, ours: TriPlaneGeneratorConfig) -> None:
    """The configuration must build what the file says. How modulation is computed changes nothing but rounding."""
    ignored = {"fused_modulation", "camera", "label_scale"}  # a scale goes into the weights
    for entry in dataclasses.fields(TriPlaneGeneratorConfig):
        a, b = getattr(wanted, entry.name), getattr(ours, entry.name)
        if a != b and entry.name not in ignored:
            raise UserError(
                f"{where}: {entry.name} is {a!r}, only {b!r} is supported; such a model cannot be converted"
            )


def _add_generator(
    path: Path, name: str, network: Network, architecture: TriPlaneGeneratorConfig, findings: _Findings
) -> None:
    where = f"{path}: {name}"
    options = rendering_options(network)
    own = _tried(where, lambda: generator_config_from_original(network.init_kwargs, options))
    with_picture = architecture.superresolution is not None
    check_generator_sizes(where, network.state, own, network.init_kwargs, with_picture)
    state = dict(network.state)
    if not with_picture:
        unused = {key: tensor for key, tensor in state.items() if key.startswith("superresolution.")}
        state = {key: tensor for key, tensor in state.items() if key not in unused}
        findings.weights[f"{UNUSED}_{GENERATORS[name]}"] = _whole(unused)
    if own.label_scale not in (0.0, 1.0) and EMBEDDING in state:
        findings.notes.append(f"{name}: c_scale {own.label_scale:g} went into the weights of the pose's embedding")
        state[EMBEDDING] = state[EMBEDDING] * own.label_scale
    generator = _tried(where, lambda: TriPlaneGenerator(architecture))
    try:
        converted = generator_from_original(state, generator)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    findings.weights[GENERATORS[name]] = _whole(converted)
    left_out = [key for key in network.state if key == LABEL_STD]
    if left_out:
        findings.notes.append(f"{name}: {LABEL_STD} goes into the description of the model, not into its weights")


def _add_discriminator(found: NetworkPickle, config: Eg3dConfig, findings: _Findings) -> Eg3dConfig:
    """Convert ``D`` where our configuration can express it; a generator is useful without."""
    network = found.networks.get("D")
    if network is None:
        return config
    try:
        architecture = _tried("D", lambda: config_from_original(network.init_kwargs, network.class_name))
        check_discriminator_sizes("D", network.state, architecture)
        section = _tried("D", lambda: _discriminator(architecture, network.init_kwargs))
        shapes = _tried("D", lambda: discriminator_shapes_ours(architecture))
        weights = discriminator_from_original(network.state, shapes)
        config = _checked("D", dataclasses.replace(config, discriminator=section))
    except UserError as error:
        findings.notes.append(f"the discriminator is left out: {error}")
        return config
    findings.weights["discriminator"] = _whole(weights)
    return config


def discriminator_shapes_ours(architecture: StyleGan2DiscriminatorConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every weight of a discriminator."""
    originals = {key: torch.empty(shape, device="meta") for key, shape in discriminator_shapes(architecture).items()}
    return {key: tuple(tensor.shape) for key, tensor in discriminator_from_original(originals).items()}


def _discriminator(a: StyleGan2DiscriminatorConfig, kwargs: Mapping[str, Any]) -> DiscriminatorConfig:
    fixed = {"architecture": "resnet", "group_channels": 1, "mapping_layers": 8}
    for name, value in fixed.items():
        if getattr(a, name) != value:
            raise UserError(f"its {name} is {getattr(a, name)}, only {value} is supported")
    if a.group_size is None:
        raise UserError("its minibatch statistic spans the whole batch, only groups of a fixed size are supported")
    return DiscriminatorConfig(
        dual=a.dual,
        conditioned=a.label_dim > 0,
        channel_base=a.channel_base,
        channel_max=a.channel_max,
        half_blocks=a.half_blocks,
        clamp=a.clamp,
        group_size=a.group_size,
        freeze_layers=a.freeze_layers,
        label_noise=float(kwargs.get("disc_c_noise", 0.0)),
    )


def _tried(where: str, make: Callable[[], Result]) -> Result:
    """What ``make`` returns; whatever unusual arguments provoke becomes a UserError."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AssertionError, OverflowError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{where} has missing or unusual arguments ({reason}); check the file") from error


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with storage of their own: those of a file may be views of each other or expanded."""
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
