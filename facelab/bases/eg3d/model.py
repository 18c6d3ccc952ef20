# SPDX-License-Identifier: Apache-2.0
"""EG3D's generator: StyleGAN2 draws three feature planes, a volume renderer reads them, a small network enlarges
the picture (arXiv 2112.07945).

Shape legend: N scenes, L style codes, W width of a style code, C feature channels, s side of the rendering, S side
of the picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops.triplane_render import channels_last
from facelab.cameras import Camera
from facelab.cameras.orbit import FOCAL, orbit_camera
from facelab.cameras.rays import make_rays
from facelab.draws import Draws
from facelab.fields.output import BoundField
from facelab.fields.triplane import TriplaneConfig, TriplaneField
from facelab.generator import AVERAGE_SEED, Codes, GeneratorOutput, Scene, average_latents, enlarged, ray_image
from facelab.nn.stylegan2 import AS_BUILT, KINDS, Precision, StyleGAN2Generator, Superresolution
from facelab.nn.stylegan2.network import FusedModulation
from facelab.nn.stylegan2.noise import NoiseMode
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.settings import RenderSettings
from facelab.rendering.triplane import render_triplane

LABEL_WIDTH = 25


@dataclass(frozen=True)
class ConditioningCamera:
    """The camera a generator is told where none is given: in front of the face; scene units."""

    radius: float = 2.7
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)
    focal: float = FOCAL  # over the image side

    def label(self) -> Tensor:
        """(1, 25)."""
        return orbit_camera(math.pi / 2, math.pi / 2, self.radius, self.pivot, self.focal).label()


@dataclass(frozen=True)
class TriPlaneGeneratorConfig:
    """Architecture of a :class:`TriPlaneGenerator`; the defaults are those of FFHQ at 512 px."""

    field: TriplaneConfig = dataclasses.field(default_factory=TriplaneConfig)
    z_dim: int = 512
    c_dim: int = LABEL_WIDTH  # 0: the mapping network sees no camera
    w_dim: int = 512
    mapping_layers: int = 2
    plane_resolution: int = 256
    channel_base: int = 32768  # channels of the backbone at resolution r: channel_base / r, at most channel_max
    channel_max: int = 512
    half_blocks: int = 0  # of the backbone's highest resolutions in half precision
    clamp: float | None = None  # of the backbone's convolutions
    fused_modulation: FusedModulation = "inference_only"
    superresolution: str | None = "8xdc"  # kind, None: the rendering is the picture
    superresolution_half: int = 4  # above 0: both blocks in half precision, outputs limited
    superresolution_antialias: bool = True
    superresolution_noise: NoiseMode = "none"
    legacy_raw: bool = False  # the raw picture as the original's in-place sum leaves it (released ShapeNet model)
    pose_conditioning: bool = True  # False: the mapping network sees a label of zeros
    label_scale: float = 1.0  # factor on the label the mapping network sees
    camera: ConditioningCamera = dataclasses.field(default_factory=ConditioningCamera)

    def image_resolution(self, rendering: int) -> int:
        """Side of the picture whose rendering has this side, pixels."""
        return rendering if self.superresolution is None else KINDS[self.superresolution].output_resolution


class TriPlaneGenerator(nn.Module):
    """A :class:`~facelab.generator.Generator` on three feature planes.

    The one latent is ``z``, the one code ``w`` (N, L, W). A scene holds the ``planes`` (N, 3, C, H, W) and ``w``:
    keep it and render it from many cameras; the generator itself remembers nothing.

    ``precision`` (a plain attribute, not part of the state) says how backbone and super-resolution compute,
    ``field_net.precision`` how the field does.
    """

    def __init__(self, config: TriPlaneGeneratorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = AS_BUILT
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        self.backbone = StyleGAN2Generator(
            config.z_dim,
            config.c_dim,
            config.w_dim,
            config.plane_resolution,
            3 * config.field.channels,
            mapping_layers=config.mapping_layers,
            generator=source,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            num_fp16_res=config.half_blocks,
            conv_clamp=config.clamp,
            fused_modconv=config.fused_modulation,
        )
        self.field_net = TriplaneField(config.field)
        self.field_net.reset_parameters(source)
        self.superresolution: Superresolution | None = None
        if config.superresolution is not None:
            self.superresolution = Superresolution(
                config.superresolution,
                in_channels=config.field.features,
                w_dim=config.w_dim,
                num_fp16_res=config.superresolution_half,
                antialias=config.superresolution_antialias,
                fused_modconv=config.fused_modulation,
                generator=source,
            )

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        """The latent ``z``."""
        return {"z": (self.config.z_dim,)}

    # ------------------------------------------------------------ codes

    def map(
        self,
        latents: Mapping[str, Tensor],
        conditioning: Tensor | None = None,
        truncation: float = 1.0,
        cutoff: int | None = None,
    ) -> Codes:
        """{"z": (N, Z)} -> {"w": (N, L, W)}.

        Args:
            conditioning: camera labels (N or 1, 25) that the mapping network is told; None: the camera in front of
                the face. Without pose conditioning they are not looked at.
            truncation: psi, moves codes towards the stored average; 1: not at all, 0: the average.
            cutoff: only the first so many codes are moved; None: all.

        Raises:
            ValueError: other latents, or labels of another shape; truncation while no average is stored.
        """
        if set(latents) != {"z"}:
            raise ValueError(f"expected the latents ['z'], got {sorted(latents)}")
        z = latents["z"]
        w = self.backbone.mapping(z, self.mapping_label(len(z), conditioning, z.device))
        codes = Codes({"w": w})
        return codes if truncation == 1.0 else self.truncate(codes, truncation, cutoff)

    def mapping_label(self, count: int, conditioning: Tensor | None, device: torch.device) -> Tensor | None:
        """What the mapping network sees of the camera labels: (count, c_dim), scaled or zeros, or None."""
        c = self.config
        if c.c_dim == 0:
            return None
        if not c.pose_conditioning:
            return torch.zeros(count, c.c_dim, device=device)
        label = c.camera.label().to(device) if conditioning is None else conditioning
        if label.ndim != 2 or label.shape[1] != c.c_dim or len(label) not in (1, count):
            raise ValueError(f"conditioning must be ({count} or 1, {c.c_dim}) camera labels, got {tuple(label.shape)}")
        return (label * c.label_scale).expand(count, -1)

    def truncate(self, codes: Codes, psi: float, cutoff: int | None = None) -> Codes:
        """Move codes towards the stored average; psi 0 is the average, 1 leaves them."""
        if not self.has_averages:
            raise ValueError("no stored average: call update_averages() once before truncating")
        return codes.map(lambda w: self.backbone.mapping.truncate(w, psi, cutoff))

    @property
    def _average(self) -> Tensor:
        average = self.backbone.mapping.w_avg
        assert average is not None
        return average

    def average_codes(self) -> Codes:
        """The stored average as the codes of one scene."""
        return Codes({"w": self._average.expand(1, self.backbone.num_ws, -1)})

    @property
    def has_averages(self) -> bool:
        """Whether an average was stored (it is zero before)."""
        return bool(self._average.any())

    @torch.no_grad()
    def update_averages(self, latents: Mapping[str, Tensor] | None = None, seed: int = AVERAGE_SEED) -> None:
        """Store the mean code of ``latents`` under the camera in front, by default of 10 000 fixed normal draws.

        Training keeps a running average instead: ``backbone.mapping.update_w_avg``.
        """
        if latents is None:
            latents = average_latents(self.latent_spec, seed, self._average.device)
        z = latents["z"]
        self._average.copy_(self.backbone.mapping.style(z, self.mapping_label(len(z), None, z.device)).mean(0))

    @torch.no_grad()
    def forget_averages(self) -> None:
        """Drop the stored average."""
        self._average.zero_()

    # ------------------------------------------------------------ scenes and pictures

    def scene(self, codes: Codes, noise: Mapping[str, Tensor] | Draws | NoiseMode | None = None) -> Scene:
        """Codes -> planes.

        Args:
            noise: of the backbone: maps by layer (layers without one keep their stored map), a source of random
                ones, ``"none"``, or None for the stored maps, which do not change between calls.
        """
        mode: NoiseMode = "const"
        maps, draws = None, None
        if isinstance(noise, Draws):
            mode, draws = "random", noise
        elif isinstance(noise, Mapping):
            maps = noise
        elif noise is not None:
            mode = noise
        w = codes.values["w"]
        drawn = self.backbone.synthesis(w, noise_mode=mode, noise_maps=maps, draws=draws, precision=self.precision)
        planes = drawn.unflatten(1, (3, self.config.field.channels))
        if planes.is_cuda and not planes.requires_grad:
            planes = channels_last(planes)  # once here, not at every fused rendering
        return Scene({"planes": planes, "w": w}, len(w))

    def field(self, scene: Scene, count: int | None = None) -> BoundField:
        """The field of a scene, a callable (points (N, R, S, 3), directions) -> FieldOutput; directions do not count.

        ``count`` repeats a single scene for several cameras.
        """
        planes = self._planes(scene, count)
        return lambda points, directions: self.field_net(points, planes)

    @staticmethod
    def _planes(scene: Scene, count: int | None) -> Tensor:
        if count not in (None, scene.count) and scene.count != 1:
            raise ValueError(f"{scene.count} scenes cannot be rendered from {count} cameras: give 1 or {count}")
        planes: Tensor = scene.parts["planes"]
        return planes

    def render_volume(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None
    ) -> RenderOutput:
        """The volume rendering alone: features, rgb (in about [0, 1]), depth and opacity of each ray, row-major."""
        rays = make_rays(camera, settings.resolution, settings.grid)
        return render_triplane(self._planes(scene, len(camera)), rays, self.field_net, settings, draws)

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera (one scene, many cameras broadcasts).

        ``settings.resolution`` is the side s of the rendering; the picture has the side of the super-resolution.

        Returns:
            rgb (N, 3, S, S), raw_rgb (N, 3, s, s) and features (N, C, s, s) as ``2 v - 1``; depth (weighted sum),
            opacity and normals of the rendering, bilinearly enlarged to S. The first features are the rendered rgb
            whatever ``legacy_raw`` says; :meth:`render_volume` has the rendering as it is.
        """
        output = self.render_volume(scene, camera, settings, draws)
        side = settings.resolution

        assert output.features is not None
        features = ray_image(2 * output.features - 1, side)
        rgb, raw = self.enlarge(features, scene.parts["w"], draws)
        size = rgb.shape[-1]
        depth, opacity = (enlarged(ray_image(x, side), size) for x in (output.depth, output.opacity))
        normals = (
            None if output.normals is None else F.normalize(enlarged(ray_image(output.normals, side), size), dim=1)
        )
        return GeneratorOutput(rgb, depth, opacity, normals=normals, raw_rgb=raw, features=features)

    def enlarge(self, features: Tensor, w: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Feature images (N, C, s, s) and codes (N or 1, L, W) -> picture (N, 3, S, S) and raw picture (N, 3, s, s)."""
        raw = features[:, :3]
        if self.superresolution is None:
            return raw, raw
        w = w.expand(len(features), -1, -1)
        mode = self.config.superresolution_noise
        run = self.superresolution
        if self.config.legacy_raw:
            return run.with_legacy_raw(raw, features, w, noise_mode=mode, draws=draws, precision=self.precision)
        return run(raw, features, w, noise_mode=mode, draws=draws, precision=self.precision), raw

    def forward(
        self,
        latents: Mapping[str, Tensor],
        camera: Camera,
        settings: RenderSettings,
        draws: Draws | None = None,
        truncation: float = 1.0,
        conditioning: Tensor | None = None,
    ) -> GeneratorOutput:
        """``map``, ``scene`` and ``render`` in one call; conditioned on the rendering camera unless told otherwise."""
        label = camera.label() if conditioning is None else conditioning
        return self.render(self.scene(self.map(latents, label, truncation)), camera, settings, draws)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights and stored noise anew."""
        self.backbone.reset_parameters(generator)
        self.field_net.reset_parameters(generator)
        if self.superresolution is not None:
            self.superresolution.reset_parameters(generator)
