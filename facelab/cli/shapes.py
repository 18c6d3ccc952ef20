# SPDX-License-Identifier: Apache-2.0
"""Shapes of heads: the files of extract_mesh and render_video, and the shaded pictures of the layer ``shape``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

FORMATS = ("ply", "obj", "glb", "mrc")
MAX_POINTS = 100_000  # field evaluations at a time
FILE_RESOLUTION = 256  # lattice points per side of shapes as files
PICTURE_RESOLUTION = 128  # and of those that are only looked at
TURN_SIZE = 512  # pixels a side of a film of a turning mesh
SUPERSAMPLE = 2  # of shaded pictures, for smooth outlines


@dataclass(frozen=True)
class ShapeOptions:
    """How shapes are cut out of a field.

    Attributes:
        kinds: some of :data:`FORMATS`.
        resolution: lattice points per side.
        cube_size: side of the cube around the origin in scene units, None: what holds a head.
        level: density or signed distance of the surface, None: the usual one.
        max_points: field evaluations at a time.
        sheared: the original's lattice; None: as configured.
        turn: frames of a film of the turning mesh, 0: none.
        aligned: along the rays of the frontal camera, signed distances only.
        blank: in pictures, a head without a surface stays white instead of being an error.
        largest_part: of a mesh, without what floats beside it.
    """

    kinds: tuple[str, ...]
    resolution: int
    cube_size: float | None
    level: float | None
    max_points: int = MAX_POINTS
    sheared: bool | None = None
    turn: int = 0
    aligned: bool = False
    blank: bool = False
    largest_part: bool = False

    def cut(self, face: Any, codes: Any, colored: bool = True) -> Any:
        """The mesh of one head. UserError where the field never crosses the level."""
        from facelab.mesh.parts import largest_part

        mesh = face.extract_mesh(
            code=codes, resolution=self.resolution, cube_size=self.cube_size, level=self.level,
            max_points=self.max_points, reference_lattice=self.sheared, colored=colored, aligned=self.aligned,
        )  # fmt: skip
        return largest_part(mesh) if self.largest_part else mesh


def shape_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--voxel-resolution, --cube-size and --level."""
    for option in (
        click.option(
            "--voxel-resolution",
            type=click.IntRange(8),
            default=None,
            help=f"Lattice points per side. [default: {FILE_RESOLUTION}, in pictures {PICTURE_RESOLUTION}]",
        ),
        click.option(
            "--cube-size", type=float, default=None, help="Side of the cube, scene units. [default: what holds a head]"
        ),
        click.option(
            "--level",
            type=float,
            default=None,
            help="On the surface. [default: density 10; signed distance 0 of StyleSDF and CNeRF]",
        ),
    ):
        function = option(function)
    return function


def given_shape_options() -> list[str]:
    """Those of :func:`shape_options` that stand on the command line, as written."""
    context = click.get_current_context()
    names = ("voxel_resolution", "cube_size", "level")
    given = [name for name in names if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in given]


def parse_formats(text: str) -> tuple[str, ...]:
    """``"ply,mrc"`` -> names of :data:`FORMATS`. UserError with the nearest name otherwise."""
    from facelab.errors import UserError, nearest

    kinds = tuple(k.strip().lstrip(".") for k in text.split(",") if k.strip())
    if not kinds:
        raise UserError(f"no format chosen, expected some of {', '.join(FORMATS)}")
    for kind in kinds:
        if kind not in FORMATS:
            raise UserError(f"unknown format {kind!r}, expected some of {', '.join(FORMATS)}.{nearest(kind, FORMATS)}")
    return kinds


def write_shapes(face: Any, codes: Any, folder: Path, name: str, options: ShapeOptions) -> list[Path]:
    """One head (codes of one scene) as ``<name>.<kind>`` for each kind and perhaps ``<name>_turn.mp4``; returns the paths.

    Raises:
        UserError: the field never crosses the level; names its range.
    """
    from facelab.errors import UserError
    from facelab.mesh.io import save_mesh, save_mrc
    from facelab.mesh.marching_cubes import Lattice, sample_volume

    cube_size = face.head_cube if options.cube_size is None else options.cube_size
    paths = [folder / f"{name}.{kind}" for kind in options.kinds]
    meshes = [path for path in paths if path.suffix != ".mrc"]
    turned: list[Path] = []
    if meshes or options.turn:
        mesh = options.cut(face, codes)
        for path in meshes:
            save_mesh(path, mesh)
        if options.turn:
            turned = [folder / f"{name}_turn.mp4"]
            write_turn(face, mesh, turned[0], options.turn)
    if len(meshes) < len(paths):
        field = face.head_field(codes)
        if options.aligned or (field.is_distance and options.sheared):
            raise UserError("mrc holds a lattice in world axes, expected ply, obj or glb with what is cut along rays")
        configured = getattr(face.config.reference, "sheared_lattice", False)
        lattice = Lattice(options.resolution, cube_size, configured if options.sheared is None else options.sheared)
        values = field.surface().values
        volume = sample_volume(values, lattice, options.max_points, face.device)
        save_mrc(folder / f"{name}.mrc", volume, lattice.voxel_size, lattice.origin)
    return paths + turned


def write_turn(face: Any, mesh: Any, path: Path, frames: int) -> None:
    """A film of a mesh that turns once before the model's frontal camera, white, the lamp fixed to the camera."""
    from facelab.inference.video import open_video
    from facelab.mesh.shading import Surface, turntable

    near, far = face.depth_range
    distance = float(face.camera().cam2world[0, :3, 3].norm())
    surface = Surface.of(mesh, face.device, colored=False)
    with open_video(path) as film:
        for picture in turntable(
            surface, frames, size=TURN_SIZE, radius=distance, fov=face.view.fov, supersample=SUPERSAMPLE,
            near=near, far=far,
        ):  # fmt: skip
            film.add(picture)


@dataclass(frozen=True)
class ShapePictures:
    """Meshes of heads, cut out once and shaded from any camera: the layer ``shape``.

    Attributes:
        surfaces: one for each head; None where a head has no surface.
        limits: nearest and farthest distance from the camera that is seen, scene units, as in the rendering.
        missing: why the first head without a surface has none; None: all have one.
    """

    surfaces: Sequence[Any]
    limits: tuple[float, float]
    missing: str | None = None

    @staticmethod
    def of(face: Any, codes: Any, options: ShapeOptions) -> ShapePictures:
        """The heads of N scenes' codes. UserError where the field never crosses the level, unless ``options.blank``."""
        from facelab.errors import NoSurface
        from facelab.mesh.shading import Surface

        surfaces: list[Any] = []
        missing: str | None = None
        for number in range(len(codes)):
            try:
                surfaces.append(Surface.of(options.cut(face, codes[number], colored=False), face.device))
            except NoSurface as error:
                if not options.blank:
                    raise
                surfaces.append(None)
                missing = missing or str(error).partition(";")[0]
        return ShapePictures(surfaces, face.depth_range, missing)

    def picture(self, camera: Any, size: int) -> Any:
        """(N, 3, size, size) uint8 on the CPU: every head from the first camera, from the second ..."""
        import torch

        from facelab.mesh.shading import PointLight, shade_mesh

        light = PointLight().scaled(float(camera.cam2world[0, :3, 3].norm()))
        near, far = self.limits
        white = torch.full((1, 3, size, size), 255, dtype=torch.uint8)
        shaded = [
            white
            if one is None
            else shade_mesh(one, camera[i], size, light=light, supersample=SUPERSAMPLE, near=near, far=far).cpu()
            for i in range(len(camera))
            for one in self.surfaces
        ]
        return torch.cat(shaded)
