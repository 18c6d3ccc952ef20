# SPDX-License-Identifier: Apache-2.0
"""What FaceDNeRF needs of an EG3D model: a generator, where its cameras stand, how it is rendered."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from facelab.bases.eg3d.config import RenderConfig, ViewConfig
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.cameras import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.draws import Draws
from facelab.errors import UserError, an
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.nn.stylegan2 import AS_BUILT, FULL, Precision
from facelab.nn.stylegan2.noise import const_noise, noise_layers
from facelab.rendering.settings import RenderSettings

FEWEST_SAMPLES = 4  # per ray: what importance samples are drawn from
MAPPING = "backbone.mapping."  # codes are given, so nothing of a picture depends on it


@dataclass(frozen=True)
class Model:
    """An EG3D generator with what its configuration says of cameras and rendering.

    Attributes:
        generator: on its device; never changed (all work is done on copies).
        view: where cameras stand: radius, pivot, focal length.
        render: range of depths, samples per ray.
    """

    generator: TriPlaneGenerator
    view: ViewConfig = field(default_factory=ViewConfig)
    render: RenderConfig = field(default_factory=RenderConfig)

    @staticmethod
    def of(face: Any) -> Model:
        """Of a :class:`facelab.api.FaceModel`. UserError unless it is an EG3D model."""
        if face.method != "eg3d":
            raise UserError(
                f"{face.path} is {an(face.method)} model, expected an EG3D model; FaceDNeRF edits with EG3D only"
            )
        return Model(face.generator, face.config.view, face.config.render)

    @property
    def device(self) -> torch.device:
        """Where the generator lies."""
        return next(self.generator.parameters()).device

    def settings(self, config: FaceDNeRFConfig) -> RenderSettings:
        """Settings of the renderings during the optimisation. UserError for a sample factor that leaves too few samples."""
        r, m = config.render, config.memory
        samples = round(self.render.samples * r.sample_factor)
        if samples < FEWEST_SAMPLES:
            raise UserError(
                f"render.sample_factor {r.sample_factor:g} leaves {samples} of the model's {self.render.samples} samples "
                f"per ray, expected at least {FEWEST_SAMPLES}; take {FEWEST_SAMPLES / self.render.samples:.2g} or more"
            )
        own = self.render.settings(self.generator.config.field.box_side, r.resolution, r.sample_factor)
        own = own.replace(jitter=r.jitter)
        return own if m.max_points is None else own.replace(recompute=True, max_points=m.max_points)

    def picture_side(self, settings: RenderSettings) -> int:
        """Pixels a side of its pictures."""
        return self.generator.config.image_resolution(settings.resolution)

    def camera(self, config: FaceDNeRFConfig, horizontal: float = 0.0, vertical: float = 0.0) -> Camera:
        """One camera on the CPU, moved from the front by two angles in radians (the vertical one in EG3D's even measure)."""
        h, v = config.centre
        view = self.view
        return orbit_camera(h + horizontal, v + vertical, view.radius, view.pivot, view.focal)

    def noise_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of the backbone's noise maps by layer."""
        maps = const_noise(self.generator.backbone.synthesis)
        return {name: (value.shape[0], value.shape[1]) for name, value in maps.items()}

    def copy(self, precision: Precision = AS_BUILT) -> TriPlaneGenerator:
        """The generator again, frozen, computing so."""
        made = copy.deepcopy(self.generator).requires_grad_(False).eval()
        made.precision = precision
        return made

    def movable(self, precision: Precision) -> TriPlaneGenerator:
        """:meth:`copy` for the optimisation: styles scale the features.

        Folded into the weights, as one picture without gradient has them fastest, the derivative of a style would pass
        through that of a weight: another convolution in each layer, though the weights stay. Equal up to rounding.
        """
        made = self.copy(precision)
        for module in _modulated(made):
            module.fused_modconv = False
        return made

    def as_it_was(self, made: TriPlaneGenerator) -> TriPlaneGenerator:
        """A copy, in place, computing as the model does."""
        made.precision = self.generator.precision
        for module, own in zip(_modulated(made), _modulated(self.generator), strict=True):
            module.fused_modconv = own.fused_modconv
        return made


def _modulated(generator: torch.nn.Module) -> list[Any]:
    return [module for module in generator.modules() if hasattr(module, "fused_modconv")]


def precision_of(config: FaceDNeRFConfig) -> Precision:
    """How the marked blocks compute (``memory.superresolution``)."""
    if config.reference.half_precision:
        return AS_BUILT
    kinds = {"fp32": FULL, "bf16": Precision(torch.bfloat16), "as_built": AS_BUILT}
    return kinds[config.memory.superresolution]


def tuned_parts(generator: torch.nn.Module, parts: str) -> list[str]:
    """Names for :func:`facelab.inversion.tuning.tunable`: those given, else every parameter a picture depends on."""
    given = [part.strip() for part in parts.split(",") if part.strip()]
    return given or [name for name, _ in generator.named_parameters() if not name.startswith(MAPPING)]


@torch.no_grad()
def keep_noise(generator: TriPlaneGenerator, maps: Mapping[str, Tensor]) -> None:
    """Store maps (1, 1, H, W) or (H, W) as the backbone's own, in place. ValueError for a layer it does not have."""
    layers = noise_layers(generator.backbone.synthesis)
    for name, value in maps.items():
        if name not in layers:
            raise ValueError(f"no layer '{name}' takes noise, expected some of {', '.join(layers)}")
        layers[name].stored_noise().copy_(value.reshape(value.shape[-2:]))


class Recomputing:
    """Scenes and pictures of a generator of which nothing is kept for the backward: it is computed again then.

    Half the memory of a step or less, for about a third more time; the numbers are the same.
    """

    def __init__(self, generator: TriPlaneGenerator) -> None:
        self.generator = generator

    def scene(self, codes: Codes, noise: Any) -> Scene:
        """As ``generator.scene``."""
        return _recomputed(self.generator.scene, codes, noise)

    def render(self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws) -> GeneratorOutput:
        """As ``generator.render``."""
        return _recomputed(self.generator.render, scene, camera, settings, draws)


def _recomputed(function: Any, *arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    # draws are keyed by name, so the second pass sees the same numbers without any state
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
