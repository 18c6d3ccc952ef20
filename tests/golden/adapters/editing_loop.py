# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's whole editing loop on doubles: codes and noise maps first, then the generator, with losses of the front
view and of a random side view.

The loop is facelab.inversion's. The light that the side view should have and the lightness of its picture are written
out here from their formulas, as the case's other doubles are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.draws import Draws
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inversion import schedules
from facelab.inversion.loop import Inversion, InversionSettings
from facelab.inversion.noise import normalise_noise
from facelab.inversion.problem import Moment, Problem, Target, Weighted
from facelab.inversion.start import numpy_latents, start_statistics
from facelab.inversion.terms import noise_term
from facelab.inversion.tuning import Tuning, TuningSettings
from facelab.losses.perceptual import at_most
from facelab.rendering.settings import RenderSettings
from tests.golden.adapters.inversion import pattern
from tests.golden.harness import Arrays, Meta, case_weights, given

LOSSES = ("id", "origin", "diffusion", "illumination")


def wave(shape: Any) -> Tensor:
    """What replaces every standard normal draw."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2) * torch.sin(1 + 0.7 * index)).reshape(tuple(shape)).float()


@dataclass(frozen=True)
class WaveDraws(Draws):
    """Waves for normal numbers."""

    def normal(self, name: str, shape: Any, device: Any = "cpu", dtype: Any = torch.float32) -> Tensor:
        return wave(shape)


class Double(nn.Module):
    """The case's generator."""

    def __init__(self, weights: Mapping[str, Tensor], config: Meta) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("M", weights["M"])
        self.P, self.b = nn.Parameter(weights["P"].clone()), nn.Parameter(weights["b"].clone())

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        return {"z": (self.config["z_dim"],)}

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        assert conditioning is not None
        w = torch.tanh(torch.cat([latents["z"], conditioning], dim=1) @ self.get_buffer("M"))
        return Codes({"w": w[:, None].expand(-1, self.config["num_ws"], -1)})

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        return Scene({"w": codes.values["w"], "noise": noise}, len(codes))

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        flat = torch.cat([scene.parts["w"].flatten(1), camera.label()], dim=1)
        base = (flat @ self.P.T + self.b).reshape(-1, 3, 8, 8)
        for value in scene.parts["noise"].values():
            small = value.shape[-1] < 8
            base = base + 0.05 * (F.interpolate(value, (8, 8)) if small else F.adaptive_avg_pool2d(value, 8))
        side = self.config["resolution"]
        rgb = F.interpolate(1.2 * torch.tanh(base), (side, side), mode="bilinear", align_corners=False)
        ones = torch.ones_like(rgb[:, :1])
        return GeneratorOutput(rgb, ones, ones)

    def field(self, scene: Scene) -> Any:
        raise AssertionError("an inversion asks for no field")


# ---------------------------------------------------------------- light


def harmonics(theta: Tensor, phi: Tensor) -> Tensor:
    """(9, ...) real spherical harmonics of three bands, Condon-Shortley phase included, index l (l + 1) + m."""
    c, s = theta.cos(), theta.sin()
    legendre = {(0, 0): torch.ones_like(c), (1, 0): c, (1, 1): -s, (2, 0): (3 * c * c - 1) / 2}
    legendre |= {(2, 1): -3 * c * s, (2, 2): 3 * s * s}
    found = []
    for band in range(3):
        for m in range(-band, band + 1):
            a = abs(m)
            k = math.sqrt((2 * band + 1) * math.factorial(band - a) / (4 * math.pi * math.factorial(band + a)))
            around = (
                torch.ones_like(phi) if m == 0 else (math.sqrt(2) * ((m * phi).cos() if m > 0 else (a * phi).sin()))
            )
            found.append(k * around * legendre[band, a])
    return torch.stack(found)


def light_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Light of a direction, by the case's name."""

    def lobe(azimuth: float, tilt: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda theta, phi: (-4 * (theta - tilt - math.pi).sin() * (phi - azimuth).cos() - 3).clamp_min(0)

    right = lobe(2.5)
    known = {
        "right_az2.5_default": right,
        "left_az0.6": lobe(0.6),
        "below_front": lobe(math.pi / 2, math.pi / 3),
        "top_plus_az2.5": lambda theta, phi: (5 * theta.cos() - 4).clamp_min(0) + right(theta, phi),
    }
    return known[name]


def light_target(config: Meta, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """(9,) coefficients of the light as a camera moved by these angles sees it."""
    n = config["sh_grid"]
    cells = (torch.arange(n, dtype=torch.float64) + config["sh_jitter"]) / n
    x, y = torch.meshgrid(cells, cells, indexing="ij")
    theta, phi = 2 * torch.acos((1 - x).sqrt()), 2 * math.pi * y
    light = light_function(config["light_function"])(theta + vertical.double(), phi + horizontal.double())
    return (config["sh_scale"] * 4 * math.pi / n**2 * (harmonics(theta, phi) * light).sum(dim=(1, 2))).float()


def lightness(picture: Tensor) -> Tensor:
    """(N, 3, S, S) sRGB in about 0..1 -> (N, 1, S, S) Lab lightness over 100; derivatives are finite everywhere."""
    bright = picture > 0.04045
    base = torch.where(bright, (picture + 0.055) / 1.055, torch.ones_like(picture))
    linear = torch.where(bright, base**2.4, picture / 12.92)
    y = torch.einsum("nchw,c->nhw", linear, picture.new_tensor([0.212671, 0.715160, 0.072169]))[:, None]
    high = y > 0.008856
    root = torch.where(high, y, torch.ones_like(y)) ** (1 / 3)
    return (116 * torch.where(high, root, 7.787 * y + 4 / 29) - 16) / 100


# ---------------------------------------------------------------- losses


def make_terms(meta: Meta, weights: Mapping[str, Tensor], u: Tensor) -> dict[str, Weighted]:
    """The case's four losses."""
    c, factor = meta["config"], meta["weights"]

    def features(picture: Tensor) -> Tensor:
        return 0.5 * F.avg_pool2d(at_most(picture, 256), 32).flatten(1)

    def identity(picture: Tensor) -> Tensor:
        return F.normalize(F.avg_pool2d(at_most(picture, 256), 64).flatten(1) @ weights["Wid"], dim=1)

    def turn(moment: Moment) -> tuple[Tensor, Tensor]:
        number = moment.step + (c["num_steps"] if moment.draws.phase == "tuning" else 0)
        horizontal, vertical = (u[number] - 0.5) * c["side_range"]
        return horizontal, vertical

    def side(moment: Moment) -> Tensor:
        horizontal, vertical = turn(moment)
        return moment.render(canonical(c, horizontal, vertical)).rgb / 2 + 0.5

    def origin(moment: Moment) -> Tensor:
        return (features(moment.output.rgb) - features(moment.target.picture)).square().sum(1)

    def identities(moment: Moment) -> Tensor:
        return 1 - (identity(moment.output.rgb) * identity(moment.target.picture)).sum(1)

    def diffusion(moment: Moment) -> Tensor:
        return 0.5 * (F.avg_pool2d(side(moment), 16) - 0.3).square().flatten(1).sum(1)

    def illumination(moment: Moment) -> Tensor:
        horizontal, vertical = turn(moment)
        seen = F.avg_pool2d(lightness(side(moment)), 64).flatten(1) @ weights["Wl"]
        return (seen - light_target(c, vertical, horizontal)).square().sum(1)

    made = {"id": identities, "origin": origin, "diffusion": diffusion, "illumination": illumination}
    return {name: Weighted(factor[f"lamda_{name}"], term) for name, term in made.items()}


def canonical(config: Meta, horizontal: Tensor | float = 0.0, vertical: Tensor | float = 0.0) -> Camera:
    """The case's camera, moved by two angles."""
    c = config["camera"]
    yaw, pitch = float(c["horizontal_mean"] + horizontal), float(c["vertical_mean"] + vertical)
    return orbit_camera(yaw, pitch, c["radius"], c["pivot"], c["focal"])


@given("u", "c")
def edit_loop(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Both stages."""
    c = meta["config"]
    weights = case_weights(meta, {key: tuple(shape) for key, shape in meta["detfill"]["shapes"].items()})
    generator = Double(weights, c).requires_grad_(False)
    a = meta["target_args"]
    picture = pattern([1, 3, c["resolution"], c["resolution"]], a["a"], a["b"], a["d"], a)
    terms = make_terms(meta, weights, arrays["u"])
    target = Target(picture, Camera.from_label(arrays["c"]))
    problem = Problem(generator, target, terms, RenderSettings(c["resolution"]), WaveDraws(0))
    z = numpy_latents(c["z_seed"], c["w_avg_samples"], c["z_dim"])
    label = canonical(c).label().float().expand(len(z), -1)
    start = start_statistics(generator, {"z": z}, label, repeated=("w",))
    names = {f"n{i}_{size}.noise_const": size for i, size in enumerate(c["noise_sizes"])}

    settings = InversionSettings(
        c["num_steps"],
        functools.partial(schedules.ramped_rate, steps=c["num_steps"], base=c["lr"]),
        perturbation=lambda step, name: schedules.perturbation(step, c["num_steps"], start.deviation[name]),
        keep_best=False,
    )
    kept = {"noise": Weighted(c["noise_regulariser_weight"], noise_term)}
    first = Problem(generator, target, {**terms, **kept}, problem.settings, problem.draws)
    maps = {name: wave((size, size)) for name, size in names.items()}
    inversion = Inversion(first, start.average, settings, noise=maps)
    outputs: dict[str, Tensor] = {}
    reports = [inversion.advance() for _ in range(c["num_steps"])]
    for name in LOSSES:
        outputs[f"pre_{name}"] = torch.cat([r.parts[name] for r in reports])
    solution = inversion.solution()
    outputs["w_final"] = solution.codes.values["w"]
    for name, value in solution.noise.items():
        outputs[f"noise_final_{name}"] = value[0, 0]

    for name, size in names.items():
        solution.noise[name] = wave((1, 1, size, size))
    rate = functools.partial(schedules.ramped_rate, steps=c["num_steps_pti"], base=c["lr_pti"])
    tuning = Tuning(problem, solution, TuningSettings(c["num_steps_pti"], rate))
    reports = []
    for _ in range(c["num_steps_pti"]):
        reports.append(tuning.advance())
        for value in solution.noise.values():
            normalise_noise(value)
    for name in LOSSES:
        outputs[f"post_{name}"] = torch.cat([r.parts[name] for r in reports])
    outputs |= {f"post_noise_final_{name}": value[0, 0] for name, value in solution.noise.items()}
    outputs["P_final_minus_initial"] = generator.P.detach() - weights["P"]
    outputs["b_final"] = generator.b.detach()
    return outputs


ADAPTERS = {"facednerf/edit_loop": edit_loop}
