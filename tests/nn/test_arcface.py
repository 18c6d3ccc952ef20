# SPDX-License-Identifier: Apache-2.0
"""ArcFace's loader: what it refuses, and that the network never leaves evaluation mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facelab.errors import UserError
from facelab.metrics.features import read_tensor_file
from facelab.nn.pretrained.arcface import ArcFace, FaceIdentity, arcface_from_published, face_part, published_names


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ours = ArcFace().state_dict()
    return {theirs: ours[name] for name, theirs in published_names(ours).items()}


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(published, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "w.pth")
    net = FaceIdentity(arcface_from_published(read_tensor_file(tmp_path / "w.pth"))).train()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = net(pictures)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(net(pictures[1:]), both[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_foreign_tensors_are_refused_in_one_line(published, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tensor extra"):
        arcface_from_published({**published, "extra": torch.zeros(1)})
    name = "body.3.shortcut_layer.0.weight"
    with pytest.raises(UserError, match=f"{name} must be"):
        arcface_from_published({**published, name: torch.zeros(1)})
    with pytest.raises(UserError, match="nothing of that name"):
        arcface_from_published({k: v for k, v in published.items() if k != name})
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        read_tensor_file(tmp_path / "w.pth")
    with pytest.raises(UserError, match="no such weight file"):
        read_tensor_file(tmp_path / "none.pth")


def test_face_part_is_the_middle_of_a_portrait() -> None:
    portrait = torch.zeros(1, 3, 256, 256)
    portrait[:, :, 35:223, 32:220] = 1
    assert face_part(portrait).min() == 1
    portrait[:, :, 34] = 5
    portrait[:, :, :, 220] = 5
    assert face_part(portrait).max() == 1
    with pytest.raises(ValueError, match="112"):
        ArcFace()(portrait)
