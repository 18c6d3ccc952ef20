# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and error of the FiLM-SIREN field: fused kernels beside the plain twin.

    python tests/benchmarks/bench_siren.py [--out FILE] [--only fused,fp32] [--case big] [--tiles]

Needs a CUDA GPU and torch alone. Medians by CUDA events after warm-up; forward without gradients, and
forward + backward with gradients of every weight, the grid and the FiLM codes; peak memory is what the
work takes beyond the inputs. TFLOP/s count the matrix products of the released field once for forward
and three times for forward + backward, whatever an implementation recomputes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_ops import film_siren, film_siren_backward, timing
from facelab.fields.siren import Film, SirenConfig, SirenField

CASES = {  # scenes, rays, samples, config
    "128px": (6, 128 * 128, 24, SirenConfig(hidden=256, color_layers=3, label_layers=3, grid_branch="color")),
    "64px_slim": (32, 64 * 64, 24, SirenConfig(hidden=128, color_layers=3, label_layers=3, grid_branch="color")),
    "32px": (24, 32 * 32, 24, SirenConfig(hidden=256, color_layers=3, label_layers=3, grid_branch="color")),
    "tiny": (
        2,
        4,
        4,
        SirenConfig(hidden=128, color_layers=1, label_layers=2, grid_branch="color", grid_size=(4, 4, 4)),
    ),
}


def flop(config: SirenConfig, points: int) -> float:
    """Multiply-adds counted as two, label chain as published."""
    h, k = config.hidden, config.label_count
    macs = config.geometry_inputs * h + (config.geometry_layers - 1) * h * h + h
    macs += config.color_inputs * h + (config.color_layers - 1) * h * h + 3 * h
    macs += max(0, config.label_layers - 1) * h * h + (h * k if config.label_layers else 0)
    return 2.0 * macs * points


def make(case: str, device: str) -> tuple[SirenField, Tensor, Tensor, Film]:
    """Field, points, directions, FiLM codes with SIREN's own statistics, by a fixed seed."""
    n, rays, samples, config = CASES[case]
    r = torch.Generator().manual_seed(1)
    field = SirenField(config)
    field.reset_parameters(r)
    on_device = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=on_device)

    points = torch.rand(n, rays, samples, 3, device=device, generator=on_device).mul_(0.24).sub_(0.12)
    directions = torch.nn.functional.normalize(normal(n, rays, 3), dim=-1)
    h = config.hidden
    codes = []
    for layers in (config.geometry_layers, config.color_layers):
        codes += [30 + 15 * 0.25 * normal(n, layers, h), 0.5 * normal(n, layers, h)]
    return field.to(device), points, directions, Film(*(c.requires_grad_() for c in codes))


def implementations() -> dict[str, Callable[[SirenField], tuple[Callable, contextlib.AbstractContextManager]]]:
    """Name -> function that prepares a field: (callable, context)."""

    def plain(field: SirenField):
        field.precision = "fp32"
        return field, contextlib.nullcontext()

    def autocast(field: SirenField):
        field.precision = "fp32"
        return field, torch.autocast("cuda", torch.float16)

    def compiled(field: SirenField):
        field.precision = "fp32"
        return torch.compile(field), torch.autocast("cuda", torch.float16)

    def fused(field: SirenField):
        field.precision = "fp16"
        return field, contextlib.nullcontext()

    return {"fp32": plain, "tf32": plain, "fp16_autocast": autocast, "compiled_fp16_autocast": compiled, "fused": fused}


def milliseconds(work: Callable[[], None], seconds: float = 1.0) -> tuple[float, float]:
    """Median and interquartile range of CUDA event times."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    count = max(5, min(30, int(seconds / (time.perf_counter() - begin))))
    return timing.milliseconds(work, count, 0)


def peak_gib(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def errors(case: str, device: str) -> dict:
    """Relative L2 errors of the fused field against the plain float32 one on a part of the case's rays."""
    field, points, directions, film = make(case, device)
    points, directions = points[:2, :512].contiguous(), directions[:2, :512].contiguous()
    film = Film(*(c.detach()[:2].requires_grad_() for c in film.tensors()))
    names = [name for name, _ in field.named_parameters()] + ["film_gf", "film_gp", "film_cf", "film_cp"]
    found = {}
    for precision in ("fp32", "fp16"):
        field.precision = precision
        out = field(points, directions, film)
        values = torch.cat([out.channels(), out.sigma], dim=-1)
        if precision == "fp32":
            weight = torch.randn(values.shape, device=device, generator=torch.Generator(device).manual_seed(5))
        grads = torch.autograd.grad((values * weight * 1e-5).sum(), [*field.parameters(), *film.tensors()])
        with torch.no_grad():
            found[precision] = (out.sigma, out.channels(), grads, field.density(points, film))
    a, b = found["fp16"], found["fp32"]
    result = {"sigma": relative(a[0], b[0]), "channels": relative(a[1], b[1]), "density": relative(a[3], b[3])}
    per_tensor = {name: relative(x, y) for name, x, y in zip(names, a[2], b[2], strict=True)}
    worst = max(per_tensor, key=per_tensor.__getitem__)
    result |= {"worst_gradient": per_tensor[worst], "worst_gradient_is": worst, "gradients": per_tensor}
    return result


def measure(case: str, name: str) -> dict:
    """One implementation on one case."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    field, points, directions, film = make(case, "cuda")
    call, context = implementations()[name](field)
    total = flop(field.config, points[..., 0].numel())

    def forward() -> None:
        with torch.no_grad(), context:
            call(points, directions, film)

    out_grad: list[Tensor] = []

    def both() -> None:
        with context:
            out = call(points, directions, film)
        values = [out.sigma, out.rgb] + ([] if out.semantics is None else [out.semantics])
        if not out_grad:
            r = torch.Generator("cuda").manual_seed(3)
            out_grad.extend(torch.randn(v.shape, device="cuda", generator=r).mul_(1e-3).to(v.dtype) for v in values)
        torch.autograd.backward(values, out_grad)
        for x in [*field.parameters(), *film.tensors()]:
            x.grad = None

    row: dict = {"case": case, "implementation": name}
    try:
        for label, work, factor in (("forward", forward, 1), ("forward_backward", both, 3)):
            work()
            ms, spread = milliseconds(work)
            row[label] = {
                "ms": round(ms, 3),
                "iqr_ms": round(spread, 3),
                "tflops": round(factor * total / ms / 1e9, 1),
                "peak_gib": round(peak_gib(work), 2),
            }
    except torch.cuda.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:  # noqa: BLE001 - torch.compile may refuse; the others must still be measured
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def tune(case: str) -> None:
    """Time candidate tile shapes of each kernel on one slab of the case (used to fill film_siren._TILES)."""
    T = film_siren.Tiles
    field, points, directions, film = make(case, "cuda")
    h = field.config.hidden
    shapes = [T(128, 8, 2), T(128, 8, 1), T(64, 4, 1), T(64, 8, 1), T(64, 4, 2)]
    candidates = {"forward": shapes, "save": shapes, "backward": shapes}
    if h == 256:
        candidates["weights"] = [T(128, 8, 3, 4096), T(128, 8, 2, 4096), T(128, 8, 3, 8192), T(128, 8, 3, 16384)]
    else:
        candidates["weights"] = [T(128, 4, 3, 4096), T(128, 8, 3, 4096), T(128, 8, 3, 8192), T(128, 8, 2, 4096)]
    spec = film_siren.Spec(h, 8, 3, 18, True, 32, False, 2 / 0.24)
    weights = [x for x in field.parameters() if x.ndim < 5]
    weights = weights[: -2 * len(field.labels)] + [torch.randn(18, h, device="cuda"), torch.randn(18, device="cuda")]
    packed = film_siren.pack(spec, film.tensors(), weights)
    run = film_siren._Slabs(spec, packed, points, directions, field.grid)
    slab = next(
        film_siren.slabs(
            len(points),
            points.shape[1] * points.shape[2],
            film_siren_backward.backward_rows(points[..., 0].numel()) * 256 // h,
        )
    )
    ys, extra = run.activations(slab)
    scale = torch.ones((), device="cuda")
    out = torch.zeros(len(points), run.total, 22, device="cuda")
    head_d = run.head_gradient(slab, torch.randn_like(out), out, scale)
    below = film_siren._demodulate(spec, packed)
    d = run.layer_gradients(slab, below, head_d, ys)
    sums = torch.zeros(len(points), 11, h, device="cuda")

    def buffer(*shape: int) -> Tensor:
        return torch.zeros(len(points), *shape, device="cuda")

    big, small, narrow = buffer(10, h, h), buffer(1, h, 64), buffer(1, 32, h)
    cells = torch.zeros_like(run.cells)
    d_grid = d[0][:, :32].contiguous()
    works: dict[str, tuple[Callable, int]] = {  # and the products of width h x h
        "forward": (lambda: run.forward(slab, out), 10),
        "save": (lambda: run.activations(slab), 10),
        "backward": (lambda: run.layer_gradients(slab, below, head_d, ys), 10),
        "weights": (lambda: run.weight_gradient(slab, d[1:], ys[:-1], big, sums), 10),
        "extras": (lambda: run.extras(slab, True, False), 0),
        "head_gradient": (lambda: run.head_gradient(slab, out, out, scale), 0),
        "weights_extra": (lambda: run.weight_gradient(slab, d[:1], extra[None], small, None), 0),
        "weights_head": (lambda: run.weight_gradient(slab, head_d[None], ys[4:], narrow, None), 0),
        "scatter": (
            lambda: film_siren.grid_lookup.scatter(run.cells, run.points, d_grid, scale, slab, spec.scale, cells, None),
            0,
        ),
    }
    for kernel, (work, products) in works.items():
        kept = film_siren._TILES.get((kernel, h))
        for t in candidates.get(kernel, [None]):
            if t is not None:
                film_siren._TILES[kernel, h] = t
            try:
                ms, _ = milliseconds(work, 0.1)
                rate = slab.rows * h * h * 2 * products / ms / 1e9
                print(f"{case} {kernel:14s} {t}: {ms:.3f} ms, {slab.rows} rows, {rate:.0f} TFLOP/s", flush=True)
            except Exception as error:  # noqa: BLE001 - a shape that does not fit is an answer too
                print(f"{case} {kernel:14s} {t}: {type(error).__name__} {str(error)[:80]}", flush=True)
        if kept is not None:
            film_siren._TILES[kernel, h] = kept


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--only", default=",".join(implementations()), help="implementations, comma separated")
    parser.add_argument("--case", default="128px,64px_slim,32px", help="cases, comma separated")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out holds; errors are not measured")
    parser.add_argument("--tiles", action="store_true", help="time tile shapes instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_siren.py needs a CUDA GPU, none is visible")
    cases = args.case.split(",")
    if args.tiles:
        for case in cases:
            tune(case)
        return
    rows = json.loads(args.out.read_text())["results"] if args.append else []
    for case in cases:
        if not args.append:
            error = errors(case, "cuda")
            error["gradients"] = {name: round(value, 5) for name, value in error["gradients"].items()}
            rows.append({"case": case, "errors": error})
            print(json.dumps(rows[-1]), flush=True)
        for name in args.only.split(","):
            rows.append(measure(case, name))
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            if args.out is not None:
                write(args.out, rows)


def write(path: Path, rows: list[dict]) -> None:
    """Write the results and what they were measured on."""
    import triton

    result = {
        "benchmark": "siren",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cases": {
            name: {
                "scenes": n,
                "rays": rays,
                "samples": samples,
                "hidden": config.hidden,
                "layers": 8 + config.color_layers,
            }
            for name, (n, rays, samples, config) in CASES.items()
            if any(row["case"] == name for row in rows)
        },
        "results": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
