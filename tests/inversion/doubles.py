# SPDX-License-Identifier: Apache-2.0
"""A generator of a few hundred numbers that has all that inversion asks for: codes, noise, cameras, segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.inversion.terms import picture_term, scores_term
from facelab.rendering.settings import RenderSettings

SIDE, WIDTH = 16, 6
SETTINGS = RenderSettings(SIDE, samples_fine=0, jitter=False)


class Double(nn.Module):
    """Pictures are smooth in the codes ``shape`` (N, 3, W) and ``style`` (N, W), in the camera's position and in a noise
    map; the last three of six channels are the segmentation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.paint = nn.Parameter(torch.randn(4 * WIDTH + 3, 6 * 16, generator=source) / 4)
        self.tone = nn.Parameter(torch.zeros(6))
        self.register_buffer("noise", torch.randn(SIDE, SIDE, generator=source))
        self.requires_grad_(False)

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        return {"z": (WIDTH,)}

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        w = torch.tanh(latents["z"]) + 0.3
        return Codes({"shape": w[:, None].expand(-1, 3, -1), "style": w})

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        noise = {"map": self.noise[None, None]} if noise is None else noise
        return Scene({"codes": codes, "noise": noise["map"]}, len(codes))

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        codes = scene.parts["codes"].values
        place = camera.cam2world[:, :3, 3]
        flat = torch.cat([codes["shape"].flatten(1), codes["style"], place], dim=1)
        small = (flat @ self.paint).unflatten(1, (6, 4, 4))
        whole = F.interpolate(small, (SIDE, SIDE), mode="bilinear") + self.tone[:, None, None]
        whole = torch.tanh(whole + 0.1 * scene.parts["noise"])
        ones = torch.ones_like(whole[:, :1])
        return GeneratorOutput(whole[:, :3], ones, ones, whole[:, 3:])

    def field(self, scene: Scene) -> Any:
        raise AssertionError("an inversion asks for no field")


def own_pictures(generator: Any, views: Tensor, seed: int = 5) -> tuple[Target, Codes]:
    """Pictures of random codes from cameras at (N, 2) angles, and these codes."""
    z = torch.randn(len(views), WIDTH, generator=torch.Generator().manual_seed(seed))
    codes = generator.map({"z": z})
    camera = sphere_camera(views[:, 0], views[:, 1])
    output = generator.render(generator.scene(codes), camera, SETTINGS)
    return Target(output.rgb, camera, output.semantics), codes


def make_problem(target: Target, start_view: Tensor | None = None, terms: dict[str, Any] | None = None) -> Problem:
    """Picture and segmentation, and what else is given by name."""
    weighted = {"picture": Weighted(1.0, picture_term), "mask": Weighted(0.5, scores_term)}
    weighted |= {name: Weighted(1.0, term) for name, term in (terms or {}).items()}
    return Problem(Double(), target, weighted, SETTINGS, make_camera=look_from, start_view=start_view)


def look_from(view: Tensor) -> Camera:
    """(N, 2) azimuth and elevation -> cameras."""
    return sphere_camera(view[:, 0], view[:, 1])
