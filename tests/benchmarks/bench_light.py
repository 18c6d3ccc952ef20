# SPDX-License-Identifier: Apache-2.0
"""How well light is seen: python tests/benchmarks/bench_light.py --dpr trained_model_03.t7 [--relit FOLDER] [--out JSON]

Synthetic heads are drawn under lights that are known (even light and a lamp in front; and their usual portrait
lights). DPR's estimate, and the fit to brightness and normals, are compared with what each camera truly sees, in DPR's
terms. ``--relit``: DPR's own demonstration (input.png, rotate_light_*.txt, relit_*.jpg, light_*.png) done again.
Milliseconds are those of one process with ``--threads``.
"""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import keep
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from facelab import lighting
from facelab.cameras.camera import Camera
from facelab.data.synthetic import SyntheticBatch, SyntheticHeads
from facelab.data.synthetic_sampling import sample_heads
from facelab.losses.lighting import light_in
from facelab.nn.pretrained.light_estimator import load_dpr, load_light_estimator

FILE = click.Path(exists=True, path_type=Path)
BATCH = 8


def lamps(count: int, generator: torch.Generator) -> Tensor:
    """(count, 9, 3) even light 0.4 and a lamp of 0.6 up to 80 degrees to the side and 52 up or down."""
    azimuth, elevation = (torch.rand(2, count, generator=generator) * 2 - 1) * torch.tensor([[1.4], [0.9]])
    flat = elevation.cos()
    towards = torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], dim=-1)
    light = lighting.directional(towards, 0.6) + lighting.ambient(0.4)
    return light[..., None].expand(-1, -1, 3)


def draw(kind: str, count: int, size: int, seed: int, posed: bool) -> tuple[SyntheticBatch, Tensor, Camera]:
    """Heads, their (N, 9) grey world lights, their cameras."""
    spread = {} if posed else {"yaw_std": 0.0, "pitch_std": 0.0}
    heads = SyntheticHeads(seed=seed, size=size, supersample=1, grid="centers", **spread)
    generator = torch.Generator().manual_seed(seed)
    light = lamps(count, generator) if kind == "lamps" else lighting.random_light(count, generator)
    numbers = heads.numbers(torch.arange(count))
    camera = heads.cameras(numbers)
    return heads.render(sample_heads(heads.model, numbers), camera, light), light.mean(-1), camera


def skin(batch: SyntheticBatch) -> Tensor:
    """(N, S, S) bool: skin and nose without their border."""
    other = ((batch.mask != 1) & (batch.mask != 2)).float()[:, None]
    return F.max_pool2d(other, 5, 1, 2)[:, 0] == 0


def figures(found: Tensor, known: Tensor) -> dict[str, Any]:
    """What of the comparison is kept, angles in degrees."""
    summary = lighting.light_agreement(found, known).summary()
    angle = math.degrees(float(summary.pop("angle")))  # type: ignore[arg-type]
    rounded = {k: [None if math.isnan(v) else round(v, 3) for v in values] for k, values in summary.items()}  # type: ignore[union-attr]
    return rounded | {"median_angle_degrees": round(angle, 1)}


def measured_heads(dpr: Path, count: int, size: int, seed: int, sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each kind of light, pose and estimator."""
    rows = []
    for kind, posed in (("lamps", False), ("lamps", True), ("portrait", True)):
        batch, light, camera = draw(kind, count, size, seed, posed)
        case = {"light": kind, "posed": posed, "heads": count, "pixels": size}
        known = lighting.to_dpr(light, camera)
        brightness = batch.image.float().mean(1) / 255
        fitted = lighting.fit_light(brightness, batch.normal, skin(batch))
        fitted = fitted * (light[:, :1] / fitted[:, :1])  # the albedo is not known
        rows.append(
            {**case, "by": "fit to normals (mean brightness given)", **figures(lighting.to_dpr(fitted, camera), known)}
        )
        right, wrong = (
            lighting.shading_correlation(brightness, batch.normal, skin(batch), other)
            for other in (light, light.roll(1, 0))
        )
        rows[-1] |= {"shading_correlation": float(right.median()), "with_anothers_light": float(wrong.median())}
        pictures = batch.image.float() / 127.5 - 1
        for norm in ("running", "picture"):
            for side in sides:
                net = load_light_estimator(dpr, norm, side)
                begin = time.perf_counter()
                with torch.no_grad():
                    found = torch.cat([light_in(net, part) for part in pictures.split(BATCH)])
                spent = (time.perf_counter() - begin) / count * 1000
                row = {**case, "by": "DPR", "norm": norm, "side": side, "milliseconds": round(spent, 1)}
                rows.append({**row, **figures(found, known)})
    return rows


def relit(folder: Path, dpr: Path) -> list[dict[str, Any]]:
    """PSNR of our relit pictures against DPR's, and of the input; correlation of our balls with DPR's."""
    net, portrait, rows = load_dpr(dpr), _rgb(folder / "input.png"), []
    for path in sorted(folder.glob("rotate_light_*.txt")):
        number = path.stem.rpartition("_")[2]
        light = 0.7 * torch.tensor([[float(v) for v in path.read_text().split()]])
        with torch.no_grad():
            level, _ = net(lighting.lightness(portrait), light)
        ours, theirs = lighting.with_lightness(portrait, level).clamp(0, 1), _rgb(folder / f"relit_{number}.jpg")
        shipped = _rgb(folder / f"light_{number}.png")[0, 0]
        ball, inside = _ball(lighting.from_dpr(light), len(shipped))
        together = torch.corrcoef(torch.stack([ball[inside], shipped[inside]]))[0, 1]
        rows.append(
            {
                "light": number,
                "psnr": round(_psnr(ours, theirs), 2),
                "mean_error_levels": round(float((ours - theirs).abs().mean()) * 255, 2),
                "input_psnr": round(_psnr(portrait, theirs), 2),
                "ball_correlation": round(float(together), 4),
            }
        )
    return rows


def _rgb(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def _psnr(first: Tensor, second: Tensor) -> float:
    return -10 * math.log10(float((first - second).square().mean()))


def _ball(light: Tensor, side: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    normals = torch.stack([x, y, (1 - x * x - y * y).clamp(min=0).sqrt()], dim=-1)
    return lighting.basis(normals) @ light[0], x * x + y * y < 0.95


@click.command()
@click.option("--dpr", type=FILE, required=True, help="DPR's trained_model_03.t7.")
@click.option("--relit", "folder", type=FILE, help="Folder of DPR's demonstration.")
@click.option("--heads", default=96, show_default=True)
@click.option("--size", default=256, show_default=True, help="Pixels of the heads' pictures.")
@click.option("--sides", default=(512, 256), multiple=True, show_default=True, help="Pixels that DPR sees.")
@click.option("--seed", default=12, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(
    dpr: Path, folder: Path | None, heads: int, size: int, sides: tuple[int, ...], seed: int, threads: int,
    out: Path | None,
) -> None:  # fmt: skip
    """Measure, print, keep."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "about": {"torch": torch.__version__, "python": platform.python_version(), "threads": threads, "seed": seed},
        "order": "DPR's: 1, Y, Z, X, XY, YZ, 3Z^2-1, XZ, X^2-Y^2; x right, y into the scene, z up",
        "heads": measured_heads(dpr, heads, size, seed, sides),
    }
    if folder is not None:
        result["demonstration"] = relit(folder, dpr)
    for row in [*result["heads"], *result.get("demonstration", [])]:
        print(json.dumps(row))
    keep(result, out)


if __name__ == "__main__":
    main()
