# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's whole editing loop on doubles: codes and noise maps first, then the generator, with losses of the front
view and of a random side view.

The loop is facelab.inversion's; the light that the side view should have, and how far its picture is from it, are
facelab.lighting's and facelab.losses'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
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
from facelab.lighting import project
from facelab.losses.lighting import light_distance
from facelab.losses.perceptual import at_most
from facelab.rendering.settings import RenderSettings
from tests.golden.adapters.facednerf_light import light_function
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


def light_target(config: Meta, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """(9,) numbers of the light as a camera moved by these angles sees it, in the original's way."""
    n = config["sh_grid"]
    jitter = torch.full((n, n, 2), config["sh_jitter"], dtype=torch.float64)
    moved = torch.stack([vertical, horizontal]).double()
    return config["sh_scale"] * project(light_function(config["light_function"]), moved, n, jitter, phase=True).float()


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

    def light_net(level: Tensor) -> Tensor:
        return F.avg_pool2d(level, 64).flatten(1) @ weights["Wl"]

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
        return light_distance(
            light_net, moment.render(canonical(c, horizontal, vertical)).rgb, light_target(c, vertical, horizontal)
        )

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
