# SPDX-License-Identifier: Apache-2.0
"""FENeRF's inversion loop, and the pieces of FaceDNeRF's projector: start, schedules, noise maps, perceptual distance."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.bases.eg3d.keys import mapping_rules
from facelab.cameras import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.draws import TapeDraws
from facelab.generator import Codes
from facelab.inversion import schedules, terms
from facelab.inversion.loop import Inversion, InversionSettings
from facelab.inversion.noise import noise_correlation, normalise_noise
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.inversion.start import numpy_latents, start_statistics
from facelab.losses.perceptual import LpipsVgg, perceptual_distance
from facelab.nn.stylegan2 import MappingNetwork
from tests.golden.adapters.siren_fields import build, pixels, settings
from tests.golden.adapters.stylegan2 import fill
from tests.golden.harness import Arrays, Meta, case_weights, given

KINDS = ("frequencies", "phase_shifts")
OFFSETS = ("frequency_offsets", "phase_shift_offsets")


@dataclass(frozen=True)
class StepTape(TapeDraws):
    """Numbers recorded for each step: ``<step>/<name>``."""

    def _replay(self, name: str, shape: Any, device: Any, dtype: Any) -> Tensor:
        return TapeDraws(tape=self.tape)._replay(f"{self.step}/{name}", shape, device, dtype)


def step_tape(arrays: Arrays) -> StepTape:
    """``in_randNN_iterI_noise_geo_frequencies``, ``..._jitter_uniform`` under our names of draws."""
    found: dict[str, Any] = {}
    for key, value in arrays.items():
        if key.startswith("in_rand"):
            step, what = key.split("_iter")[1].split("_", 1)
            found[f"{step}/{what}"] = value
    tape = {}
    for key in found:
        step = key.split("/")[0]
        for name in ("geo", "app"):
            tape[f"{step}/perturb/{name}"] = torch.stack([found[f"{step}/noise_{name}_{k}"] for k in KINDS], 1)
        tape[f"{step}/jitter"] = found[f"{step}/jitter_uniform"]
    return StepTape(tape=tape)


def inversion_steps(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """The first steps: losses, offsets and the last frame."""
    c, optimiser = meta["config"], meta["optimiser"]
    assert c["lambda_percept"] == 0 and not c["hier"]
    generator = build(meta).requires_grad_(False)
    with torch.no_grad():
        codes = generator.map({name: arrays[f"in_z_{name}_for_average"] for name in ("geo", "app")})
        base = codes.map(lambda v: v.mean(0, keepdim=True))
    camera = Camera.on_sphere(c["v_mean"], c["h_mean"], meta["render"]["fov"])
    weights = {"seg": c["lam"][0], "img": c["lam"][1], "norm": c["lambda_norm"]}
    functions = {"seg": terms.scores_term, "img": terms.picture_term, "norm": terms.offsets_term}
    problem = Problem(
        generator,
        Target(arrays["in_image"], camera, arrays["in_seg_target"]),
        {name: Weighted(weight, functions[name]) for name, weight in weights.items()},
        settings(meta),
        step_tape(arrays),
    )
    every, factor = optimiser["step_lr"]
    rate = functools.partial(schedules.stepped_rate, base=optimiser["adam_lr"], every=every, factor=factor)
    choice = InversionSettings(
        c["iters"],
        rate,
        weight_decay=optimiser["weight_decay"],
        perturbation=lambda step, _: schedules.falling_noise(step, c["total"]),
        keep_best=False,
    )
    inversion = Inversion(problem, base, choice, free=None if c["which"] == "all" else [c["which"]])
    reports = [inversion.advance() for _ in range(c["iters"])]
    rows = [torch.cat([r.total, r.parts["seg"], r.parts["img"], r.parts["norm"]]) for r in reports]
    outputs = {
        "out_losses_total_seg_img_norm": torch.stack(rows),
        "out_first_frame_last_iteration": pixels(reports[-1].output),
    }
    for name, value in base.values.items():
        offset = inversion.variables.get(f"code/{name}", torch.zeros_like(value)).detach()
        for index in range(2):
            outputs[f"out_w_{name}_{KINDS[index]}"] = value[:, index]
            outputs[f"out_w_{name}_{OFFSETS[index]}"] = offset[:, index]
    return outputs


class Mapped:
    """Nothing but the mapping of a generator."""

    def __init__(self, network: MappingNetwork) -> None:
        self.network = network

    def map(self, latents: dict[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        return Codes({"w": self.network(latents["z"], conditioning, truncation)})


@given()
def w_stats(meta: Meta, arrays: Arrays) -> dict[str, Tensor | float]:
    """Average and deviation of the codes that FaceDNeRF's projector starts from."""
    c, camera = meta["config"], meta["camera"]
    own = {"embed_features": meta["mapping"]["embed_features"], "layer_features": meta["mapping"]["layer_features"]}
    own |= {"lr_multiplier": meta["mapping"]["lr_multiplier"], "activation": meta["mapping"]["activation"]}
    network = MappingNetwork(c["z_dim"], c["c_dim"], c["w_dim"], c["num_ws"], num_layers=c["num_layers"], **own)
    fill(network, mapping_rules(), {"detfill_seed": meta["detfill"]["seed"], "rules": meta["detfill"]["rules"]})
    view = orbit_camera(
        camera["horizontal_mean"], camera["vertical_mean"], camera["radius"], camera["pivot"], focal=camera["focal"]
    )
    z = numpy_latents(meta["z_seed"], meta["N"], c["z_dim"])
    label = view.label().float().expand(len(z), -1)
    generator: Any = Mapped(network)
    found = start_statistics(generator, {"z": z}, label, repeated=("w",))
    with torch.no_grad():
        first = generator.map({"z": z}, label).values["w"]
    return {
        "w_avg": found.average.values["w"][:, :1],
        "w_std": torch.tensor(found.deviation["w"], dtype=torch.float64),
        "w_first4": first[:4, :1],
    }


@given()
def projector_schedules(meta: Meta, arrays: Arrays) -> dict[str, np.ndarray]:
    """Learning rate and scale of the perturbation of every step."""
    outputs = {}
    for i, (steps, base, deviation) in enumerate(meta["configs"]):
        ramps = (meta["lr_rampdown"], meta["lr_rampup"])
        noise = (meta["initial_noise_factor"], meta["noise_ramp"])
        outputs[f"lr{i}"] = np.array([schedules.ramped_rate(s, steps, base, *ramps) for s in range(steps)])
        scales = [schedules.perturbation(s, steps, deviation, *noise) for s in range(steps)]
        outputs[f"wnoise{i}"] = np.array(scales)
    return outputs


@given("buf*")
def noise_reg(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Value, gradient and normalisation of noise maps."""
    maps = [arrays[f"buf{i}"][None, None].clone().requires_grad_() for i in range(len(meta["sizes"]))]
    total = sum((noise_correlation(m).sum() for m in maps), torch.zeros(()))
    outputs = {"reg": total.detach()}
    for i, gradient in enumerate(torch.autograd.grad(total, maps)):
        outputs[f"grad{i}"] = gradient[0, 0]
    for i, value in enumerate(m.detach() for m in maps):
        normalise_noise(value)
        outputs[f"norm{i}"] = value[0, 0]
    return outputs


def pattern(shape: list[int], a: float, b: float, d: float, amplitudes: dict[str, float]) -> Tensor:
    """The case's ``pattern``."""
    n, c, i, j = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in shape), indexing="ij")
    waves = amplitudes["A"] * np.sin(a * (i + 1) + 0.7 * c + 0.3 * n) * np.cos(b * (j + 1) - 0.5 * c)
    ripples = amplitudes["B"] * np.cos(d * (i + 1) * (j + 1) / 100 + c)
    return torch.from_numpy((amplitudes["C"] + waves + ripples).astype(np.float32))


@given()
def lpips_vgg(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Distance, its gradient for values in 0..255, and the five taps."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:]), start=1):
        shapes |= {f"layers.conv{i}.weight": (after, before, 3, 3), f"layers.conv{i}.bias": (after,)}
    shapes |= {f"lpips{i}": (width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    weights = {k: v.abs() if k.startswith("lpips") else v for k, v in case_weights(meta, shapes).items()}
    net = LpipsVgg(weights)
    x, y = (pattern(meta["input_shape"], *meta[k], meta["pattern_amplitudes"]) for k in ("ax", "ay"))
    x = ((x + 1) * 127.5).requires_grad_()
    distance = perceptual_distance(net, y, x / 127.5 - 1)
    gradient = torch.autograd.grad(distance.sum(), x)[0]
    with torch.no_grad():
        taps = net.taps(x / 127.5 - 1)
    return {"distance": distance.detach(), "grad_x": gradient, "relu_std": torch.stack([tap.std() for tap in taps])}


ADAPTERS = {
    "facednerf/lpips_vgg": lpips_vgg,
    "facednerf/noise_reg": noise_reg,
    "facednerf/schedules": projector_schedules,
    "facednerf/w_stats": w_stats,
    "fenerf/inversion_steps": inversion_steps,
}
