# SPDX-License-Identifier: Apache-2.0
"""Do the channels of a model mean what they are called? Told by where brows and mouth lie in frontal faces.

The original's data set code feeds the mouth into channel 3 and the brows into channel 4, its README says the opposite
(:mod:`facelab.methods.cnerf.regions`). A model trained on data prepared either way looks the same from outside, so a
converted one is looked at: brows lie above the eyes, the mouth below the nose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.generator import sample_latents
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.regions import NAMES, region_index
from facelab.rendering.settings import RenderSettings

Verdict = Literal["as named", "exchanged", "undecided"]
MOUTH, BROW, EYE, NOSE = (region_index(name) for name in ("mouth", "brow", "eye", "nose"))
SIDE, SAMPLES, FACES = 48, 16, 6
TRUNCATION = 0.5
LEAST_PIXELS = 3  # of a region in a face that counts
LEAST_SHARE = 0.5  # of the faces that must tell


@dataclass(frozen=True)
class OrderReport:
    """What the faces say.

    Attributes:
        verdict: ``as named``; ``exchanged``: 3 is the brow and 4 the mouth; ``undecided``.
        faces: how many say: as named, exchanged, neither.
    """

    verdict: Verdict
    faces: tuple[int, int, int]

    @property
    def text(self) -> str:
        """A line for people."""
        named, exchanged, neither = self.faces
        seen = f"brow and mouth in {sum(self.faces)} frontal faces: {named} as named, {exchanged} exchanged, {neither} unclear"
        ending = {
            "as named": f"channel {MOUTH} is the mouth, {BROW} the brow",
            "exchanged": f"channels {MOUTH} and {BROW} were exchanged, so that their names are right",
            "undecided": f"their order could not be told; {MOUTH} is taken for the mouth, {BROW} for the brow",
        }
        return f"{seen}; {ending[self.verdict]}"


def region_rows(masks: Tensor) -> Tensor:
    """Mean row of the pixels in which a region is the strongest.

    Args:
        masks: (N, K, H, W) scores.

    Returns:
        (N, K) rows in pixels, NaN for regions of fewer than ``LEAST_PIXELS`` pixels.
    """
    channels = torch.arange(masks.shape[1], device=masks.device)[:, None, None]
    wins = (masks.argmax(1, keepdim=True) == channels).to(torch.float32)
    rows = torch.arange(masks.shape[2], device=masks.device, dtype=torch.float32)[:, None]
    count = wins.sum((2, 3))
    mean = (wins * rows).sum((2, 3)) / count.clamp_min(1)
    return torch.where(count >= LEAST_PIXELS, mean, torch.nan)


def judge(masks: Tensor) -> OrderReport:
    """Verdict on scores (N, 9, H, W) of upright frontal faces. ValueError for another number of regions."""
    if masks.ndim != 4 or masks.shape[1] != len(NAMES):
        raise ValueError(f"expected scores (N, {len(NAMES)}, H, W), got {tuple(masks.shape)}")
    rows = region_rows(masks)
    eye, nose = rows[:, EYE], rows[:, NOSE]
    # comparisons with NaN are false: such a face tells nothing
    named = int(((rows[:, BROW] < eye) & (rows[:, MOUTH] > nose)).sum())
    exchanged = int(((rows[:, MOUTH] < eye) & (rows[:, BROW] > nose)).sum())
    faces = (named, exchanged, len(rows) - named - exchanged)
    verdict: Verdict = "undecided"
    if named + exchanged >= LEAST_SHARE * len(rows) and named != exchanged:
        verdict = "as named" if named > exchanged else "exchanged"
    return OrderReport(verdict, faces)


@torch.no_grad()
def frontal_masks(generator: CNerfGenerator, faces: int = FACES, seed: int = 0) -> Tensor:
    """Rendered masks (N, K, s, s) of the average face and ``faces - 1`` others near it, seen from the front.

    The generator needs stored averages.
    """
    device = generator.average_w.device
    latents = sample_latents(generator.latent_spec, Draws(seed).at(phase="region_order"), faces - 1, device)
    w = torch.cat(
        [generator.average_w[None], torch.lerp(generator.average_w, generator.mapping(latents["z"]), TRUNCATION)]
    )
    half = (generator.config.field.box_side or 0.24) / 2
    settings = RenderSettings(
        SIDE, 1 - half, 1 + half, SAMPLES, 0, grid="centers", jitter=False, lock_view=True, max_points=2_000_000
    )
    camera = sphere_camera(torch.zeros(faces), torch.zeros(faces)).to(device)
    seen = generator.render_volume(generator.scene(generator.codes_of(w)), camera, settings, features=False)
    assert seen.semantics is not None
    return seen.semantics.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def check_order(generator: CNerfGenerator) -> OrderReport | None:
    """Look at a generator with stored averages; None for one without the nine regions."""
    if generator.config.field.regions != len(NAMES):
        return None
    return judge(frontal_masks(generator))


def exchange(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a generator or discriminator (our names) with the channels of mouth and brow exchanged."""
    order = list(range(len(NAMES)))
    order[MOUTH], order[BROW] = order[BROW], order[MOUTH]
    changed = dict(weights)
    for key, value in weights.items():
        axis = _region_axis(key)
        if axis is not None and value.shape[axis] == len(order):  # the judge of one region reads one channel
            changed[key] = value.index_select(axis, torch.tensor(order, device=value.device))
    return changed


def _region_axis(key: str) -> int | None:
    """The axis of a weight along which the regions stand, or None."""
    first = ("field_net.regions.", "classes.1.")  # local generators; scores of the classes
    inputs = ("trunks.semantics.first.weight", "trunks.semantics.0.fromrgb.weight")
    if key.startswith(first) or key.endswith((".to_semantics.weight", ".to_semantics.bias")):
        return 0
    return 1 if key in inputs else None
