# SPDX-License-Identifier: Apache-2.0
"""Pictures at speed: a generator in a lower precision and as CUDA graphs, and what that costs in exactness.

    fast = accelerate(generator, "fp16")
    picture = fast.render(fast.scene(codes), camera, settings)
    print(measure_error(fast, codes, camera, settings))

A wrapped generator answers as the generator does (:class:`facelab.generator.Generator`), leaves it as it is, and is
for inference only: it records no gradients.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cuda_ops.dispatch import warn_once
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.errors import UserError, nearest
from facelab.fields.output import BoundField
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inference.cuda_graphs import CapturedCall, signature
from facelab.nn.stylegan2.precision import Precision
from facelab.rendering.settings import RenderSettings
from facelab.training.precision import device_switches

KEPT_GRAPHS = 6  # of a generator; the one used longest ago goes


@dataclass(frozen=True)
class Preset:
    """What a precision means for the parts of a generator; parts that a generator lacks are passed over.

    Attributes:
        blocks: convolution blocks of backbone and super-resolution (``generator.precision``).
        field: of the fused renderer or the field's kernels (``generator.field_net.precision``), on a GPU.
        tf32: matrix products and convolutions of full precision may round their operands to TF32.
        about: one line for --help.
    """

    blocks: Precision
    field: Literal["fp32", "tf32", "fp16"]
    tf32: bool
    about: str


PRESETS: dict[str, Preset] = {
    "fp32": Preset(Precision(blocks="none"), "fp32", False, "exact, CUDA graphs only"),
    "tf32": Preset(Precision(blocks="none", channels_last=True), "tf32", True, "TF32 everywhere"),
    "fp16": Preset(
        Precision(torch.float16, "marked", channels_last=True), "fp16", True, "fp16 where built for it, else TF32"
    ),
    "bf16": Preset(Precision(torch.bfloat16, "all", channels_last=True), "fp16", True, "all blocks in bf16"),
    "fp16_all": Preset(
        Precision(torch.float16, "all", channels_last=True),
        "fp16",
        True,
        "all blocks in fp16, also where not built for it",
    ),
}
DEFAULT = "fp16"


class FastGenerator:
    """A generator with another precision and CUDA graphs; made by :func:`accelerate`.

    ``scene`` and ``render`` are one graph each for every combination of shapes and settings, recorded at first use:
    a scene rendered from many cameras costs its planes once. Without a graph run (all in the same precision):
    everything on a CPU, with one warning; random depths, density noise or noise maps and a ``guide``; what CUDA
    refuses to record, with one warning. Meshes and other users of ``field`` and ``map`` get the generator's own
    precision. Every other attribute is the generator's.

    Attributes:
        generator: the wrapped one.
        preset: see :data:`PRESETS`.
        graphs: whether graphs are recorded.
        fused: whether styles are folded into the weights of one grouped convolution; None: for one sample only.
    """

    def __init__(self, generator: Any, preset: Preset, graphs: bool = True, fused: bool | None = None) -> None:
        self.generator, self.preset, self.graphs, self.fused = generator, preset, graphs, fused
        self._captured: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._modulated = [module for module in generator.modules() if hasattr(module, "fused_modconv")]

    def __getattr__(self, name: str) -> Any:
        if name == "generator":  # not set yet: copying and unpickling ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.generator, name)

    @property
    def latent_spec(self) -> Mapping[str, tuple[int, ...]]:
        """Of the generator."""
        return self.generator.latent_spec

    @property
    def device(self) -> torch.device:
        """Where the generator lives."""
        return next(self.generator.parameters()).device

    def map(self, latents: Mapping[str, Tensor], *arguments: Any, **options: Any) -> Codes:
        """As the generator, in its own precision."""
        with torch.no_grad():
            return self.generator.map(latents, *arguments, **options)

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        """As the generator."""
        with torch.no_grad(), self._mode(len(codes)):
            if noise is not None:
                return self.generator.scene(codes, noise)
            return self._run("scene", self.generator.scene, codes)

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """As the generator; settings with random numbers, and guides, run without a graph."""

        def picture(scene: Scene, camera: Camera) -> GeneratorOutput:
            return self.generator.render(scene, camera, settings)

        with torch.no_grad(), self._mode(max(scene.count, len(camera))):
            if guide is not None or self._is_random(settings):
                return self.generator.render(scene, camera, settings, draws, guide)
            return self._run(("render", settings), picture, scene, camera)

    def field(self, scene: Scene, *arguments: Any) -> BoundField:
        """As the generator, in its own precision."""
        return self.generator.field(scene, *arguments)

    def exact(self) -> FastGenerator:
        """The same generator in full precision, without graphs."""
        return FastGenerator(self.generator, PRESETS["fp32"], graphs=False)

    def forget_graphs(self) -> None:
        """Free the memory of all graphs."""
        self._captured.clear()
        self._refused.clear()

    def _is_random(self, settings: RenderSettings) -> bool:
        noise = getattr(getattr(self.generator, "config", None), "superresolution_noise", "none")
        return settings.jitter or settings.noisy or noise == "random"

    def _run(self, name: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function as a graph, or plainly where that cannot be."""
        device = self.device
        if not self.graphs:
            return function(*arguments)
        if device.type != "cuda":
            warn_once(f"fast rendering: CUDA graphs need a CUDA GPU, on {device.type} pictures are drawn without them")
            return function(*arguments)
        # weights that were moved lie elsewhere, and a graph reads them where they were
        key = (name, next(self.generator.parameters()).data_ptr(), signature(arguments))
        if key in self._refused:
            return function(*arguments)
        if key not in self._captured:
            try:
                self._captured[key] = CapturedCall(function, *arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warn_once(f"fast rendering: no CUDA graph could be recorded ({reason}); pictures are drawn without it")
                self._refused.add(key)
                return function(*arguments)
            if len(self._captured) > KEPT_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key](*arguments)

    @contextmanager
    def _mode(self, count: int) -> Iterator[None]:
        """The generator in this preset's precision while ``count`` samples run; afterwards as before."""
        generator, device = self.generator, self.device
        with ExitStack() as stack:
            stack.enter_context(device_switches("tf32" if self.preset.tf32 else "fp32", device))
            if isinstance(getattr(generator, "precision", None), Precision):
                stack.enter_context(_changed(generator, "precision", self.preset.blocks))
            field = getattr(generator, "field_net", None)
            if device.type == "cuda" and hasattr(field, "precision"):
                stack.enter_context(_changed(field, "precision", self.preset.field))
            # one sample: a plain convolution with styled weights; more: these would be grouped, which is slow
            fused = count == 1 if self.fused is None else self.fused
            for module in self._modulated:
                stack.enter_context(_changed(module, "fused_modconv", fused))
            yield


@contextmanager
def _changed(thing: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def accelerate(
    generator: Any,
    precision: str = DEFAULT,
    *,
    graphs: bool = True,
    on_cpu: bool = False,
    fused: bool | None = None,
) -> FastGenerator:
    """A generator for fast pictures, with the generator's own methods.

    Args:
        generator: a :class:`facelab.generator.Generator`; it stays as it is.
        precision: a name of :data:`PRESETS`.
        graphs: record CUDA graphs.
        on_cpu: lower the blocks on a CPU too, slowly: to see there what a precision costs in exactness.
        fused: see :class:`FastGenerator`.

    Raises:
        UserError: another precision; one line with the nearest name.
    """
    if precision not in PRESETS:
        hint = nearest(precision, PRESETS)
        raise UserError(f"unknown precision {precision!r}, expected one of {', '.join(PRESETS)}.{hint}")
    preset = PRESETS[precision]
    if on_cpu:
        preset = replace(preset, blocks=replace(preset.blocks, on_cpu=True))
    return FastGenerator(generator, preset, graphs, fused)


@dataclass(frozen=True)
class PictureError:
    """How far pictures of values in [-1, 1] are from exact ones.

    Attributes:
        max_abs, mean_abs: of the differences of rgb.
        psnr: dB with peak 2, infinite for equal pictures.
        depth_max_abs: of the depth, scene units.
    """

    max_abs: float
    mean_abs: float
    psnr: float
    depth_max_abs: float

    @staticmethod
    def between(got: GeneratorOutput, exact: GeneratorOutput) -> PictureError:
        """ValueError for pictures of different sizes."""
        if got.rgb.shape != exact.rgb.shape:
            raise ValueError(f"pictures differ in shape: {tuple(got.rgb.shape)} and {tuple(exact.rgb.shape)}")
        difference = (got.rgb.double() - exact.rgb.double()).abs()
        square = float(difference.square().mean())
        psnr = math.inf if square == 0 else 10 * math.log10(4 / square)
        depth = (got.depth.double() - exact.depth.double()).abs().max()
        return PictureError(float(difference.max()), float(difference.mean()), psnr, float(depth))


def measure_error(
    fast: FastGenerator, codes: Codes, camera: Camera, settings: RenderSettings, draws: Draws | None = None
) -> PictureError:
    """The error of whole pictures (scene and rendering) against the same generator in full precision.

    Args:
        fast: what is judged.
        codes: of N scenes, on the generator's device.
        camera: N cameras there.
        settings: of both.
        draws: for settings with random numbers; the same ones enter both.
    """
    got, exact = (g.render(g.scene(codes), camera, settings, draws) for g in (fast, fast.exact()))
    return PictureError.between(got, exact)
