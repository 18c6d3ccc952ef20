# SPDX-License-Identifier: Apache-2.0
"""FENeRF on one GPU: the full training step at the three sizes of the README's curriculum, and pictures.

    python tests/benchmarks/bench_fenerf.py [--out FILE] [--modes fast,plain] [--steps 30] [--sizes 32,64,128]

The step is the one that users run (the Trainer with its data stream, image discriminator, semantic
discriminator, generator, averages); chunks are those of the released curriculum. Times are wall-clock
per step between log lines (the device is waited for there), medians over windows after warm-up; memory
is the peak that the allocator handed out. ``ORIGINAL`` holds the figures of the original program on the
same kind of GPU (H200, torch 2.11), random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from short_runs import readings_of

from facelab.config import load_staged, resolve_curriculum
from facelab.methods import load_method

ORIGINAL = {
    "step": {32: (337.0, 6.2), 64: (1456.0, 42.9), 128: (2573.0, 84.9)},  # px: (ms, GiB)
    "picture": {"128px_24+24": 52.8, "128px_48+48": 100.7, "256px_48+48": 390.0},  # ms
}
BATCHES = {32: (24, 6), 64: (48, 12), 128: (24, 6)}  # batch, chunk of the released curriculum
MODES = {
    "plain": ["train.precision=fp32", "render.precision=fp32"],
    "tf32": ["train.precision=tf32", "render.precision=tf32"],
    "graphs": [
        "train.precision=bf16",
        "render.precision=fp16",
        "discriminator.channels_last=true",
        "train.cuda_graphs=true",
    ],
    "fast": ["train.precision=bf16", "render.precision=fp16", "discriminator.channels_last=true"],
}
WINDOW = 5  # steps between two readings


def bench_step(size: int, mode: str, steps: int, device: str) -> dict[str, Any]:
    """Median milliseconds and peak GiB of a full training step."""
    batch, chunk = BATCHES[size]
    overrides = [
        *MODES[mode],
        f"render.resolution={size}",
        f"train.batch_per_gpu={batch}",
        f"train.batch_chunk={chunk}",
        f"discriminator.chunk={batch}",
        f"train.max_steps={steps}",
        "data.heads=256",
        f"log.every={WINDOW}",
        "log.samples_every=0",
        "log.progress=false",
    ]
    method = load_method("fenerf")
    staged = load_staged(method.config_type, [resolve_curriculum("fenerf", "celebamask_hq_128")], overrides)
    found = readings_of(method, staged, torch.device(device))
    rows = found[2:] or found[-1:]  # the first windows compile and warm up
    times = sorted(1e3 * row["seconds_per_step"] for row in rows)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    phases = {k: 1e3 * statistics.median(r[k] for r in rows) for k in rows[-1] if k.startswith("seconds/")}
    original_ms, original_gib = ORIGINAL["step"][size]
    median = statistics.median(times)
    memory, first_memory = (max(row.get("memory_gib", 0.0) for row in part) for part in (rows, found[:2]))
    return {
        "case": f"step_{size}px_batch{batch}",
        "mode": mode,
        "settings": MODES[mode],
        "milliseconds": median,
        "quartiles": [quartiles[0], quartiles[2]],
        "windows": len(times),
        "steps_per_window": WINDOW,
        "memory_gib": memory,
        "first_steps_gib": first_memory,
        "phases_ms": phases,
        "images_per_second": 1e3 * batch / median,
        "original_milliseconds": original_ms,
        "original_gib": original_gib,
        "time_ratio": median / original_ms,
        "memory_ratio": memory / original_gib,
    }


@torch.no_grad()
def bench_picture(name: str, size: int, samples: int, mode: str, device: str, repeats: int = 20) -> dict[str, Any]:
    """Median milliseconds of one picture of a random model, scene included."""
    from facelab.api import FaceModel

    method = load_method("fenerf")
    staged = load_staged(method.config_type, [resolve_curriculum("fenerf", "celebamask_hq_128")], MODES[mode])
    config = staged.stages[-1]
    generator = method.build_generator(config).to(device).eval()
    generator.update_averages()
    model = FaceModel(method, generator, config, {}, Path())
    settings = model.settings(size, 1).replace(samples_coarse=samples, samples_fine=samples)
    codes, camera = model.codes(0), model.camera()
    times = []
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(repeats + 5):
        synchronize()
        start = time.perf_counter()
        model.render(codes, camera, settings=settings)
        synchronize()
        if i >= 5:
            times.append(1e3 * (time.perf_counter() - start))
    quartiles = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    return {
        "case": name,
        "mode": mode,
        "milliseconds": median,
        "quartiles": [quartiles[0], quartiles[2]],
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "original_milliseconds": ORIGINAL["picture"][name],
        "time_ratio": median / ORIGINAL["picture"][name],
    }


def versions() -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit, "gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--modes", default="fast")
    parser.add_argument("--sizes", default="32,64,128")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_fenerf: no CUDA GPU, nothing to measure")
        return
    rows = []
    for mode in arguments.modes.split(","):
        for name, size, samples in (("128px_24+24", 128, 24), ("128px_48+48", 128, 48), ("256px_48+48", 256, 48)):
            rows.append(bench_picture(name, size, samples, mode, "cuda"))
            print(json.dumps(rows[-1]), flush=True)
        for size in map(int, arguments.sizes.split(",")):
            try:
                rows.append(bench_step(size, mode, arguments.steps, "cuda"))
            except torch.cuda.OutOfMemoryError:
                rows.append({"case": f"step_{size}px", "mode": mode, "error": "out of memory"})
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    report = {"benchmark": "fenerf", **versions(), "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
