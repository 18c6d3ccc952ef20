# SPDX-License-Identifier: Apache-2.0
"""EG3D's shape extraction, and its whole generator, built from the original's arguments and filled by its key names.

The cases need our ``reference`` switch (depths clamped to the range of the batch).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
    settings_from_original,
)
from facelab.bases.eg3d.shapes import cross_section_points
from facelab.cameras import Camera
from facelab.draws import TapeDraws
from facelab.mesh.marching_cubes import Lattice, mesh_from_volume
from tests.golden.harness import Arrays, Meta, detfill, given


def build(meta: Meta) -> TriPlaneGenerator:
    """Our generator of the case's architecture with the case's weights, which pass through the renaming."""
    c: dict[str, Any] = dict(meta["config"])
    kwargs = c.pop("rendering_kwargs")
    c["mapping_kwargs"] = {"num_layers": c.pop("mapping_num_layers")}
    config = generator_config_from_original(c, kwargs)
    assert config.image_resolution(c["neural_rendering_resolution"]) == c["img_resolution"]
    generator = TriPlaneGenerator(config).eval()
    shapes = {key: tuple(value.shape) for key, value in generator_to_original(generator).items()}
    weights = detfill(shapes, meta["detfill_seed"], meta["rules"])
    generator.load_state_dict(generator_from_original(weights, generator))
    return generator


@given("z", "c", "c_cond", "u_coarse", "u_fine", "points")
@torch.no_grad()
def triplane(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    c, run = meta["config"], meta["runs"]
    generator = build(meta)
    codes = generator.map({"z": arrays["z"]}, arrays["c_cond"], run["truncation_psi"], run["truncation_cutoff"])
    scene = generator.scene(codes, run["noise_mode"])
    camera = Camera.from_label(arrays["c"])
    settings = settings_from_original(c["rendering_kwargs"], c["neural_rendering_resolution"], reference=True)
    tape = TapeDraws(tape={"jitter": arrays["u_coarse"], "importance": arrays["u_fine"]})
    output = generator.render(scene, camera, settings, tape)
    depth = generator.render_volume(scene, camera, settings, tape).mean_depth
    points = generator.field(scene)(arrays["points"][:, :, None], arrays["points"])
    assert output.raw_rgb is not None and points.features is not None and depth is not None
    side, crop, stride = output.rgb.shape[-1], run["image_crop"], c["stride"]
    low = (side - crop) // 2
    strides = run["planes_strides"]
    return {
        "ws_first": codes.values["w"][:, 0],
        "ws_last": codes.values["w"][:, -1],
        "planes_strided": scene.parts["planes"].flatten(1, 2)[:, :: strides[0], :: strides[1], :: strides[2]],
        "image_strided": output.rgb[:, :, ::stride, ::stride],
        "image_crop": output.rgb[:, :, low : low + crop, low : low + crop],
        "image_raw": output.raw_rgb,
        "image_depth": depth.transpose(1, 2).unflatten(2, output.raw_rgb.shape[-2:]),
        "sample_sigma": points.sigma[:, :, 0],
        "sample_rgb": points.features[:, :, 0, : run["sample_rgb_channels"]],
    }


@given("volume")
def shapes(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """The sheared lattice is our ``reference``; the mesh is in voxels as the original's."""
    c = meta["config"]
    lattice = Lattice(meta["N"], c["cube_length"], reference=True)
    volume = arrays["volume"].numpy()
    voxels = Lattice(len(volume), len(volume) - 1.0)  # one scene unit a voxel, around the origin
    mesh = mesh_from_volume(volume.transpose(2, 1, 0), voxels, c["level"])
    vertices, corners = mesh.vertices - voxels.origin, (mesh.vertices - voxels.origin)[mesh.faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area, inside = np.linalg.norm(normals, axis=-1).sum() / 2, (corners[:, 0] * normals).sum() / 6
    return {
        "samples": lattice.points(0, len(lattice))[None],
        "origin": torch.full((3,), lattice.origin),
        "voxel_size": torch.tensor(lattice.voxel_size),
        "cross_section_coords": cross_section_points(c["cross_section_resolution"], c["cross_section_w"])[None],
        "mesh_bbox": torch.from_numpy(np.stack([vertices.min(0), vertices.max(0)])),
        "mesh_counts": torch.tensor([len(mesh.vertices), len(mesh.faces)]),
        "mesh_area_volume": torch.tensor([area, inside]),
    }


ADAPTERS = {"eg3d/shapes": shapes, **{f"eg3d/triplane_{kind}": triplane for kind in ("2x", "4x", "8xdc")}}
