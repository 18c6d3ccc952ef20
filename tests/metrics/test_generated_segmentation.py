# SPDX-License-Identifier: Apache-2.0
"""Generated segmentations and edits of regions, of doubles whose answers are known: stripes of paint."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.cameras.pose_sampling import PosePrior
from facelab.cameras.rays import make_depth_rays
from facelab.data.classes import NUM_CLASSES
from facelab.data.regions import REGION_CLASSES, REGIONS
from facelab.data.synthetic import SyntheticHeads
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.metrics import evaluate
from facelab.metrics.evaluate import GeneratedHeads
from facelab.metrics.generated_segmentation import (
    LabelSpace,
    known_heads_report,
    parser_report,
    synthetic_candidates,
)
from facelab.metrics.region_independence import changed_pixels, independence_report, swap_region
from facelab.rendering.settings import RenderSettings

SIZE, STRIPES = 12, 3
WIDTH = SIZE // STRIPES  # pixels
SETTINGS = RenderSettings(resolution=SIZE).deterministic()


class Stripes:
    """A generator double: three upright stripes of paint, four pixels wide.

    The texture code of a region is the grey of its stripe, in levels of 255 above black. Its shape code, where it is
    positive, takes the last column of its stripe away, which the next stripe then covers. ``leak``: the texture of
    stripe 0 also shows in the first column of stripe 1.
    """

    def __init__(self, leak: bool = False) -> None:
        self.latent_spec = {"z": (1,)}
        self.leak = leak

    def map(self, latents, conditioning=None, truncation: float = 1.0) -> Codes:
        sign = torch.sign(latents["z"])  # heads differ by their sign alone
        texture = (100 + 50 * sign)[:, None].expand(-1, STRIPES, -1)
        return Codes({"shape": sign[:, None].expand(-1, STRIPES, -1), "texture": texture})

    def scene(self, codes: Codes, noise=None) -> Scene:
        return Scene(dict(codes.values), len(codes))

    def render(self, scene: Scene, camera: Camera, settings, draws=None, guide=None) -> GeneratorOutput:
        shape, texture = scene.parts["shape"][..., 0], scene.parts["texture"][..., 0]
        regions = torch.arange(SIZE).div(WIDTH, rounding_mode="floor").repeat(len(shape), 1)
        for k in range(STRIPES - 1):
            regions[:, (k + 1) * WIDTH - 1] += (shape[:, k] > 0).long()
        grey = texture.gather(1, regions) / 127.5 - 1
        if self.leak:
            grey[:, WIDTH] = texture[:, 0] / 127.5 - 1
        labels = regions[:, None].expand(-1, SIZE, -1)
        ones = torch.ones(len(shape), 1, SIZE, SIZE)
        return GeneratorOutput(grey[:, None, None].expand(-1, 3, SIZE, -1), ones, ones, 2 * scores(labels, STRIPES) - 1)


def scores(labels: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, count).permute(0, 3, 1, 2).float()


def heads(generator=None, batch: int = 4, **options) -> GeneratedHeads:
    return GeneratedHeads(generator or Stripes(), SETTINGS, PosePrior(), 12.0, batch=batch, **options)  # type: ignore[arg-type]


SPACE = LabelSpace(("left", "middle", "right"))


def independence(generator: Stripes, count: int = 8, threshold: float = 8.0, batch: int = 3):
    return independence_report(heads(generator, batch), count, SPACE.names, SPACE.of_output, threshold)


def different(count: int) -> int:
    """Heads whose partner has another sign."""
    sign = heads().codes(range(2 * count)).values["shape"][:, 0, 0]
    return int((sign[:count] != sign[count:]).sum())


# ------------------------------------------------------------------ regions


def test_paint_that_stays_in_its_stripe_is_independent():
    found = independence(Stripes())
    odd = different(8)
    assert 0 < odd < 8, "some partners must differ, some not, or the counts below prove nothing"
    texture = found["edits"]["left"]["texture"]
    assert texture["changed_pixels_outside"] == 0 == texture["outside_share"] == texture["leak_share"]
    assert texture["changed_pixels"] > 0 and texture["heads"] == 8 and texture["unchanged_heads"] == 8 - odd
    assert texture["pixels"] == 8 * SIZE**2 and texture["absent_heads"] == 0
    # shape alone: between stripes of one grey nothing is seen to move
    shape = found["edits"]["left"]["shape"]
    assert shape["changed_pixels"] == 0 and shape["outside_share"] is None and shape["unchanged_heads"] == 8
    assert found["heads"] == 8 and found["seed"] == 0 and found["threshold_levels"] == 8


def test_shares_by_hand():
    """Both codes of the left stripe change, paint leaks into the first column of the middle one."""
    report = independence(Stripes(leak=True))
    found, odd = report["edits"]["left"], different(8)
    # texture: 3 or 4 columns of the stripe and the leaking one
    sign = heads().codes(range(16)).values["shape"][:, 0, 0]
    columns = sum(3 if sign[i] > 0 else 4 for i in range(8) if sign[i] != sign[i + 8])
    assert found["texture"]["changed_pixels"] == SIZE * (columns + odd)
    assert found["texture"]["changed_pixels_outside"] == SIZE * odd
    assert found["texture"]["outside_share"] == pytest.approx(odd / (columns + odd))
    outside = sum(12 - (3 if sign[i] > 0 else 4) for i in range(8))
    assert found["texture"]["leak_share"] == pytest.approx(odd / outside)
    # both: the mask is the stripe before or after, always its 4 columns where the sign changes
    both = found["both"]
    assert both["region_pixels"] == SIZE * sum(
        4 if sign[i] != sign[i + 8] else 3 if sign[i] > 0 else 4 for i in range(8)
    )
    assert both["changed_pixels_outside"] == SIZE * odd
    assert report["by_region"]["left"] == both["outside_share"] > 0 and report["by_region"]["right"] == 0
    every = [report["edits"][name]["both"] for name in SPACE.names]
    pooled = sum(e["changed_pixels_outside"] for e in every) / sum(e["changed_pixels"] for e in every)
    assert report["value"] == pytest.approx(pooled) == report["overall"]["both"]["outside_share"]


def test_what_lies_under_the_threshold_is_no_change():
    """Greys of heads differ by 100 levels."""
    assert independence(Stripes(), threshold=99)["overall"]["texture"]["changed_pixels"] > 0
    assert independence(Stripes(), threshold=101)["overall"]["texture"]["changed_pixels"] == 0
    a, b = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    b[0, 2, 0, 1] = 9 / 127.5
    assert changed_pixels(a, b).tolist() == [[[False, True]]] and not changed_pixels(a, b, 10).any()


def test_the_batch_does_not_matter():
    assert independence(Stripes(leak=True), batch=3) == independence(Stripes(leak=True), batch=8)


def test_swaps_one_region_of_one_part():
    mine = Codes({"shape": torch.zeros(2, 3, 4), "texture": torch.zeros(2, 3, 4), "decoder": torch.zeros(2, 4)})
    theirs = mine.map(torch.ones_like)
    found = swap_region(mine, theirs, 1, ("texture",)).values
    assert found["texture"][:, 1].eq(1).all() and found["texture"].sum() == 8 and not found["shape"].any()
    assert not mine.values["texture"].any() and not found["decoder"].any()
    with pytest.raises(ValueError, match=r"expected codes 'shape' \(N, K, W\)"):
        swap_region(Codes({"w": torch.zeros(2, 4)}), Codes({"w": torch.zeros(2, 4)}), 0, ("shape",))


# ------------------------------------------------------------------ against a parser


def read_stripes(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """A parser that is right about everything but the first column of the middle stripe, which it calls left."""
    labels = torch.arange(size[1]).div(size[1] // STRIPES, rounding_mode="floor")
    labels[size[1] // STRIPES] = 0
    return labels.expand(len(pictures), *size)


class Still(Stripes):
    """Stripes that do not move."""

    def map(self, latents, conditioning=None, truncation: float = 1.0) -> Codes:
        codes = super().map(latents)
        return Codes({**codes.values, "shape": -torch.ones_like(codes.values["shape"])})


def test_overlap_with_a_parser_by_hand():
    ticks: list[int] = []
    found = parser_report(heads(Still()), 6, read_stripes, SPACE, ticks.append)
    assert found["per_class"] == {"left": pytest.approx(4 / 5), "middle": pytest.approx(3 / 4), "right": 1.0}
    assert found["value"] == pytest.approx((4 / 5 + 3 / 4 + 1) / 3) == found["pooled"]
    assert found["agreement"] == pytest.approx(11 / 12) and found["count"] == 6 == sum(ticks)


def test_classes_become_regions():
    space = LabelSpace.of_groups(list(REGION_CLASSES.values()), REGIONS, NUM_CLASSES)
    assert [space.names[k] for k in space.of_classes(torch.tensor([0, 1, 2, 5, 9, 12, 7, 14, 18]))] == [
        "background", "face", "nose", "eye", "ear", "mouth", "brow", "hair", "neck_cloth"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="class 1 is in 0 groups"):
        LabelSpace.of_groups([(0,)], ["a"], 2)
    with pytest.raises(ValueError, match="expected 3 channels of semantics, got none"):
        SPACE.of_output(GeneratorOutput(*[torch.zeros(1, 1, 2, 2)] * 3))


def test_empty_rays_are_background_where_it_has_no_channel():
    space = LabelSpace(("background", "skin"), prepends_background=True)
    opacity = torch.tensor([[[[1.0, 0.0]]]])
    output = GeneratorOutput(torch.zeros(1, 3, 1, 2), opacity, opacity, 2 * opacity - 1)
    assert space.of_output(output).tolist() == [[[1, 0]]]


# ------------------------------------------------------------------ against known heads

REGION_SPACE = LabelSpace.of_groups(list(REGION_CLASSES.values()), REGIONS, NUM_CLASSES)


def known_heads():
    return SyntheticHeads(4, 24, grid="centers")


def test_the_head_itself_is_found_among_others():
    source = known_heads()
    known = source.batch([1, 4])
    itself = known_heads_report(known, synthetic_candidates(source, 6, 4, REGION_SPACE), REGION_SPACE)
    assert itself["value"] == 1 and set(itself["per_class"]) == set(REGIONS)
    assert itself["heads"] == 2 and itself["candidates"] == 6 and 1 / 6 < itself["random"] < 1
    others = known_heads_report(known, synthetic_candidates(source, 4, 3, REGION_SPACE, start=6), REGION_SPACE)
    assert others["random"] < 1 and others["value"] < 1


def test_labels_do_not_decide_who_is_nearest():
    """The head itself with labels all wrong is still the nearest, and its overlap is what is told."""
    source = known_heads()
    known = source.batch([1])

    def wrong(camera: Camera):
        made = source.batch([1, 2], camera)
        labels = REGION_SPACE.of_classes(made.mask)
        labels[0] = (labels[0] + 1) % len(REGIONS)
        return evaluate.views_of_synthetic(made), labels

    found = known_heads_report(known, [wrong], REGION_SPACE)
    assert found["value"] < 0.2 < found["random"]


# ------------------------------------------------------------------ depth along the axis


class AxisBoards:
    """A generator double: a board through the origin, upright in the world; its depth is along the camera's axis."""

    def __init__(self) -> None:
        self.latent_spec = {"z": (1,)}

    def map(self, latents, conditioning=None, truncation: float = 1.0) -> Codes:
        return Codes({"w": latents["z"]})

    def scene(self, codes: Codes, noise=None) -> Scene:
        return Scene(dict(codes.values), len(codes))

    def render(self, scene: Scene, camera: Camera, settings, draws=None, guide=None) -> GeneratorOutput:
        rays = make_depth_rays(camera, SIZE, "centers")
        depth = (-rays.origins[..., 2] / rays.directions[..., 2]).view(-1, 1, SIZE, SIZE)  # meets z = 0
        return GeneratorOutput(torch.zeros(len(camera), 3, SIZE, SIZE), depth, torch.ones_like(depth))


@pytest.mark.parametrize("axis_depth", [True, False])
def test_depth_along_the_axis_is_turned_into_distances(axis_depth: bool):
    """The board fits itself from both sides only if its depths are understood."""
    wide = replace(heads(AxisBoards(), axis_depth=axis_depth), fov=60.0, settings=SETTINGS.replace(grid="centers"))
    cameras = evaluate.view_pair(PosePrior(), 60.0)
    error = evaluate.consistency_report(wide.chunks(3), cameras, "centers")["mean_error"]
    assert (error < 2e-3) if axis_depth else (error > 5e-3)
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 60.0)
    views = next(iter(wide.chunks(2)))(camera)
    if axis_depth:  # in front of the board: 1 along the axis
        lengths = make_depth_rays(camera, SIZE).directions.norm(dim=-1).view(1, SIZE, SIZE)
        torch.testing.assert_close(views.depth, lengths.expand(2, -1, -1), rtol=1e-5, atol=0)
