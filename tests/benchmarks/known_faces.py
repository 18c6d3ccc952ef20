# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads that no model has seen, with pictures of them from any camera and under any light; a reader of lights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab import lighting
from facelab.api import FaceModel
from facelab.cameras.camera import Camera
from facelab.cli.measure import HELD_OUT
from facelab.cli.sight import sight_of, synthetic_heads
from facelab.data.synthetic import SyntheticBatch
from facelab.data.synthetic_sampling import LIGHT, sample_heads
from facelab.inversion.problem import Target

SKIN, NOSE = 1, 2  # CelebAMask-HQ's numbers
BORDER = 5  # pixels: windows that must be all skin

# 4 of the original's, far brighter than what portraits are lit by; 2 as the heads are usually lit
LIGHTS: dict[str, str] = {
    "right": "right",
    "left": "left",
    "below": "below",
    "top_right": "top_right",
    "lamp_top_left": "{sum: [{ambient: 0.5}, {direction: [-1, 1, 0.8], strength: 0.6}]}",
    "lamp_above": "{sum: [{ambient: 0.5}, {direction: [0, 1, 0.8], strength: 0.6}]}",
}


@dataclass(frozen=True)
class Views:
    """N views of one head.

    Attributes:
        picture: (N, 3, S, S) in [-1, 1].
        normal: (N, S, S, 3) world axes.
        skin: (N, S, S) bool, skin and nose without their border.
    """

    picture: Tensor
    normal: Tensor
    skin: Tensor


class KnownFaces:
    """Held-out heads in a model's units, on its camera distribution.

    Args:
        face: an EG3D model.
        seed: added to the seed that training has not seen.
        size: pixels a side.
    """

    def __init__(self, face: FaceModel, seed: int, size: int) -> None:
        self.seed = face.config.train.seed + HELD_OUT + seed
        self.source = synthetic_heads(sight_of(face.config), self.seed, size, "centers", "cpu")

    def lights(self, index: int) -> Tensor:
        """(1, 9, 3) the light that a head has of its own."""
        numbers = self.source.heads.numbers(torch.tensor([index]))
        return lighting.light_from_uniform(numbers[:, LIGHT : LIGHT + lighting.UNIFORMS])

    def camera(self, index: int) -> Camera:
        """One camera, drawn as those of training."""
        heads = self.source.heads
        return heads.cameras(heads.numbers(torch.tensor([index]))).scaled(self.source.scale)

    def views(self, index: int, camera: Camera, light: Tensor | None = None) -> Views:
        """A head from N cameras, under a (9,) white world light or its own."""
        heads, count = self.source.heads, len(camera)
        people = sample_heads(heads.model, heads.numbers(torch.tensor([index] * count)))
        lit = self.lights(index) if light is None else light.view(1, 9, 1).expand(1, 9, 3)
        made = heads.render(people, camera.to("cpu").scaled(1 / self.source.scale), lit.expand(count, -1, -1))
        return Views(made.image.float() / 127.5 - 1, made.normal, skin(made))

    def target(self, index: int) -> Target:
        """What is inverted: the head from its own camera under its own light."""
        camera = self.camera(index)
        return Target(self.views(index, camera).picture, camera)


def skin(batch: SyntheticBatch) -> Tensor:
    """(N, S, S) bool: skin and nose without their border."""
    other = ((batch.mask != SKIN) & (batch.mask != NOSE)).float()[:, None]
    return F.max_pool2d(other, BORDER, 1, BORDER // 2)[:, 0] == 0


def known_light(name: str) -> Tensor:
    """(9,) world light of :data:`LIGHTS`, or any that ``--light`` takes."""
    return lighting.light_from_text(LIGHTS.get(name, name))


def light_figures(pictures: Tensor, truth: Views, wanted: Tensor) -> dict[str, float]:
    """How the light in pictures of a head agrees with a known one, by brightness and true normals: no network.

    Strength and albedo do not count: lights are compared after division by their first number.

    Args:
        pictures: (N, 3, S, S) in [-1, 1].
        truth: of the same head from the same cameras.
        wanted: (9,) world light.

    Returns:
        ``angle_degrees`` between the directions that most light comes from, ``sh_error`` mean absolute difference of the
        eight numbers that remain, ``shading_correlation`` of brightness with the wanted light's shading; means over
        the views.
    """
    brightness = (pictures.clamp(-1, 1).mean(1) + 1).cpu() / 2
    seen = lighting.fit_light(brightness, truth.normal, truth.skin).double()
    known = wanted.double()[None].expand_as(seen)
    cosine = (lighting.main_direction(seen) * lighting.main_direction(known)).sum(1)
    difference = (seen / seen[:, :1] - known / known[:, :1])[:, 1:]
    along = lighting.shading_correlation(brightness, truth.normal, truth.skin, known)
    return {
        "angle_degrees": float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).mean()),
        "sh_error": float(difference.abs().mean()),
        "shading_correlation": float(along.mean()),
    }


# ---------------------------------------------------------------- a judge that needs no file

READER_HEADS, READER_TESTS, READER_PIXELS = 600, 100, 16  # fitted on, tested on; side of what it sees
READER_FIRST = 1_000_000  # number of the first of them: far from the heads that are measured
BRIGHT = 0.3  # lightness above which the second half of what it sees begins
RIDGE = 0.1  # of the mean variance


class LightReader(nn.Module):
    """Lightness (N, 1, H, W) -> DPR's nine numbers (N, 9) by ridge regression from 16 x 16 means, fitted on heads.

    It is no network of a paper and knows synthetic heads alone: a judge of relighting that is not DPR's, whose own error
    must be stated beside what it leads to.
    """

    def __init__(self, level: Tensor, light: Tensor) -> None:
        """Fit on (N, 1, H, W) lightness in 0..1 and (N, 9) numbers."""
        super().__init__()
        x, y = self._seen(level).double(), light.double()
        mean, offset = x.mean(0), y.mean(0)
        x, y = x - mean, y - offset
        ridge = RIDGE * x.var(0).mean() * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(x.T @ x / len(x) + ridge, x.T @ y / len(x))
        for name, value in (("mean", mean), ("offset", offset), ("weight", weight)):
            self.register_buffer(name, value.float())

    def forward(self, level: Tensor) -> Tensor:
        """See the class; differentiable."""
        return self.offset + (self._seen(level) - self.mean) @ self.weight

    @staticmethod
    def _seen(level: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(level, READER_PIXELS).flatten(1)
        return torch.cat([small, (small - BRIGHT).clamp(min=0)], dim=1)


def fitted_reader(faces: KnownFaces, heads: int = READER_HEADS) -> tuple[LightReader, dict[str, Any]]:
    """A reader for heads of this set, and how good it is on 100 that it was not fitted on."""
    generator = torch.Generator().manual_seed(faces.seed)
    level, light = _lit_heads(faces, READER_FIRST, heads, generator)
    reader = LightReader(level, light)
    level, light = _lit_heads(faces, READER_FIRST + heads, READER_TESTS, generator)
    with torch.no_grad():
        agreement = lighting.light_agreement(reader(level), light)
    error, guess = float(agreement.mean_error.mean()), float(agreement.guess_error.mean())
    told = {"fitted_on": heads, "tested_on": READER_TESTS, "median_angle_degrees": math.degrees(agreement.angle)}
    return reader, {**told, "dpr_error": error, "dpr_error_of_a_constant": guess}


def _lit_heads(faces: KnownFaces, first: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lightness of heads under even light and a lamp in front, and what a camera sees of the light, in DPR's terms."""
    heads = faces.source.heads
    u = torch.rand(4, count, generator=generator)
    azimuth, elevation = 1.6 * (2 * u[0] - 1), 1.2 * (2 * u[1] - 1)
    flat = elevation.cos()
    towards = torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], dim=-1)
    light = lighting.directional(towards, 0.3 + u[2]) + lighting.ambient(1.0) * (0.1 + 0.6 * u[3])[:, None]
    numbers = heads.numbers(torch.arange(first, first + count))
    camera = heads.cameras(numbers)
    made = heads.render(sample_heads(heads.model, numbers), camera, light[..., None].expand(-1, -1, 3))
    return lighting.lightness(made.image.float() / 255), lighting.to_dpr(light, camera)
