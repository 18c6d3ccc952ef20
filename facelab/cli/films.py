# SPDX-License-Identifier: Apache-2.0
"""What render_video shows: which heads move where in which cell, and the frames that come of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from facelab.cameras.trajectories import NAMES, Trajectory, keyframe_trajectory, read_keyframes, trajectory
from facelab.cli import pictures
from facelab.cli.regions import sphere_prior
from facelab.cli.shapes import ShapeOptions, ShapePictures, write_shapes
from facelab.errors import UserError, nearest
from facelab.files import atomic_path, make_folder
from facelab.generator import Codes
from facelab.inference.interpolation import loop_codes, straight_codes
from facelab.inference.latent_files import read_codes
from facelab.inference.video import FrameSink
from facelab.progress import progress_bar

SPHERE_PATHS = {"stylesdf": False, "stylesdf_level": True}  # of the original's videos; whether at elevation 0
NAMED_HEADS = 8  # a file name lists so many seeds


@dataclass(frozen=True)
class Film:
    """A video before it is rendered.

    Attributes:
        cells: heads of each cell of the grid, one scene each; row by row.
        columns: cells side by side.
        kind: what moves from head to head: ``geo``, ``app``, ``both`` or ``non``.
        path: camera path; where the film is longer, it is run through again.
        loop: frames from head to head on a closed curve; None: straight, the whole path for each pair.
    """

    cells: Sequence[Sequence[Codes]]
    columns: int
    kind: str
    path: Trajectory
    loop: int | None

    def __len__(self) -> int:
        heads = len(self.cells[0])
        return heads * self.loop if self.loop else max(1, heads - 1) * len(self.path)

    def codes(self) -> Iterator[Codes]:
        """The heads of all cells in one batch, frame by frame."""
        if self.loop:
            tracks = [loop_codes(heads, self.kind, self.loop) for heads in self.cells]
        else:
            tracks = [straight_codes(heads, self.kind, self.path.t.tolist()) for heads in self.cells]
        for parts in zip(*tracks, strict=True):
            yield parts[0] if len(parts) == 1 else Codes.cat(list(parts))


class ShapeFolder:
    """Shapes of the frames, ``00000.ply`` ..., with ``_<cell>`` in a grid, and ``cameras.npy`` (F, 25 each)."""

    def __init__(self, folder: Path, options: ShapeOptions) -> None:
        self.folder, self.options = make_folder(folder), options

    def add(self, face: Any, number: int, codes: Codes) -> None:
        """The shapes of frame ``number``, N scenes."""
        for cell in range(len(codes)):
            name = f"{number:05d}" if len(codes) == 1 else f"{number:05d}_{cell}"
            write_shapes(face, codes[cell], self.folder, name, self.options)

    def save_cameras(self, labels: np.ndarray) -> None:
        """The cameras of all frames, see :meth:`facelab.cameras.Camera.label`."""
        with atomic_path(self.folder / "cameras.npy") as temporary, temporary.open("wb") as file:
            np.save(file, labels)


def parse_grid(text: str) -> tuple[int, int]:
    """``"4x3"`` or ``"4,3"`` -> 4 columns, 3 rows. UserError otherwise."""
    found = re.fullmatch(r"\s*(\d+)\s*[x,]\s*(\d+)\s*", text)
    if found is None or "0" in found.groups():
        raise UserError(f"--grid takes columns x rows such as 4x3, got {text!r}")
    return int(found[1]), int(found[2])


def film_heads(
    face: Any, seeds: Sequence[int], psi: float, cutoff: int | None, latents: Sequence[Path]
) -> list[tuple[str, Codes]]:
    """Heads of one scene each with what to name them after: those of the files, or without files those of the seeds."""
    if not latents:
        return [(str(seed), face.codes(seed, psi, cutoff)) for seed in seeds]
    heads = []
    for path in latents:
        codes = read_codes(path, face.generator)
        names = [path.stem] if len(codes) == 1 else [f"{path.stem}_{i}" for i in range(len(codes))]
        heads += [(name, codes[i]) for i, name in enumerate(names)]
    return heads


def fill_cells(heads: Sequence[Codes], columns: int, rows: int) -> list[list[Codes]]:
    """Share heads out: the first cell gets the first K, the next the next K. UserError where that does not divide."""
    count = columns * rows
    if len(heads) % count:
        raise UserError(
            f"--grid {columns}x{rows} has {count} cells, so it takes a multiple of {count} heads, got {len(heads)}"
        )
    each = len(heads) // count
    return [list(heads[i * each : (i + 1) * each]) for i in range(count)]


def camera_path(
    name: str, frames: int, fov: float, *, zoom: bool = False, reference: bool = False, face: Any = None
) -> Trajectory:
    """A path by its name or from a keyframe file (``.yaml``, ``.yml``, ``.json``).

    ``face``: the model whose training cameras the paths :data:`SPHERE_PATHS` are made of.
    """
    if name in SPHERE_PATHS:
        cameras = sphere_prior(face, f"--trajectory {name}").film(frames, level=SPHERE_PATHS[name])
        assert cameras.angles is not None
        pitch, yaw = cameras.angles.unbind(1)
        return Trajectory(torch.linspace(0, 1, frames), pitch, yaw, torch.full((frames,), float(fov)))
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return keyframe_trajectory(read_keyframes(name, fov), frames)
    if name not in NAMES:
        raise UserError(
            f"unknown trajectory {name!r}, expected one of {', '.join(NAMES)}, for StyleSDF and CNeRF models also "
            f"{', '.join(SPHERE_PATHS)}, or a .yaml or .json file.{nearest(name, (*NAMES, *SPHERE_PATHS))}"
        )
    return trajectory(name, frames, fov, zoom=zoom, reference=reference)


def film_title(seeds: Sequence[int]) -> str:
    """Seeds in the name of a file: all of a few, first, last and number of many."""
    if len(seeds) <= NAMED_HEADS:
        return "-".join(map(str, seeds))
    return f"{seeds[0]}-to-{seeds[-1]}_{len(seeds)}heads"


def render_film(
    face: Any,
    film: Film,
    settings: Any,
    layers: Sequence[str],
    sinks: Sequence[FrameSink],
    shapes: ShapeFolder | None,
    cut: ShapeOptions | None = None,
    show: bool = True,
) -> None:
    """Render all frames into the sinks. Where the heads stand still, scenes and shapes are made once.

    ``cut``: how the shapes of the layer ``shape`` are made; needed for that layer alone. ``show``: a progress bar.
    """
    cameras = face.view.cameras(film.path.pitch, film.path.yaw, film.path.fov).to(face.device)
    order = [number % len(cameras) for number in range(len(film))]
    scene, shown, seen = None, None, None
    told = False  # that a head has no surface
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(total=len(film), unit="frame", show=show))
        for number, codes in enumerate(film.codes()):
            if shown is None or not _same(codes, shown):
                scene, shown = face.scene(codes), codes
                if shapes is not None:
                    shapes.add(face, number, codes)
                if "shape" in layers:
                    assert cut is not None
                    seen = ShapePictures.of(face, codes, cut)
                    if seen.missing and not told:
                        bar.clear()
                        click.echo(f"frame {number}: {seen.missing}; shapes stay white where there is none", err=True)
                        told = True
            picture = pictures.frame(face, scene, cameras[order[number]], settings, layers, film.columns, seen)
            for sink in sinks:
                sink.add(picture)
            bar.update()
    if shapes is not None:
        shapes.save_cameras(cameras[order].label().cpu().numpy())


def _same(first: Codes, second: Codes) -> bool:
    return all(value.equal(second.values[name]) for name, value in first.values.items())
