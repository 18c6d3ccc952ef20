# SPDX-License-Identifier: Apache-2.0
"""DPR's hourglass ("Deep Single-Image Portrait Relighting", ICCV 2019): the light in a portrait, and relighting it.

The architecture is ours; tensors of the published names are translated on loading. The estimated light depends on the
narrow half of the network only, which is all that :class:`LightEstimator` holds: nothing of the decoder is computed.
The nine numbers are DPR's: axes and scale are those of :func:`facelab.lighting.to_dpr`.

Shape legend: N pictures, H and W multiples of 16 (DPR was trained on 512 x 512).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab import assets
from facelab.errors import UserError, nearest
from facelab.tensor_files import read_tensor_file

Norm = Literal["running", "picture", "batch"]
WIDTHS = (16, 16, 32, 64, 155)  # of the stem, then after each halving
LIGHT = 27  # channels at the bottom that carry the light
HIDDEN = 128
SIDE = 512  # pixels a side that DPR was trained on
HALVINGS = 4
EXPECTED = "expected DPR's trained_model_03.t7"


class _Down(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.widen = nn.Conv2d(channels_in, channels, 1, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        y = F.relu(_normalised(self.norm1, self.conv1(x), norm))
        y = _normalised(self.norm2, self.conv2(y), norm)
        return F.relu(y + (x if self.widen is None else self.widen(x)))


class _Up(nn.Module):
    """Two 3x3 convolutions with instance norm around a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.widen = nn.Conv2d(channels_in, channels, 1, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(self.conv2(F.relu(F.instance_norm(self.conv1(x)))))
        return F.relu(y + (x if self.widen is None else self.widen(x)))


class _LightPath(nn.Module):
    """Stem, four halvings, and the two layers that read the light."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 5, 1, 2)
        self.stem_norm = nn.BatchNorm2d(WIDTHS[0])
        self.down = nn.ModuleList(_Down(a, b) for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
        self.read1 = nn.Conv2d(LIGHT, HIDDEN, 1, bias=False)
        self.read_slope = nn.PReLU()
        self.read2 = nn.Conv2d(HIDDEN, 9, 1, bias=False)

    def features(self, level: Tensor, norm: Norm) -> list[Tensor]:
        """(N, 1, H, W) lightness in 0..1 -> the features before each halving, then those at the bottom."""
        if level.ndim != 4 or level.shape[1] != 1 or level.shape[2] % 16 or level.shape[3] % 16:
            raise ValueError(f"DPR sees (N, 1, H, W) with sides in multiples of 16, got {tuple(level.shape)}")
        found = [F.relu(_normalised(self.stem_norm, self.stem(level), norm))]
        for block in self.down:
            found.append(block(F.max_pool2d(found[-1], 2), norm))
        return found

    def light(self, bottom: Tensor) -> Tensor:
        """Features at the bottom -> (N, 9)."""
        mean = bottom[:, :LIGHT].mean(dim=(2, 3), keepdim=True)
        return self.read2(self.read_slope(self.read1(mean))).flatten(1)


class LightEstimator(nn.Module):
    """(N, 1, H, W) lightness in 0..1 (values outside are allowed) -> (N, 9) light, in DPR's terms.

    Always in evaluation mode: nothing it sees changes it.

    Args:
        path: the network's narrow half, see :func:`load_light_estimator`; None: random weights.
        norm: statistics of the batch norms: ``running``: those stored with the weights; ``picture``: those of each
            picture alone, FaceDNeRF's choice, which works on one; ``batch``: those of all pictures together.
        side: pictures are brought to this many pixels a side; None: taken as they are.

    Raises:
        ValueError: an unknown ``norm``, or a side that is no multiple of 16.
    """

    name = "dpr"

    def __init__(self, path: _LightPath | None = None, norm: Norm = "running", side: int | None = SIDE) -> None:
        super().__init__()
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}.{nearest(norm, get_args(Norm))}")
        if side is not None and (side < 16 or side % 16):
            raise ValueError(f"side must be a multiple of 16, got {side}")
        self.path = (_LightPath() if path is None else path).requires_grad_(False)
        self.norm: Norm = norm
        self.side = side
        self.eval()

    def train(self, mode: bool = True) -> LightEstimator:
        """Stays in evaluation mode: a judge must not move with what it sees."""
        return super().train(False)

    def forward(self, level: Tensor) -> Tensor:
        if self.side is not None and tuple(level.shape[2:]) != (self.side, self.side):
            smaller = self.side < min(level.shape[2:])
            level = F.interpolate(level, (self.side, self.side), mode="bilinear", antialias=smaller)
        return self.path.light(self.path.features(level, self.norm)[-1])


class DprRelight(nn.Module):
    """The whole hourglass: a portrait's lightness and a wanted light -> relit lightness and the light that was there.

    Args:
        skip: outermost skip connections that are left out (DPR's demonstration: 0).
    """

    def __init__(self, skip: int = 0) -> None:
        super().__init__()
        self.skip = skip
        self.path = _LightPath()
        self.across = nn.ModuleList(_Up(width, width) for width in WIDTHS[:-1])
        self.up = nn.ModuleList(_Up(b, a) for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
        self.write1 = nn.Conv2d(9, HIDDEN, 1, bias=False)
        self.write_slope = nn.PReLU()
        self.write2 = nn.Conv2d(HIDDEN, LIGHT, 1, bias=False)
        width = WIDTHS[0]
        self.tail = nn.ModuleList(nn.Conv2d(width, width, k, 1, k // 2) for k in (3, 1, 1))
        self.tail_norm = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.output = nn.Conv2d(width, 1, 1)

    def forward(self, level: Tensor, light: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, H, W) lightness in 0..1 and (N, 9) wanted light -> (N, 1, H, W) relit in 0..1, (N, 9) light found.

        ValueError for other shapes, or sides that are no multiples of 16.
        """
        if light.shape != (len(level), 9):
            raise ValueError(f"light must be ({len(level)}, 9), got {tuple(light.shape)}")
        features = self.path.features(level, "running")
        bottom = features[-1]
        found = self.path.light(bottom)
        written = F.relu(self.write2(self.write_slope(self.write1(light[:, :, None, None]))))
        x = torch.cat([written.expand(-1, -1, *bottom.shape[2:]), bottom[:, LIGHT:]], dim=1)
        for depth in reversed(range(HALVINGS)):
            x = F.interpolate(self.up[depth](x), scale_factor=2.0, mode="nearest")
            if depth >= self.skip:
                x = x + self.across[depth](features[depth])
        for conv, norm in zip(self.tail, self.tail_norm, strict=True):
            x = F.relu(norm(conv(x)))
        return torch.sigmoid(self.output(x)), found


def _normalised(layer: nn.BatchNorm2d, x: Tensor, norm: Norm) -> Tensor:
    if norm == "running":
        return layer(x)
    if norm == "picture":
        return F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)


# Loading


def load_light_estimator(
    path: str | Path | None = None, norm: Norm = "running", side: int | None = SIDE
) -> LightEstimator:
    """The light estimator with DPR's weights.

    Args:
        path: ``trained_model_03.t7`` or the same tensors as safetensors; None: where facelab looks for weight files.
        norm, side: see :class:`LightEstimator`.

    Raises:
        UserError: no file (the line says where to get it), or a file with other tensors.
    """
    where = assets.find("dpr", path)
    return light_estimator_from_published(_read(where), norm, side, where)


def light_estimator_from_published(
    tensors: Mapping[str, Tensor], norm: Norm = "running", side: int | None = SIDE, path: Path | None = None
) -> LightEstimator:
    """Published tensors (decoder included or not) -> the estimator. UserError for other names or shapes."""
    part = _LightPath()
    part.load_state_dict(_translated(tensors, part.state_dict(), published_light_names(), path))
    return LightEstimator(part, norm, side)


def load_dpr(path: str | Path | None = None) -> DprRelight:
    """The whole hourglass with DPR's weights, in evaluation mode. UserError as :func:`load_light_estimator`."""
    where = assets.find("dpr", path)
    return dpr_from_published(_read(where), where)


def dpr_from_published(tensors: Mapping[str, Tensor], path: Path | None = None, skip: int = 0) -> DprRelight:
    """Published tensors -> the hourglass in evaluation mode. UserError for other names or shapes.

    The published file stores inner blocks under every path that leads to them; the longest one is read.
    """
    net = DprRelight(skip)
    net.load_state_dict(_translated(tensors, net.state_dict(), published_names(), path))
    return net.eval().requires_grad_(False)


def published_light_names() -> dict[str, str]:
    """Our module -> the published one, for the part that reads the light."""
    names = {"stem": "pre_conv", "stem_norm": "pre_bn"}
    parts = {"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2", "widen": "shortcuts"}
    for depth in range(HALVINGS):
        names |= {f"down.{depth}.{ours}": f"{_nested(depth)}.low1.{theirs}" for ours, theirs in parts.items()}
    light = _nested(HALVINGS)
    return names | {
        "read1": f"{light}.predict_FC1",
        "read_slope": f"{light}.predict_relu1",
        "read2": f"{light}.predict_FC2",
    }


def published_names() -> dict[str, str]:
    """Our module -> the published one, for the whole hourglass."""
    names = {f"path.{ours}": theirs for ours, theirs in published_light_names().items()}
    parts = {"conv1": "conv1", "conv2": "conv2", "widen": "shortcuts"}
    for depth in range(HALVINGS):
        for ours, theirs in {"across": "upper", "up": "low2"}.items():
            names |= {f"{ours}.{depth}.{a}": f"{_nested(depth)}.{theirs}.{b}" for a, b in parts.items()}
    light = _nested(HALVINGS)
    names |= {
        "write1": f"{light}.post_FC1",
        "write_slope": f"{light}.post_relu1",
        "write2": f"{light}.post_FC2",
        "output": "output",
    }
    for number in range(3):
        names |= {f"tail.{number}": f"conv_{number + 1}", f"tail_norm.{number}": f"bn_{number + 1}"}
    return names


def published_tensors(names: Mapping[str, str], ours: Mapping[str, Tensor]) -> dict[str, str]:
    """Our tensor -> the published one, from names of modules."""
    return {name: f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in ours}


def _nested(depth: int) -> str:
    return "HG3" + ".middle" * depth


def _read(path: Path) -> dict[str, Tensor]:
    content = read_tensor_file(path, "DPR's trained_model_03.t7", "check the path or get it again")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors; {EXPECTED}")
    return tensors


def _translated(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Mapping[str, str], path: Path | None
) -> dict[str, Tensor]:
    where = "the tensors" if path is None else str(path)
    found = {}
    for ours, theirs in published_tensors(names, state).items():
        value = tensors.get(theirs)
        if value is None and theirs.endswith("num_batches_tracked"):
            found[ours] = state[ours]
            continue
        if value is None or value.shape != state[ours].shape:
            got = "nothing of that name" if value is None else str(tuple(value.shape))
            raise UserError(
                f"{where}: not DPR's network: {theirs} must be {tuple(state[ours].shape)}, got {got}; {EXPECTED}"
            )
        found[ours] = value.detach().to(state[ours].dtype)
    return found
