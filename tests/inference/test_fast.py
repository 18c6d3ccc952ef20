# SPDX-License-Identifier: Apache-2.0
"""Fast pictures: same answers in full precision, bounded error in lower ones, the generator left alone, graphs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops import dispatch
from facelab.bases.eg3d.config import RenderConfig
from facelab.bases.eg3d.model import TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.cameras import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.fields.triplane import TriplaneConfig
from facelab.generator import Codes, GeneratorOutput, Scene, sample_latents
from facelab.inference import fast as module
from facelab.inference.cuda_graphs import signature, with_tensors
from facelab.inference.fast import PRESETS, FastGenerator, PictureError, accelerate, measure_error
from facelab.nn.stylegan2 import AS_BUILT
from facelab.nn.stylegan2.precision import FULL
from facelab.tensors import tensors_of

TINY = TriPlaneGeneratorConfig(
    field=TriplaneConfig(channels=16, hidden=16, features=16),
    z_dim=8,
    w_dim=12,
    plane_resolution=16,
    channel_base=128,
    channel_max=16,
    superresolution="2x",
    superresolution_half=4,
)
SETTINGS = RenderConfig(samples=6, importance=6).settings(1.0, 8)


@pytest.fixture
def generator(device: torch.device) -> TriPlaneGenerator:
    return TriPlaneGenerator(TINY).to(device).eval().requires_grad_(False)


def views(count: int, device: torch.device) -> Camera:
    return orbit_camera(torch.linspace(1.4, 1.8, count), math.pi / 2, 2.7, (0.0, 0.0, 0.2)).to(device)


def codes_of(generator: TriPlaneGenerator, count: int = 2, seed: int = 0) -> Codes:
    device = next(generator.parameters()).device
    return generator.map(sample_latents(generator.latent_spec, Draws(seed), count, device))


def equal(a: GeneratorOutput, b: GeneratorOutput, **tolerance: float) -> None:
    assert len(list(tensors_of(a))) == len(list(tensors_of(b))) >= 5
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("count", [1, 2])
def test_full_precision_is_the_generator(generator: TriPlaneGenerator, device: torch.device, count: int) -> None:
    fast = accelerate(generator, "fp32", graphs=False)
    codes, cameras = codes_of(generator, count), views(count, device)
    got = fast.render(fast.scene(codes), cameras, SETTINGS)
    generator.precision = FULL  # on a GPU it is built to run its large blocks in half precision
    equal(got, generator.render(generator.scene(codes), cameras, SETTINGS), rtol=1e-4, atol=1e-5)


def test_generator_is_left_alone(generator: TriPlaneGenerator, device: torch.device) -> None:
    before = (generator.precision, generator.field_net.precision, generator.backbone.synthesis.fused_modconv)
    fast = accelerate(generator, "bf16", graphs=False, on_cpu=True)
    fast.render(fast.scene(codes_of(generator)), views(2, device), SETTINGS)
    with pytest.raises(ValueError):
        fast.scene(Codes({"w": torch.zeros(1, 3, 5, device=device)}))
    assert (generator.precision, generator.field_net.precision, generator.backbone.synthesis.fused_modconv) == before
    assert before == (AS_BUILT, "auto", "inference_only")


def test_blocks_run_in_the_asked_precision_and_fused_for_one_sample(
    generator: TriPlaneGenerator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, torch.dtype, bool, bool]] = []

    def note(name: str, block: Any) -> None:
        original = block.forward

        def forward(*arguments: Any, fused: bool = True, **options: Any) -> Any:
            x, image = original(*arguments, fused=fused, **options)
            seen.append((name, x.dtype, x.is_contiguous(memory_format=torch.channels_last), fused))
            return x, image

        monkeypatch.setattr(block, "forward", forward)

    assert generator.superresolution is not None
    note("backbone", generator.backbone.synthesis.blocks["16"])
    note("superresolution", generator.superresolution.blocks[1])
    half, full = torch.float16, torch.float32
    expected = {
        "fp32": (full, full),
        "tf32": (full, full),
        "fp16": (full, half),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "fp16_all": (half, half),
    }
    assert set(expected) == set(PRESETS)
    for name, (backbone, superresolution) in expected.items():
        for count in (1, 2):
            seen.clear()
            fast = accelerate(generator, name, graphs=False, on_cpu=True)
            fast.render(fast.scene(codes_of(generator, count)), views(count, device), SETTINGS)
            assert [(n, t) for n, t, _, _ in seen] == [("backbone", backbone), ("superresolution", superresolution)]
            assert all(fused == (count == 1) for *_, fused in seen)
            if count == 2:  # a convolution with folded styles picks its own memory order
                assert all(last == (name != "fp32") for _, _, last, _ in seen)
            forced = accelerate(generator, name, graphs=False, fused=count == 2)
            seen.clear()
            forced.scene(codes_of(generator, count))
            assert [fused for *_, fused in seen] == [count == 2]


def test_error_grows_with_coarser_numbers(generator: TriPlaneGenerator, device: torch.device) -> None:
    codes, cameras = codes_of(generator), views(2, device)
    errors = {
        name: measure_error(accelerate(generator, name, graphs=False, on_cpu=True), codes, cameras, SETTINGS)
        for name in ("fp32", "fp16", "bf16")
    }
    assert errors["fp32"].max_abs < 5e-6 and errors["fp32"].depth_max_abs < 5e-6  # rounding, where kernels differ
    assert 0 < errors["fp16"].mean_abs < errors["bf16"].mean_abs < 0.05
    assert 30 < errors["bf16"].psnr < errors["fp16"].psnr < 120


def test_error_of_pictures() -> None:
    def picture(value: float, depth: float) -> GeneratorOutput:
        one = torch.ones(1, 1, 2, 2)
        return GeneratorOutput(value * one.expand(1, 3, 2, 2), depth * one, one)

    error = PictureError.between(picture(0.2, 2.5), picture(0.0, 2.0))
    assert error.max_abs == pytest.approx(0.2) and error.mean_abs == pytest.approx(0.2)
    assert error.psnr == pytest.approx(20.0, abs=1e-4) and error.depth_max_abs == pytest.approx(0.5)
    with pytest.raises(ValueError, match="differ in shape"):
        PictureError.between(picture(0, 1), GeneratorOutput(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1)))


def test_unknown_precision() -> None:
    with pytest.raises(UserError, match=r"unknown precision 'bf61', expected one of fp32, .*bf16"):
        accelerate(torch.nn.Linear(1, 1), "bf61")


def test_without_a_gpu_there_is_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    dispatch.forget_warnings()
    generator = TriPlaneGenerator(TINY).eval()
    fast = accelerate(generator, "fp32")
    scene = fast.scene(codes_of(generator, 1))
    first = fast.render(scene, views(1, torch.device("cpu")), SETTINGS)
    fast.render(scene, views(1, torch.device("cpu")), SETTINGS)
    assert [str(w.message) for w in recwarn if "CUDA graphs" in str(w.message)] == [
        "fast rendering: CUDA graphs need a CUDA GPU, on cpu pictures are drawn without them"
    ]
    assert not first.rgb.requires_grad and bool(first.rgb.isfinite().all())


def test_everything_else_is_the_generators(generator: TriPlaneGenerator) -> None:
    fast = accelerate(generator, graphs=False)
    assert fast.config is generator.config and fast.latent_spec == {"z": (8,)}
    assert fast.device == next(generator.parameters()).device
    with pytest.raises(AttributeError, match="no_such_thing"):
        fast.no_such_thing  # noqa: B018


# ---------------------------------------------------------------- graphs


@dataclass(frozen=True)
class Nest:
    tensor: Tensor
    rest: dict[str, Any]
    name: str = "a"


def test_nests_are_taken_apart_and_rebuilt() -> None:
    nest = Nest(torch.zeros(2), {"x": (torch.ones(3), None), "n": 4})
    assert [len(t) for t in tensors_of(nest)] == [2, 3]
    doubled = with_tensors(nest, (t + 1 for t in tensors_of(nest)))
    assert doubled.tensor.tolist() == [1, 1] and doubled.rest["x"][0].tolist() == [2, 2, 2]
    assert doubled.rest["n"] == 4 and doubled.rest["x"][1] is None and doubled.name == "a"
    assert signature(nest) == signature(doubled)
    for other in (
        Nest(torch.zeros(3), nest.rest),
        Nest(torch.zeros(2, dtype=torch.float64), nest.rest),
        Nest(nest.tensor, {**nest.rest, "n": 5}),
        Nest(nest.tensor, {"n": 4, "x": (torch.ones(3), torch.ones(1))}),
        Nest(nest.tensor, nest.rest, "b"),
    ):
        assert signature(nest) != signature(other)
    assert (
        len({signature((Scene({"planes": torch.zeros(n, 2)}, n), views(1, torch.device("cpu")))) for n in (1, 2)}) == 2
    )


class FakeCapture:
    """Stands for a CUDA graph where there is no GPU: remembers what it was made for."""

    made: list[FakeCapture]

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.calls = function, 0
        type(self).made.append(self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[FakeCapture]:
    """Graphs are recorded by :class:`FakeCapture`, on what claims to be a GPU."""
    FakeCapture.made = []
    monkeypatch.setattr(module, "CapturedCall", FakeCapture)
    monkeypatch.setattr(FastGenerator, "device", torch.device("cuda"))
    monkeypatch.setattr(module, "device_switches", lambda *_: warnings.catch_warnings())
    return FakeCapture


def test_one_graph_for_equal_shapes(recorded: type[FakeCapture]) -> None:
    generator = TriPlaneGenerator(TINY).eval()
    fast, cpu = accelerate(generator, "fp32"), torch.device("cpu")
    for seed in (0, 1):
        codes = codes_of(generator, 1, seed)
        scene = fast.scene(codes)
        for angle in (0, 1):
            camera = views(2, cpu)[angle]
            equal(fast.render(scene, camera, SETTINGS), generator.render(generator.scene(codes), camera, SETTINGS))
    assert [made.calls for made in recorded.made] == [2, 4]
    fast.render(scene, views(2, cpu), SETTINGS)  # one scene, two cameras
    fast.render(scene, camera, SETTINGS.replace(samples_coarse=7))
    assert [made.calls for made in recorded.made] == [2, 4, 1, 1]
    fast.forget_graphs()
    fast.render(scene, camera, SETTINGS)
    assert len(recorded.made) == 5


def test_the_oldest_graph_goes(recorded: type[FakeCapture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_GRAPHS", 2)
    generator = TriPlaneGenerator(TINY).eval()
    fast = accelerate(generator, "fp32")
    for count in (1, 2, 1, 3, 1, 2):
        fast.scene(codes_of(generator, count))
    assert [made.calls for made in recorded.made] == [3, 1, 1, 1]


def test_random_numbers_stay_out_of_graphs(recorded: type[FakeCapture]) -> None:
    generator = TriPlaneGenerator(TINY).eval()
    fast, camera = accelerate(generator, "fp32"), views(1, torch.device("cpu"))
    scene = generator.scene(codes_of(generator, 1))
    random = SETTINGS.replace(jitter=True)
    one, other = (fast.render(scene, camera, random, Draws(seed)) for seed in (0, 1))
    equal(one, generator.render(scene, camera, random, Draws(0)))
    assert not one.rgb.equal(other.rgb)
    fast.scene(codes_of(generator, 1), Draws(3))
    assert recorded.made == []


def test_a_refused_recording_falls_back_with_one_warning(
    recorded: type[FakeCapture], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    dispatch.forget_warnings()
    tries = []

    def refuse(function: Any, *arguments: Any) -> None:
        tries.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "CapturedCall", refuse)
    generator = TriPlaneGenerator(TINY).eval()
    fast, codes = accelerate(generator, "fp32"), codes_of(generator, 1)
    for _ in range(3):
        torch.testing.assert_close(fast.scene(codes).parts["planes"], generator.scene(codes).parts["planes"])
    messages = [str(w.message) for w in recwarn if "could be recorded" in str(w.message)]
    assert len(tries) == len(messages) == 1 and "not permitted when stream is capturing" in messages[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", list(PRESETS))
def test_graphs_give_what_plain_calls_give(precision: str) -> None:
    device = torch.device("cuda")
    generator = TriPlaneGenerator(TINY).to(device).eval().requires_grad_(False)
    fast, plain = accelerate(generator, precision), accelerate(generator, precision, graphs=False)
    dispatch.forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = []
        for seed in range(3):
            codes = codes_of(generator, 1, seed)
            scene, expected = fast.scene(codes), plain.scene(codes)
            for angle in range(2):
                camera = views(2, device)[angle]
                kept.append((fast.render(scene, camera, SETTINGS), plain.render(expected, camera, SETTINGS)))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for got, wanted in kept:  # after all replays: results are not overwritten
        equal(got, wanted, rtol=tolerance, atol=tolerance)
    assert len(fast._captured) == 2 and not fast._refused


@pytest.mark.gpu
def test_weights_changed_in_place_count() -> None:
    generator = TriPlaneGenerator(TINY).to("cuda").eval().requires_grad_(False)
    fast, codes = accelerate(generator, "fp32"), codes_of(generator, 1)
    before = fast.scene(codes).parts["planes"]
    with torch.no_grad():
        generator.backbone.synthesis.blocks["16"].to_rgb.bias.add_(1.0)  # type: ignore[union-attr]
    torch.testing.assert_close(fast.scene(codes).parts["planes"], before + 1)
