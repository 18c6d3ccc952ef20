# SPDX-License-Identifier: Apache-2.0
"""EG3D's renderer alone: plain and fused, forward and backward, and which shapes of the kernels' work are fastest.

Part of ``bench_eg3d.py``, which says how it is called.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import Report, Row, timed

from cuda_ops import triplane_launch
from cuda_ops.triplane_launch import Tuning
from cuda_ops.triplane_render import channels_last
from facelab.bases.eg3d.training import Eg3d
from facelab.cameras.camera import Camera
from facelab.cameras.rays import Rays, make_rays
from facelab.draws import Draws
from facelab.fields.triplane import TriplaneField
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import render_midpoints
from facelab.rendering.settings import RenderSettings
from facelab.rendering.triplane import render_triplane
from facelab.training.precision import device_switches

PRECISIONS = ("fp32", "tf32", "fp16")
NO_GPU = "the fused renderer needs a CUDA GPU"


@dataclass(frozen=True)
class RendererCase:
    """Random planes, rays and a field on the device."""

    field: TriplaneField
    planes: Tensor
    rays: Rays
    settings: RenderSettings
    weights: Tensor  # of the features, for a loss

    @classmethod
    def make(cls, config: Any, side: int, camera: Camera, device: torch.device) -> RendererCase:
        """For a resolved configuration, ``side`` x ``side`` rays of each camera."""
        architecture = Eg3d().generator_config(config)
        source = torch.Generator().manual_seed(0)
        field = TriplaneField(architecture.field)
        field.reset_parameters(source)
        size, channels, n = architecture.plane_resolution, architecture.field.channels, len(camera)
        planes = torch.randn(n, 3, channels, size, size, generator=source).to(device)
        weights = torch.randn(n, side**2, architecture.field.features, generator=source).to(device)
        settings = config.render.settings(config.model.box_side, side)
        return cls(field.to(device), planes, make_rays(camera, side, "centers"), settings, weights)

    @property
    def about(self) -> Row:
        """What every row says."""
        samples = [self.settings.samples_coarse, self.settings.samples_fine]
        return {"batch": len(self.planes), "rays": len(self.rays), "samples": samples}

    def plain(self, settings: RenderSettings | None = None, draws: Draws | None = None) -> RenderOutput:
        field, planes = self.field, self.planes
        return render_midpoints(lambda points, _: field(points, planes), self.rays, settings or self.settings, draws)

    def fused(
        self, planes: Tensor, precision: Any, settings: RenderSettings | None = None, draws: Draws | None = None
    ) -> RenderOutput:
        self.field.precision = precision
        return render_triplane(planes, self.rays, self.field, settings or self.settings, draws)

    def gradients(self, render: Callable[[RenderSettings, Draws], RenderOutput]) -> tuple[Tensor, ...]:
        """Of planes and decoder, with random depths, as in training."""
        features = render(self.settings.replace(jitter=True), Draws(0)).features
        assert features is not None
        return torch.autograd.grad((features * self.weights).sum(), [self.planes, *self.field.parameters()])

    def plain_gradients(self, recompute: bool) -> tuple[Tensor, ...]:
        return self.gradients(lambda settings, draws: self.plain(settings.replace(recompute=recompute), draws))

    def fused_gradients(self, precision: str) -> tuple[Tensor, ...]:
        return self.gradients(lambda settings, draws: self.fused(self.planes, precision, settings, draws))


def bench_renderer(
    report: Report, case: RendererCase, device: torch.device, repeats: int, warmup: int, original: Mapping[str, Any]
) -> None:
    """Coarse samples, resampling, fine samples, compositing; then with backward."""

    def measured(name: str, work: Callable[[], Any], **more: Any) -> Row:
        row = {**timed(work, device, repeats, warmup), **more}
        ms, gib = original[name]
        return {**row, "original_milliseconds": ms, "original_gib": gib, "ratio": row["milliseconds"] / ms}

    def forward(implementation: str) -> Row:
        work: Callable[[], Any] = case.plain
        with torch.no_grad():
            exact = case.plain()
            if implementation != "plain":
                work = functools.partial(case.fused, channels_last(case.planes), implementation)
            got = work()
            pairs = {"features": (got.features, exact.features), "depth": (got.depth, exact.depth)}
            error = {key: float((a - b).abs().max()) for key, (a, b) in pairs.items()}
            del got, exact, pairs
            return measured("renderer_forward", work, max_error=error)

    def both(precision: str) -> Row:
        """The error of a gradient is the norm of the difference over that of the exact one."""
        exact, got = case.plain_gradients(False), case.fused_gradients(precision)
        parts = [float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
        error = {"planes": parts[0], "decoder": max(parts[1:])}
        del exact, got
        work = functools.partial(case.fused_gradients, precision)
        return measured("renderer_forward_backward", work, relative_error=error)

    for implementation in ("plain", *PRECISIONS):
        row = {"case": "renderer_forward", **case.about, "implementation": implementation}
        if implementation != "plain" and device.type != "cuda":
            report.add({**row, "failed": NO_GPU})
        else:
            report.attempt(row, functools.partial(forward, implementation))
    case.planes.requires_grad_()
    row = {"case": "renderer_forward_backward", **case.about}
    for precision, recompute in itertools.product(("fp32", "tf32"), (False, True)):
        about = {**row, "implementation": "plain", "precision": precision, "recompute": recompute}
        work = functools.partial(case.plain_gradients, recompute)
        with device_switches(precision, device):
            report.attempt(about, functools.partial(measured, "renderer_forward_backward", work))
    for precision in PRECISIONS if device.type == "cuda" else ():
        report.attempt({**row, "implementation": "fused", "precision": precision}, functools.partial(both, precision))


def tunings() -> Iterator[tuple[str, Tuning]]:
    """What to try: ``forward`` or ``backward``, and the shape of the work. Each takes some seconds to compile."""
    for warps, registers in ((4, None), (4, 168), (4, 128), (8, None), (8, 128)):
        yield "forward", Tuning(warps=warps, registers=registers)
    for rays in (1, 16):
        yield "forward", Tuning(rays=rays)
    for block, registers in itertools.product((32, 64, 128), (None, 168)):
        yield "backward", Tuning(block=block, backward_registers=registers)
    yield "backward", Tuning(programs=4224)


def sweep_renderer(report: Report, case: RendererCase, device: torch.device, precisions: tuple[str, ...]) -> None:
    """Every tuning in every precision, ``backward`` with its forward; the fastest of each at the end."""
    before = triplane_launch.TUNING
    best: dict[tuple[str, str], tuple[float, Tuning]] = {}
    planes = channels_last(case.planes.detach())
    case.planes.requires_grad_()

    from triton.runtime.errors import OutOfResources

    def measured(part: str, precision: str, tuning: Tuning) -> Row:
        triplane_launch.TUNING = tuning
        try:
            return run(part, precision, tuning)
        except OutOfResources as error:
            return {"failed": str(error).splitlines()[0]}

    def run(part: str, precision: str, tuning: Tuning) -> Row:
        work: Callable[[], Any] = functools.partial(case.fused_gradients, precision)
        with torch.set_grad_enabled(part == "backward"):
            if part == "forward":
                work = functools.partial(case.fused, planes, precision)
            row = timed(work, device, 10, 3)
        if row["milliseconds"] < best.get((part, precision), (float("inf"),))[0]:
            best[part, precision] = row["milliseconds"], tuning
        return row

    try:
        for precision, (part, tuning) in itertools.product(precisions, tunings()):
            row = {"case": f"sweep_{part}", **case.about, "precision": precision, "tuning": asdict(tuning)}
            report.attempt(row, functools.partial(measured, part, precision, tuning))
    finally:
        triplane_launch.TUNING = before
    for (part, precision), (milliseconds, tuning) in best.items():
        row = {"case": f"fastest_{part}", **case.about, "precision": precision, "tuning": asdict(tuning)}
        report.add({**row, "milliseconds": milliseconds})
