# SPDX-License-Identifier: Apache-2.0
"""Speed of upfirdn2d and bias_act: the kernels beside the plain twin, the compiled twin and a copy.

    python tests/benchmarks/bench_ops.py [--out tests/benchmarks/results/ops_h200.json] [--only up2,bias_act] [--sweep]
                                         [--dtypes float16] [--layouts nchw]

Needs a CUDA GPU and torch alone. 8 x 128 x 256 x 256, filter [1, 3, 3, 1], float32, float16 and bfloat16,
contiguous and channels-last. Median and interquartile range by CUDA events after warm-up, with a queue that is
never empty; ``host_ms`` is the CPU's time for a call. TB/s count each input number read once and each result
written once. Every result is compared with the twin in float64 first: one that is wrong is no result. ``ORIGINAL``
holds the rates of the original's plugins, measured on the same kind of GPU (H200); rows of the kernels on the same
shape have them as ``original_tb_per_s``, with the ``ratio`` of ours to them. ``--sweep`` tries the ways in which the
kernels can share their work out and prints the fastest of each case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cuda_ops
from cuda_ops import filter_launch, reference_activations, reference_filters
from cuda_ops.__main__ import versions
from cuda_ops.timing import host_times, milliseconds, terabytes_per_second

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FILTERS: dict[str, dict[str, Any]] = {
    "up2": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4.0},
    "down2": {"down": 2, "padding": [1, 1, 1, 1]},
    "filter": {"padding": [2, 1, 2, 1]},
}
ACTIVATIONS: dict[str, dict[str, Any]] = {"bias_lrelu": {}, "bias_lrelu_clamp": {"clamp": 1.0}}
SHAPE = (8, 128, 256, 256)  # batch by default
ORIGINAL = {  # TB/s on SHAPE; of each dtype and layout the cases of ORIGINAL_CASES
    ("float32", "nchw"): (1.27, 1.13, 1.26, 2.09),
    ("float16", "nchw"): (0.60, 0.55, 0.62, 0.91),
    ("float16", "channels_last"): (0.62, 0.47, 0.53, 0.87),
}
ORIGINAL_CASES = (*FILTERS, "bias_lrelu")
WAYS = ("reference", "compiled", "triton")
GRADIENTS = ("up2_gradient", "bias_lrelu_clamp_gradient")
Work = Callable[[Tensor], Tensor]


def implementations(case: str, x: Tensor) -> tuple[dict[str, Work], float]:
    """Name -> function of x; and the numbers read and written, as a multiple of those in x."""
    f = cuda_ops.setup_filter([1, 3, 3, 1], device=x.device)
    b = torch.linspace(-1, 1, x.shape[1], device=x.device).to(x.dtype)
    if case in FILTERS:
        options = FILTERS[case]
        scale = {"up2": 5.0, "down2": 1.25, "filter": 2.0}[case]
        twin: Work = lambda x: reference_filters.upfirdn2d(x, f, **options)
        kernel: Work = lambda x: cuda_ops.upfirdn2d(x, f, **options)
    elif case in ACTIVATIONS:
        scale, options = 2.0, ACTIVATIONS[case]
        twin = lambda x: reference_activations.bias_act(x, b.to(x.dtype), act="lrelu", **options)
        kernel = lambda x: cuda_ops.bias_act(x, b, act="lrelu", **options)
    elif case == "bias_lrelu_clamp_gradient":
        scale = 3.0  # gradient and result in, gradient out
        arguments = (None, 0, "lrelu", 0.2, 2**0.5, 1.0, True)
        dy = x.flip(0)
        twin = lambda x: reference_activations.bias_act_grad(dy[: len(x)].to(x.dtype), x, *arguments)
        kernel = lambda x: torch.ops.facelab.bias_act_grad(dy[: len(x)], x, *arguments)
    else:  # the gradient of up2 is a downsampling
        scale, options = 1.25, {"down": 2, "padding": [1, 2, 1, 2], "flip_filter": True, "gain": 4.0}
        twin = lambda x: reference_filters.upfirdn2d(x, f, **options)
        kernel = lambda x: cuda_ops.upfirdn2d(x, f, **options)
    return {"reference": twin, "compiled": torch.compile(twin, dynamic=False), "triton": kernel}, scale


def error(work: Work, twin: Work, x: Tensor) -> float:
    """Largest difference from the twin in float64, relative to its largest number, on a part of the batch."""
    part = x[:1]
    expected = twin(part.double())
    return float((work(part).double() - expected).abs().max() / expected.abs().max())


def inputs(batch: int, dtypes: list[str], layouts: list[str]) -> Iterator[tuple[torch.dtype, str, Tensor]]:
    """Every dtype and layout asked for."""
    for dtype, (layout, memory_format) in itertools.product(DTYPES, LAYOUTS.items()):
        if str(dtype)[6:] not in dtypes or layout not in layouts:
            continue
        r = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(batch, *SHAPE[1:], device="cuda", generator=r)
        yield dtype, layout, x.to(dtype).to(memory_format=memory_format)


def measure(case: str, name: str, work: Work, twin: Work, x: Tensor, scale: float) -> dict[str, Any]:
    """One row: time, spread, rate, error against the twin."""
    row: dict[str, Any] = {"case": case, "implementation": name, "error": error(work, twin, x)}
    if not row["error"] <= TOLERANCE[x.dtype]:
        return {**row, "failed": "wrong result"}
    median, spread = milliseconds(lambda: work(x))
    rate = terabytes_per_second(int(x.numel() * scale), x.element_size(), median)
    host = statistics.median(host_times(lambda: work(x)))
    times = {"ms": round(median, 4), "ms_iqr": round(spread, 4), "host_ms": round(host, 4)}
    return {**row, **times, "tb_per_s": round(rate, 3)}


def with_original(row: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """A row with the original's rate and the ratio to it, where the row is of our kernels and :data:`ORIGINAL` has one."""
    rates = ORIGINAL.get((row["dtype"], row["layout"]))
    known = rates is not None and row["case"] in ORIGINAL_CASES and tuple(shape) == SHAPE
    if not known or row["implementation"] != "triton" or "tb_per_s" not in row:
        return row
    assert rates is not None
    original = rates[ORIGINAL_CASES.index(row["case"])]
    return {**row, "original_tb_per_s": original, "ratio": round(row["tb_per_s"] / original, 2)}


def table(cases: list[str], *which: Any, ways: Collection[str] = WAYS) -> list[dict[str, Any]]:
    """All rows, printed as they come."""
    rows = []
    for dtype, layout, x in inputs(*which):
        other = torch.empty_like(x)
        about = {"dtype": str(dtype)[6:], "layout": layout}
        todo = [("copy", "copy", lambda x, o=other: o[: len(x)].copy_(x), lambda x: x, 2.0)]
        for case in cases:
            functions, scale = implementations(case, x)
            todo += [
                (case, name, work, functions["reference"], scale) for name, work in functions.items() if name in ways
            ]
        for case, name, work, twin, scale in todo:
            try:
                row = measure(case, name, work, twin, x, scale)
            except torch.OutOfMemoryError:
                row = {"case": case, "implementation": name, "failed": "out of GPU memory"}
            rows.append(with_original({**about, **row}, x.shape))
            print(json.dumps(rows[-1]), flush=True)
        torch._dynamo.reset()
    return rows


def candidates(case: str, dtype: torch.dtype, layout: str) -> Iterator[dict[str, int]]:
    """Shapes of the work of a lane; a second or two each, for they have to be compiled."""
    last, half = layout == "channels_last", dtype.itemsize == 2
    rows = (2, 4, 8) if case == "down2" or last else (4, 8)
    words = (2,) if last or not half or case == "up2" else (2, 4, 8)
    columns = (1, 2) if last or not half else (2, 4)
    vectors = (4, 8, 16) if last else (filter_launch.VECTOR_BYTES,)
    lanes = (128,) if last else (128, 256)
    for c, r, w, n, v in itertools.product(columns, rows, words, lanes, vectors):
        reached = c * (2 if case == "down2" else 1)  # inputs from one lane to the next
        if w // 2 <= reached and (w > 2 or words == (2,) or n == 128):
            yield {"columns": c, "rows": r, "lanes": n, "vector_bytes": v, "word_bytes": w}


def sweep(cases: list[str], *which: Any) -> list[dict[str, Any]]:
    """The fastest shapes of the kernels' work, for each filter case; what runs without this is measured first."""
    from triton.runtime.errors import OutOfResources

    best = []
    names = ("columns_and_rows", "LANES", "VECTOR_BYTES", "WORD_BYTES")
    original = {name: getattr(filter_launch, name) for name in names}
    for dtype, layout, x in inputs(*which):
        for case in [c for c in cases if c in FILTERS]:
            functions, scale = implementations(case, x)
            found = []
            for way in ({}, *candidates(case, dtype, layout)):
                if way:
                    filter_launch.columns_and_rows = lambda *_, w=way: (w["columns"], w["rows"])
                    filter_launch.LANES, filter_launch.VECTOR_BYTES = way["lanes"], way["vector_bytes"]
                    filter_launch.WORD_BYTES = way["word_bytes"]
                try:
                    wrong = error(functions["triton"], functions["reference"], x)
                    median, _ = milliseconds(partial(functions["triton"], x), repeats=15, warmup=3)
                except (RuntimeError, OutOfResources) as problem:
                    print(f"{case} {way}: {type(problem).__name__}", file=sys.stderr)
                    continue
                finally:
                    for name, value in original.items():
                        setattr(filter_launch, name, value)
                if not wrong <= TOLERANCE[dtype]:
                    print(f"{case} {way}: wrong result", file=sys.stderr)
                    continue
                rate = terabytes_per_second(int(x.numel() * scale), x.element_size(), median)
                found.append((round(rate, 3), way or "as it is"))
            ordered = sorted(found[1:], key=lambda pair: -pair[0])[:3]
            best.append({"dtype": str(dtype)[6:], "layout": layout, "case": case, "now": found[:1], "best": ordered})
            print(json.dumps(best[-1]), flush=True)
    return best


def main() -> None:
    everything = [*FILTERS, *ACTIVATIONS, *GRADIENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", help=f"parts of case names, comma-separated, of {', '.join(everything)}")
    parser.add_argument("--batch", type=int, default=SHAPE[0])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--dtypes", default=",".join(str(dtype)[6:] for dtype in DTYPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, none is visible")
    os.environ["FACELAB_OPS"] = "triton"  # a kernel that cannot run is an error here
    cases = [c for c in everything if not options.only or any(part in c for part in options.only.split(","))]
    which = (options.batch, options.dtypes.split(","), options.layouts.split(","))
    rows = sweep(cases, *which) if options.sweep else table(cases, *which, ways=options.ways.split(","))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            **versions(),
            "shape": [options.batch, *SHAPE[1:]],
            "filter": [1, 3, 3, 1],
            "date": time.strftime("%F"),
        }
        part = options.out.with_name(options.out.name + ".part")
        part.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, options.out)


if __name__ == "__main__":
    main()
