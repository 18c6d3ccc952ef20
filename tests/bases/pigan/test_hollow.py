# SPDX-License-Identifier: Apache-2.0
"""Mirrored depth: parallel lines of sight see the same values at mirrored poses."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.bases.pigan.hollow import mirror_depth_of_field, mirror_pose_head
from facelab.bases.pigan.model import LatentConfig, SirenGenerator, SirenGeneratorConfig
from facelab.cameras import Camera
from facelab.fields.siren import SirenConfig
from facelab.nn.discriminators import DiscriminatorConfig, ProgressiveDiscriminator


def generator(**changes) -> SirenGenerator:
    config = SirenGeneratorConfig(SirenConfig(hidden=16, geometry_layers=3, **changes), {"z": LatentConfig(4)}, 8)
    made = SirenGenerator(config)
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


def test_the_field_is_reflected_and_directions_turn_with_it() -> None:
    hollow, face = generator(), generator()
    face.load_state_dict(mirror_depth_of_field(hollow.state_dict(), hollow.config.field))
    code = hollow.map({"z": torch.randn(1, 4, generator=torch.Generator().manual_seed(1))})
    points = torch.randn(1, 7, 5, 3, generator=torch.Generator().manual_seed(2)) * 0.1
    directions = torch.nn.functional.normalize(torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(3)), dim=-1)
    before = hollow.field(hollow.scene(code))(points, directions)
    after = face.field(face.scene(code))(points * torch.tensor([1, 1, -1]), directions * torch.tensor([-1, -1, 1]))
    torch.testing.assert_close(after.sigma, before.sigma)
    torch.testing.assert_close(after.rgb, before.rgb)


def test_a_camera_on_the_mirrored_side_looks_along_the_same_lines() -> None:
    """Reflecting z turns the line of sight of pose pi - yaw into that of yaw, walked the other way."""
    pitch, yaw = math.pi / 2 + 0.2, math.pi / 2 + 0.3
    one, other = Camera.on_sphere(pitch, yaw, 12), Camera.on_sphere(math.pi - pitch, math.pi - yaw, 12)
    reflected = other.cam2world[0, :3, 2] * torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(reflected, -one.cam2world[0, :3, 2])


def test_the_pose_head_reads_the_mirrored_pose_and_nothing_else_changes() -> None:
    config = DiscriminatorConfig(channels=(4, 4, 4), latents={"z": 3}, pose=True)
    one, other = ProgressiveDiscriminator(config), ProgressiveDiscriminator(config)
    other.load_state_dict(mirror_pose_head(one.state_dict()))
    picture = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    a, b = one(picture), other(picture)
    assert a.pose is not None and b.pose is not None
    torch.testing.assert_close(b.pose, math.pi - a.pose)
    torch.testing.assert_close(b.realness, a.realness)
    torch.testing.assert_close(b.latents["z"], a.latents["z"])


def test_a_latent_grid_is_refused() -> None:
    grid = generator(grid_branch="color", grid_size=(2, 2, 2))
    with pytest.raises(ValueError, match="latent grid"):
        mirror_depth_of_field(grid.state_dict(), grid.config.field)
