# SPDX-License-Identifier: Apache-2.0
"""TorchScript archives: tensors out, code untouched."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.checkpoints.torchscript import read_torchscript
from facelab.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore:torch.tensor results are registered"),
]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.lpips0 = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.sizes = [1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x - self.mean) * self.lpips0 + torch.tensor([1.0, 2.0]).sum()


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_of_an_archive(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    net = _Net().eval()
    with torch.no_grad():
        archive = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.zeros(1, 3, 8, 8))
    archive.to(dtype).save(str(tmp_path / "net.pt"))
    tensors = read_torchscript(tmp_path / "net.pt")
    expected = archive.state_dict()
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith("constants.")}
    assert sorted(named) == sorted(expected)
    assert all(torch.equal(named[k], v) and named[k].dtype == v.dtype for k, v in expected.items())
    order = [name for name in named if name.startswith("layers.")]
    assert order[:2] == ["layers.0.weight", "layers.0.bias"]
    if how == "trace":  # tracing lifts the tensor made inside forward into the constants
        assert any(torch.equal(t, torch.tensor([1.0, 2.0])) for n, t in tensors.items() if n.startswith("constants."))


def test_code_in_the_archive_is_not_even_read(tmp_path: Path) -> None:
    torch.jit.script(_Net()).save(str(tmp_path / "net.pt"))
    with zipfile.ZipFile(tmp_path / "net.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"\xff garbage" if "/code/" in info.filename else old.read(info))
    assert "lpips0" in read_torchscript(tmp_path / "b.pt")


def test_hostile_damaged_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(_Net()).save(str(path))
    with pytest.raises(UserError, match="read_torchscript"):
        read_pickle_checkpoint(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            data = b"cos\nsystem\n(S'true'\ntR." if info.filename.endswith("/data.pkl") else old.read(info)
            new.writestr(info.filename, data)
    with pytest.raises(UserError, match=r"b\.pt was not read: .*'os\.system'"):
        read_torchscript(tmp_path / "b.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"net\.pt was not read"):
        read_torchscript(path)
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"constants\.pkl"):
        read_torchscript(path)
    with pytest.raises(UserError, match="cannot read"):
        read_torchscript(tmp_path / "nothing.pt")
