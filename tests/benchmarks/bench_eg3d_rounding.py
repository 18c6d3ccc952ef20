# SPDX-License-Identifier: Apache-2.0
"""What TF32 and halves do to the gradient norms of EG3D's training, and where: FFHQ at 512 px, random weights.

    python tests/benchmarks/bench_eg3d_rounding.py [--out FILE] [--steps 6] [--rays 64] [--tiny]

The same steps are run in each way, with learning rates of 0, so that all see the same weights and random numbers. A row
holds, for each phase, the relative difference of every step's gradient norm to that of fp32 and of their means. ``exact``
names the networks whose convolutions are computed without TF32, forward and backward; their marked blocks stay halves
where the way has halves. The second row of fp32 shows what the order of sums does. ``--tiny`` tests the program on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_eg3d import TINY, Measured, Sizes, Variant
from measuring import Report, Row, versions
from short_runs import readings_of

from cuda_ops import convolution_derivatives as derivatives

PHASES = ("g_main", "g_reg", "d_main")
TF32, FIELDS_EXACT, FP32 = "train.precision=tf32", "train.precision=tf32_convolutions", "train.precision=fp32"
NONE, HALVES, LAST = "train.half=none", "train.half=fp16", "train.channels_last=true"


@dataclass(frozen=True)
class Way:
    """Settings of a run, and the networks whose convolutions are exact."""

    settings: tuple[str, ...]
    exact: tuple[str, ...] = ()


WAYS = {
    "fp32": Way((FP32, NONE)),
    "fp32, again": Way((FP32, NONE)),
    "tf32": Way((TF32, NONE)),
    "tf32, field in fp32": Way((FIELDS_EXACT, NONE)),
    "tf32+fp16+channels_last": Way((TF32, HALVES, LAST)),
    "tf32+fp16+channels_last, field in fp32": Way((FIELDS_EXACT, HALVES, LAST)),
    "tf32+fp16+channels_last, field and backbone in fp32": Way((FIELDS_EXACT, HALVES, LAST), ("backbone",)),
    "tf32+fp16+channels_last, field, backbone and discriminator in fp32": Way(
        (FIELDS_EXACT, HALVES, LAST), ("backbone", "discriminator")
    ),
    "fp32+fp16+channels_last": Way((FP32, HALVES, LAST)),
}


@contextmanager
def no_tf32(wanted: bool = True) -> Iterator[None]:
    """Convolutions without TF32."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class ExactConvolutions:
    """Convolutions of chosen networks forget TF32, in their forward pass and in all derivatives of it.

    A :class:`~cuda_ops.convolution_derivatives.Geometry` travels from the forward pass to its derivatives; while
    :meth:`patched` is entered each one remembers in ``exact`` whether it was made inside such a network.
    """

    def __init__(self) -> None:
        self.inside = 0

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The three linear maps look at the geometry."""
        kind, gradient = derivatives.Geometry, derivatives._WeightGradient
        made, adjoint, apply, weight = kind.__init__, kind.adjoint, kind.apply, gradient.forward

        def remember(geometry: Any, *args: Any, **options: Any) -> None:
            made(geometry, *args, **options)
            object.__setattr__(geometry, "exact", self.inside > 0)

        def turned(geometry: Any, *shapes: Any) -> Any:
            result = adjoint(geometry, *shapes)
            object.__setattr__(result, "exact", geometry.exact)
            return result

        def applied(geometry: Any, x: Tensor, by: Tensor) -> Tensor:
            with no_tf32(geometry.exact):
                return apply(geometry, x, by)

        def by_weight(ctx: Any, grad: Tensor, x: Tensor, shape: torch.Size, geometry: Any) -> Tensor:
            with no_tf32(geometry.exact):
                return weight(ctx, grad, x, shape, geometry)

        kind.__init__, kind.adjoint, kind.apply = remember, turned, applied  # type: ignore[method-assign]
        gradient.forward = staticmethod(by_weight)  # type: ignore[method-assign]
        try:
            yield
        finally:
            kind.__init__, kind.adjoint, kind.apply = made, adjoint, apply  # type: ignore[method-assign]
            gradient.forward = staticmethod(weight)  # type: ignore[method-assign]

    def watch(self, network: nn.Module) -> None:
        """From here on this network's convolutions are exact."""
        entered: list[Any] = []

        def enter(*_: Any) -> None:
            entered.append(no_tf32())
            entered[-1].__enter__()
            self.inside += 1

        def leave(*_: Any) -> None:
            self.inside -= 1
            entered.pop().__exit__(None, None, None)

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave)


class Watched(Measured):
    """EG3D whose chosen networks are exact."""

    def __init__(self, way: Way, convolutions: ExactConvolutions, on_cpu: bool) -> None:
        super().__init__(Variant(way.settings), on_cpu)
        self.way, self.convolutions = way, convolutions

    def build(self, config: Any) -> Any:
        models = super().build(config)
        generator: Any = models["generator"]
        networks = {"backbone": generator.backbone.synthesis, "discriminator": models["discriminator"]}
        for name in self.way.exact:
            self.convolutions.watch(networks[name])
        return models


def norms_of(way: Way, rays: int, steps: int, sizes: Sizes, device: torch.device) -> dict[str, list[float]]:
    """Gradient norms of every step, by phase. The density regulariser is as exact as the way, at every step."""
    overrides = [
        *way.settings,
        f"neural.initial={rays}",
        f"train.batch_size={sizes.train_batch}",
        f"train.batch_chunk={sizes.train_batch}",
        f"train.max_steps={steps}",
        "train.workers=0",
        "train.exact_density=false",
        "optim.generator_lr=0.0",
        "optim.discriminator_lr=0.0",
        "loss.density_every=1",
        "loss.r1_every=1000000",
        "loss.blur_fade_kimg=0",
        "log.every=1",
        "log.samples_every=0",
        "log.progress=false",
    ]
    convolutions = ExactConvolutions()
    with convolutions.patched():
        method = Watched(way, convolutions, on_cpu=device.type == "cpu")
        rows = readings_of(method, sizes.config(*overrides), device)
    return {phase: [row[f"grad_norm/{phase}"] for row in rows] for phase in PHASES}


def against(norms: dict[str, list[float]], exact: dict[str, list[float]]) -> Row:
    """Relative differences of each step and of the means, by phase."""
    result: Row = {}
    for phase, values in norms.items():
        true = exact[phase]
        steps = [a / b - 1 for a, b in zip(values, true, strict=True)]
        result[phase] = {"mean": sum(values) / sum(true) - 1, "steps": steps, "fp32": true}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=6, help="of each run [6]")
    parser.add_argument("--rays", type=int, help="side of the rendering [64]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to test this program")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("bench_eg3d_rounding: no CUDA GPU, nothing to measure; --tiny tests the program on the CPU")
        return 0
    device, sizes = torch.device("cpu" if options.tiny else "cuda"), TINY if options.tiny else Sizes()
    rays = options.rays or (16 if options.tiny else 64)
    report = Report(options.out, {"benchmark": "eg3d_rounding", "tiny": options.tiny, **versions(device)})
    exact: dict[str, list[float]] = {}

    def measured(way: Way) -> Row:
        norms = norms_of(way, rays, options.steps, sizes, device)
        exact.update(exact or norms)
        return {"against_fp32": against(norms, exact)}

    for name, way in WAYS.items():
        case = {"case": "gradient_norms", "way": name, "batch": sizes.train_batch, "rays_side": rays}
        report.attempt(case, functools.partial(measured, way))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
