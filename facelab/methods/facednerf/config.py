# SPDX-License-Identifier: Apache-2.0
"""Configuration of FaceDNeRF: defaults are those of the released program (an edit of one FFHQ face).

Nothing is trained: a run finds codes of an EG3D model for one photo (or several side by side), then tunes the model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from facelab.deviations import Deviation
from facelab.errors import UserError, nearest
from facelab.losses.score_distillation import GuidanceReference, GuidanceSettings
from facelab.ranges import check_ranges

ORIGINAL_CENTRE = 3.14 / 2  # what the original's cameras turn around
LAST_START_SEED = 2**32 - 1  # of numpy's generator
DOMAINS: dict[str, tuple[str, ...]] = {  # losses that mean nothing there: their networks know human faces alone
    "faces": (),
    "cats": ("identity", "light"),
    "other": ("identity", "light"),
}


@dataclass(frozen=True)
class WeightConfig:
    """Factors of the losses; 0: the loss is not computed."""

    identity: float = 0.6  # lamda_id: 1 - cosine of ArcFace's vectors, front view
    reconstruction: float = 0.6  # lamda_origin: LPIPS at 256 px, front view
    picture: float = 0.0  # mean squared difference, front view
    text: float = 6e-5  # lamda_diffusion: score distillation, side view; its gradient is not averaged over pixels
    clip: float = 0.0  # 1 - cosine of CLIP's vectors, side view
    light: float = 0.0  # lamda_illumination: squared distance of DPR's nine numbers, side view
    noise: float = 1e3  # keeps noise maps noise; public projectors take 1e5
    locality: float = 0.0  # tuning: keeps scenes of other codes as they were

    def __post_init__(self) -> None:
        check_ranges("weights", self, not_negative=[entry.name for entry in dataclasses.fields(self)])


@dataclass(frozen=True)
class CodesConfig:
    """First stage: codes of the frozen generator."""

    space: Literal["w", "w_plus"] = "w_plus"  # one vector for all layers, or one for each
    steps: int = 1000  # num_steps
    lr: float = 0.01
    noise_maps: bool = True  # also find the backbone's noise maps, from random ones
    start_seed: int = 123  # numpy's, of the latents whose mean code is the start
    start_samples: int = 600
    perturbation: float = 0.05  # of codes, in their deviation; falls to 0 over the first three quarters
    rampup: float = 0.05  # shares of the steps
    rampdown: float = 0.25

    def __post_init__(self) -> None:
        check_ranges(
            "codes", self, positive=("lr",), not_negative=("steps", "perturbation"), shares=("rampup", "rampdown")
        )
        if self.start_samples < 2:
            raise ValueError(f"codes.start_samples must be at least 2, got {self.start_samples}")
        if not 0 <= self.start_seed <= LAST_START_SEED:
            raise ValueError(f"codes.start_seed must be 0 or more and below 2^32, got {self.start_seed}")


@dataclass(frozen=True)
class TuneConfig:
    """Second stage: codes stay, the generator's weights move."""

    steps: int = 400  # num_steps_pti; 0: no second stage
    lr: float = 3e-4
    schedule: Literal["ramped", "constant"] = "ramped"
    parts: str = ""  # only these, commas between; empty: all that the picture depends on
    losses: Literal["same", "photo"] = "same"  # as in the first stage, or squared difference + LPIPS (public PTI)
    stop_at: float = 0.0  # with losses=photo and LPIPS: end when it is not above this; public PTI: 0.06
    locality_samples: int = 1  # random scenes per step, where weights.locality is above 0

    def __post_init__(self) -> None:
        check_ranges("tune", self, counts=("locality_samples",), positive=("lr",), not_negative=("steps", "stop_at"))


@dataclass(frozen=True)
class SideConfig:
    """Cameras of the side view: even in a rectangle around the front, at the model's distance."""

    horizontal: float = math.pi / 2  # the front, in EG3D's angles
    vertical: float = math.pi / 2
    width: float = 0.4  # whole range of the horizontal angle, radians
    height: float = 0.4  # of the vertical one, in the original's even measure

    def __post_init__(self) -> None:
        check_ranges("side", self, not_negative=("width", "height"))
        if not 0 < self.vertical < math.pi:
            raise ValueError(
                f"side.vertical must lie between 0 (above the head) and pi (below it), got {self.vertical}"
            )


@dataclass(frozen=True)
class RenderConfig:
    """Renderings during the optimisation."""

    sample_factor: float = 2.0  # sample_mult: on the model's samples per ray
    resolution: int | None = None  # nrr: side of the rendering, pixels; null: the model's
    jitter: bool = True  # random depths, from the seed

    def __post_init__(self) -> None:
        check_ranges("render", self, counts=("resolution",), positive=("sample_factor",))


@dataclass(frozen=True)
class MemoryConfig:
    """What trades time, memory and digits for each other; results stay the same but for rounding."""

    precision: Literal["tf32", "fp32"] = "tf32"  # of products of matrices and convolutions on a GPU
    superresolution: Literal["fp32", "bf16", "as_built"] = "fp32"  # as_built: half precision where the model has it
    recompute: bool = False  # keep nothing of backbone, super-resolution and diffusion's encoder for the backward
    max_points: int | None = None  # field evaluations kept for the backward at a time; null: all
    cuda_graphs: bool = True  # on a GPU, queue the kernels of a step at once and play them back at every step

    def __post_init__(self) -> None:
        check_ranges("memory", self, counts=("max_points",))


@dataclass(frozen=True)
class ReferenceConfig:
    """Switches that bring the original back; see :data:`DEVIATIONS`."""

    fresh_noise: bool = False
    light_offsets: bool = False
    sampled_light: bool = False
    light_norm: bool = False
    original_centre: bool = False
    all_losses: bool = False
    half_precision: bool = False
    weighted_backward: bool = False
    replace_non_finite: bool = False
    bilinear: bool = False


DEVIATIONS = [
    Deviation("facednerf", switch, what)
    for switch, what in (
        (
            "fresh_noise",
            "the original's second stage draws new noise maps and only normalises them; ours keeps those that were found",
        ),
        (
            "light_offsets",
            "the original adds the side view's angles to those its light function sees; ours turns the light",
        ),
        (
            "sampled_light",
            "the original projects its light from random directions at every step; ours from fixed ones",
        ),
        (
            "light_norm",
            "the original estimates light with the statistics of the picture at hand (batch norm in training mode); ours "
            "with the stored ones",
        ),
        ("original_centre", "the original's cameras turn around 3.14 / 2; ours around pi / 2"),
        ("all_losses", "the original computes losses whose weight is 0; ours leaves them out"),
        (
            "half_precision",
            "the original's super-resolution computes in half precision, also while it is tuned, and gradients are not "
            "scaled; ours as memory.superresolution says",
        ),
        (
            "weighted_backward",
            "the original multiplies by the weight of the text before the half precision encoder, where gradients vanish; "
            "ours after it",
        ),
        (
            "replace_non_finite",
            "the original replaces NaN in the gradient of the text by 0; ours stops at the last good state",
        ),
        (
            "bilinear",
            "the original shrinks pictures bilinearly without low-pass; ours averages areas",
        ),
    )
]


@dataclass(frozen=True)
class FaceDNeRFConfig:
    """A FaceDNeRF run."""

    domain: Literal["faces", "cats", "other"] = "faces"
    seed: int = 0  # of side views, depths and perturbations
    weights: WeightConfig = field(default_factory=WeightConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    side: SideConfig = field(default_factory=SideConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def guide(self) -> GuidanceSettings:
        """Settings of the text loss with the reference switches in it."""
        names = [entry.name for entry in dataclasses.fields(GuidanceReference)]
        own = self.guidance.reference
        merged = {name: getattr(own, name) or getattr(self.reference, name) for name in names}
        return dataclasses.replace(self.guidance, reference=GuidanceReference(**merged))

    @property
    def light_norm(self) -> Literal["running", "picture"]:
        """Statistics of DPR's batch normalisation."""
        return "picture" if self.reference.light_norm else "running"

    @property
    def centre(self) -> tuple[float, float]:
        """Horizontal and vertical angle of the front, radians."""
        if self.reference.original_centre:
            return ORIGINAL_CENTRE, ORIGINAL_CENTRE
        return self.side.horizontal, self.side.vertical

    @property
    def active(self) -> WeightConfig:
        """The weights without the losses that mean nothing in this domain."""
        return dataclasses.replace(self.weights, **dict.fromkeys(meaningless(self.domain), 0.0))


def meaningless(domain: str) -> tuple[str, ...]:
    """Losses that are switched off in a domain. UserError for an unknown one.

    >>> meaningless("cats")
    ('identity', 'light')
    """
    if domain not in DOMAINS:
        raise UserError(f"unknown domain {domain!r}, expected one of {', '.join(DOMAINS)}.{nearest(domain, DOMAINS)}")
    return DOMAINS[domain]
