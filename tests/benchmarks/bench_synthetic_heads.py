# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads per second, from seed to pictures with masks, depth, normals and landmarks.

    python tests/benchmarks/bench_synthetic_heads.py [--device cpu|cuda] [--size 128] [--batch 64] [--out FILE]

Wall time and process time (CPU seconds of all threads) of whole batches, medians after a warm-up batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring import keep

from facelab.data.synthetic import SyntheticHeads


def measure(heads: SyntheticHeads, batch: int, repeats: int) -> dict[str, float]:
    """Medians over ``repeats`` batches of new heads."""
    cuda = heads.device.type == "cuda"
    wall, cpu = [], []
    for k in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        heads.batch(range(k * batch, (k + 1) * batch))
        if cuda:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    median = statistics.median(wall[1:])
    result = {"heads_per_second": batch / median, "cpu_ms_per_head": 1000 * statistics.median(cpu[1:]) / batch}
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    report: dict[str, object] = {"device": name, "torch": torch.__version__, "batch": options.batch}
    report["load_before"] = os.getloadavg()[0]
    for size in options.size:
        heads = SyntheticHeads(0, size, device=options.device, backend=options.backend)
        report[f"{size}px"] = {k: round(v, 2) for k, v in measure(heads, options.batch, options.repeats).items()}
    print(json.dumps(report, indent=1))
    keep(report, options.out)


if __name__ == "__main__":
    main()
