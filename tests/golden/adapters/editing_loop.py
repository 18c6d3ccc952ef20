# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's whole editing loop: both stages of facelab.methods.facednerf with the case's generator, judges and random
numbers in place of networks.

Reference switches: ``reference.fresh_noise`` and ``reference.all_losses``; the light is the case's function, to which the
side view's angles are added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.bases.eg3d.config import ViewConfig
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inversion.problem import Target
from facelab.lighting import project
from facelab.losses.perceptual import at_most
from facelab.methods.facednerf.config import (
    CodesConfig,
    FaceDNeRFConfig,
    ReferenceConfig,
    SideConfig,
    TuneConfig,
    WeightConfig,
)
from facelab.methods.facednerf.course import CODES, Control, Course, Step, one_of
from facelab.methods.facednerf.model import Model
from facelab.methods.facednerf.terms import LightGoal, Networks, SideView
from facelab.rendering.settings import RenderSettings
from tests.golden.adapters.facednerf_light import light_function
from tests.golden.adapters.inversion import pattern
from tests.golden.harness import Arrays, Meta, case_weights, given

LOSSES = {"id": "identity", "origin": "reconstruction", "diffusion": "text", "illumination": "light"}


def wave(shape: Any) -> Tensor:
    """What replaces every standard normal draw."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2) * torch.sin(1 + 0.7 * index)).reshape(tuple(shape)).float()


@dataclass(frozen=True)
class CaseDraws(Draws):
    """Waves for normal numbers, the case's pair of uniform ones at each step of either stage."""

    pairs: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 2))
    first_steps: int = 0

    def normal(self, name: str, shape: Any, device: Any = "cpu", dtype: Any = torch.float32) -> Tensor:
        return wave(shape)

    def uniform(self, name: str, shape: Any, device: Any = "cpu", dtype: Any = torch.float32) -> Tensor:
        assert name == "side", name
        tuning = self.phase.startswith("tuning")
        return self.pairs[self.step + (self.first_steps if tuning else 0)]


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


@dataclass(frozen=True)
class CaseModel(Model):
    """The case's generator in the place of an EG3D."""

    def settings(self, config: FaceDNeRFConfig) -> RenderSettings:
        return RenderSettings(self.generator.config["resolution"])  # type: ignore[index]

    def picture_side(self, settings: RenderSettings) -> int:
        return settings.resolution

    def noise_sizes(self) -> dict[str, tuple[int, int]]:
        sizes = self.generator.config["noise_sizes"]  # type: ignore[index]
        return {f"n{i}_{size}.noise_const": (size, size) for i, size in enumerate(sizes)}


class Features:
    """The case's LPIPS."""

    name = metric = "case"

    def features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return (0.5 * F.avg_pool2d(pictures, 32),)


class Diffusion:
    """The case's text loss, which is a plain function of the picture."""

    def loss(self, pictures: Tensor, draws: Draws, *, progress: Callable[[int], float]) -> Tensor:
        return 0.5 * (F.avg_pool2d(pictures / 2 + 0.5, 16) - 0.3).square().flatten(1).sum(1)


def judges(weights: Mapping[str, Tensor]) -> Networks:
    """The case's networks."""

    def identity(pictures: Tensor) -> Tensor:
        return F.avg_pool2d(at_most(pictures, 256), 64).flatten(1) @ weights["Wid"]

    def light(lightness: Tensor) -> Tensor:
        return F.avg_pool2d(lightness, 64).flatten(1) @ weights["Wl"]

    return Networks(Features(), identity, Diffusion(), None, light)


def light_goal(config: Meta) -> LightGoal:
    """The case's light as the side view should see it."""
    n, function = config["sh_grid"], light_function(config["light_function"])
    jitter = torch.full((n, n, 2), float(config["sh_jitter"]))

    def goal(side: SideView) -> Tensor:
        numbers = project(function, (side.angles[1], side.angles[0]), n, jitter, phase=True)
        return (config["sh_scale"] * numbers).float()

    return goal


def settings(meta: Meta) -> FaceDNeRFConfig:
    """The case's settings under our names."""
    c, factor = meta["config"], meta["weights"]
    weights = {ours: factor[f"lamda_{theirs}"] for theirs, ours in LOSSES.items()}
    camera = c["camera"]
    return FaceDNeRFConfig(
        weights=WeightConfig(**weights, noise=c["noise_regulariser_weight"]),
        codes=CodesConfig(steps=c["num_steps"], lr=c["lr"], start_seed=c["z_seed"], start_samples=c["w_avg_samples"]),
        tune=TuneConfig(steps=c["num_steps_pti"], lr=c["lr_pti"]),
        side=SideConfig(camera["horizontal_mean"], camera["vertical_mean"], c["side_range"], c["side_range"]),
        reference=ReferenceConfig(fresh_noise=True, all_losses=True),
    )


@given("u", "c")
def edit_loop(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Both stages."""
    c = meta["config"]
    weights = case_weights(meta, {key: tuple(shape) for key, shape in meta["detfill"]["shapes"].items()})
    generator: Any = Double(weights, c).requires_grad_(False)
    a, camera = meta["target_args"], c["camera"]
    picture = pattern([1, 3, c["resolution"], c["resolution"]], a["a"], a["b"], a["d"], a)
    target = Target(picture, Camera.from_label(arrays["c"]))
    model = CaseModel(generator, ViewConfig(camera["radius"], tuple(camera["pivot"]), camera["focal"]))
    steps: list[Step] = []
    draws = CaseDraws(0, pairs=arrays["u"], first_steps=c["num_steps"])
    control = Control(on_step=steps.append, draws=draws)
    course = Course(model, target, settings(meta), judges(weights), light_goal(c), control)

    solution = course.find()
    tuning = course.tune(one_of(solution, 0), 0)
    outputs = {"w_final": solution.codes.values["w"]}
    for ours, stage in (("pre", True), ("post", False)):
        chosen = [step for step in steps if (step.stage == CODES) is stage]
        for theirs, name in LOSSES.items():
            outputs[f"{ours}_{theirs}"] = torch.cat([step.parts[name] for step in chosen])
    outputs |= {f"noise_final_{name}": value[0, 0] for name, value in solution.noise.items()}
    outputs |= {f"post_noise_final_{name}": value[0, 0] for name, value in tuning.pivot.noise.items()}
    tuned: Any = tuning.problem.generator
    outputs["P_final_minus_initial"] = tuned.P.detach() - weights["P"]
    outputs["b_final"] = tuned.b.detach()
    return outputs


ADAPTERS = {"facednerf/edit_loop": edit_loop}
