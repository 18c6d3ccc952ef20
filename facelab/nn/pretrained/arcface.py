# SPDX-License-Identifier: Apache-2.0
"""ArcFace's IR-SE50: a picture of a face -> a unit vector of who it is (arXiv 1801.07698).

The architecture is ours; tensors of the published names are translated by :func:`arcface_from_published`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from facelab.errors import UserError

SIZE = 112  # pixels the network sees
WIDTH = 512  # of the embedding
GROUPS = ((64, 3), (128, 4), (256, 14), (512, 3))  # channels, blocks; the first block of each halves the picture
FRAME, ROWS, COLUMNS = 256, (35, 223), (32, 220)  # of a portrait framed as FFHQ: the part that holds the face


class _Block(nn.Module):
    """Normalise, 3x3, PReLU, 3x3 with stride, normalise, weigh the channels; plus the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
        self.slope = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm_out = nn.BatchNorm2d(channels)
        self.squeeze = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.excite = nn.Conv2d(channels // 16, channels, 1, bias=False)
        self.stride = stride
        self.widen = None if channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        self.widen_norm = None if channels_in == channels else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_out(self.conv2(self.slope(self.conv1(self.norm_in(x)))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))))
        if self.widen is None or self.widen_norm is None:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        else:
            shortcut = self.widen_norm(self.widen(x))
        return y * gate + shortcut


class ArcFace(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> (N, 512) unit vectors; always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, GROUPS[0][0], 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(GROUPS[0][0])
        self.stem_slope = nn.PReLU(GROUPS[0][0])
        blocks, width = [], GROUPS[0][0]
        for channels, count in GROUPS:
            for number in range(count):
                blocks.append(_Block(width, channels, 2 if number == 0 else 1))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.head_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * (SIZE // 16) ** 2, WIDTH)
        self.out_norm = nn.BatchNorm1d(WIDTH)
        self.eval()

    def train(self, mode: bool = True) -> ArcFace:
        """Stays in evaluation mode: a judge must not move with what it sees."""
        return super().train(False)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps after the stem and after each block. ValueError for another picture size."""
        if x.ndim != 4 or x.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"ArcFace sees (N, 3, {SIZE}, {SIZE}), got {tuple(x.shape)}; see face_part")
        found = [self.stem_slope(self.stem_norm(self.stem(x)))]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def raw(self, x: Tensor) -> Tensor:
        """The embedding before it is normalised, (N, 512)."""
        return self.out_norm(self.head(self.head_norm(self.stages(x)[-1]).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.raw(x)
        return raw / raw.norm(dim=1, keepdim=True)


def face_part(portrait: Tensor) -> Tensor:
    """(N, 3, S, S) portraits framed as FFHQ -> (N, 3, 112, 112): the face without hair and shoulders, area averaged."""
    if portrait.ndim != 4 or portrait.shape[1] != 3:
        raise ValueError(f"portraits must be (N, 3, S, S), got {tuple(portrait.shape)}")
    if portrait.shape[2] != FRAME:
        portrait = nn.functional.adaptive_avg_pool2d(portrait, FRAME)
    return nn.functional.adaptive_avg_pool2d(portrait[:, :, slice(*ROWS), slice(*COLUMNS)], SIZE)


class FaceIdentity(nn.Module):
    """Portraits framed as FFHQ, (N, 3, S, S) in [-1, 1] -> (N, 512) unit vectors.

    Args:
        network: see :func:`arcface_from_published`.
    """

    name = "arcface-ir-se50"

    def __init__(self, network: ArcFace) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, portrait: Tensor) -> Tensor:
        return self.network(face_part(portrait))


def arcface_from_published(tensors: Mapping[str, Tensor], path: Path | None = None) -> ArcFace:
    """Our network with published weights. UserError for tensors of other names or shapes."""
    network, where = ArcFace(), "the tensors" if path is None else str(path)
    state = network.state_dict()
    names = published_names(state)
    for ours, theirs in names.items():
        counter = theirs.endswith("num_batches_tracked")
        if theirs not in tensors or tensors[theirs].shape != state[ours].shape:
            if counter and theirs not in tensors:
                continue
            got = tuple(tensors[theirs].shape) if theirs in tensors else "nothing of that name"
            raise UserError(
                f"{where}: not ArcFace's IR-SE50: {theirs} must be {tuple(state[ours].shape)}, got {got}; "
                "expected model_ir_se50.pth"
            )
        state[ours] = tensors[theirs] if counter else tensors[theirs].float()
    foreign = sorted(set(tensors) - set(names.values()))
    if foreign:
        raise UserError(f"{where}: not ArcFace's IR-SE50: unknown tensor {foreign[0]}; expected model_ir_se50.pth")
    network.load_state_dict(state)
    return network


def published_names(ours: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the published one."""
    stem = {"stem": "input_layer.0", "stem_norm": "input_layer.1", "stem_slope": "input_layer.2"}
    head = {"head_norm": "output_layer.0", "head": "output_layer.3", "out_norm": "output_layer.4"}
    block = {
        "norm_in": "res_layer.0",
        "conv1": "res_layer.1",
        "slope": "res_layer.2",
        "conv2": "res_layer.3",
        "norm_out": "res_layer.4",
        "squeeze": "res_layer.5.fc1",
        "excite": "res_layer.5.fc2",
        "widen": "shortcut_layer.0",
        "widen_norm": "shortcut_layer.1",
    }
    found = {}
    for name in ours:
        parts = name.split(".")
        if parts[0] == "blocks":
            found[name] = f"body.{parts[1]}.{block[parts[2]]}.{parts[3]}"
        else:
            found[name] = f"{(stem | head)[parts[0]]}.{parts[1]}"
    return found
