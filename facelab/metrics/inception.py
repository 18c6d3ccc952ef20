# SPDX-License-Identifier: Apache-2.0
"""The Inception v3 network (Szegedy et al., arXiv 1512.00567) up to its 2048 pooled features.

Parameter names are those of ``torchvision.models.inception_v3``, which ports of the FID network
use as well. The FID network differs from torchvision's in its pooling branches: average pools
leave the padding out of the count, and the last block (Mixed_7c) takes the maximum instead.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["fid", "torchvision"]
# one convolution: name, channels out, kernel (height, width), stride, padded to keep the size or not
Step = tuple[str, int, tuple[int, int], int, bool]
# a path through a block: convolutions in turn; a list of two works side by side on the same input
Path = list[Step | list[Step]]


def _step(name: str, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = True) -> Step:
    return (name, channels, (kernel, kernel) if isinstance(kernel, int) else kernel, stride, same)


def _paths_a() -> list[Path]:
    return [
        [_step("branch1x1", 64)],
        [_step("branch5x5_1", 48), _step("branch5x5_2", 64, 5)],
        [_step("branch3x3dbl_1", 64), _step("branch3x3dbl_2", 96, 3), _step("branch3x3dbl_3", 96, 3)],
    ]


def _paths_b() -> list[Path]:
    double = [_step("branch3x3dbl_1", 64), _step("branch3x3dbl_2", 96, 3)]
    return [
        [_step("branch3x3", 384, 3, 2, same=False)],
        [*double, _step("branch3x3dbl_3", 96, 3, 2, same=False)],
    ]


def _paths_c(width: int) -> list[Path]:
    row, column = (1, 7), (7, 1)
    double = [_step("branch7x7dbl_1", width), _step("branch7x7dbl_2", width, column)]
    double += [_step("branch7x7dbl_3", width, row), _step("branch7x7dbl_4", width, column)]
    return [
        [_step("branch1x1", 192)],
        [_step("branch7x7_1", width), _step("branch7x7_2", width, row), _step("branch7x7_3", 192, column)],
        [*double, _step("branch7x7dbl_5", 192, row)],
    ]


def _paths_d() -> list[Path]:
    seven = [_step("branch7x7x3_1", 192), _step("branch7x7x3_2", 192, (1, 7)), _step("branch7x7x3_3", 192, (7, 1))]
    return [
        [_step("branch3x3_1", 192), _step("branch3x3_2", 320, 3, 2, same=False)],
        [*seven, _step("branch7x7x3_4", 192, 3, 2, same=False)],
    ]


def _paths_e() -> list[Path]:
    def fork(name: str) -> list[Step]:
        return [_step(f"{name}a", 384, (1, 3)), _step(f"{name}b", 384, (3, 1))]

    return [
        [_step("branch1x1", 320)],
        [_step("branch3x3_1", 384), fork("branch3x3_2")],
        [_step("branch3x3dbl_1", 448), _step("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
    ]


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, step: Step) -> None:
        super().__init__()
        _, channels, kernel, stride, same = step
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Parallel paths and a pooling path, concatenated in this order.

    ``pool_channels`` = 0 means a maximum pool with stride 2 and no convolution behind it.
    """

    def __init__(self, channels_in: int, paths: list[Path], pool_channels: int, pool: str) -> None:
        super().__init__()
        self._paths: list[list[list[str]]] = []
        self.channels = pool_channels or channels_in
        for path in paths:
            names, width = [], channels_in
            for stage in path:
                steps = stage if isinstance(stage, list) else [stage]
                for step in steps:
                    self.add_module(step[0], _Conv(width, step))
                names.append([step[0] for step in steps])
                width = sum(step[1] for step in steps)
            self._paths.append(names)
            self.channels += width
        self._pool = pool
        if pool_channels:
            self.branch_pool = _Conv(channels_in, _step("branch_pool", pool_channels))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self._paths:
            y = x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self._pool == "down":
            return nn.functional.max_pool2d(x, 3, 2)
        if self._pool == "max":
            return self.branch_pool(nn.functional.max_pool2d(x, 3, 1, 1))
        average = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=self._pool == "average_with_padding")
        return self.branch_pool(average)


class InceptionV3(nn.Module):
    """(N, 3, 299, 299) in [-1, 1] -> (N, 2048) features before the classifier; always in evaluation mode."""

    def __init__(self, pooling: Pooling = "fid") -> None:
        super().__init__()
        if pooling not in ("fid", "torchvision"):
            raise ValueError(f"pooling must be 'fid' or 'torchvision', got {pooling!r}")
        average = "average" if pooling == "fid" else "average_with_padding"
        self.Conv2d_1a_3x3 = _Conv(3, _step("", 32, 3, 2, same=False))
        self.Conv2d_2a_3x3 = _Conv(32, _step("", 32, 3, same=False))
        self.Conv2d_2b_3x3 = _Conv(32, _step("", 64, 3))
        self.Conv2d_3b_1x1 = _Conv(64, _step("", 80))
        self.Conv2d_4a_3x3 = _Conv(80, _step("", 192, 3, same=False))
        self._blocks: list[str] = []
        channels = 192
        for name, paths, pool_channels, pool in (
            ("Mixed_5b", _paths_a(), 32, average),
            ("Mixed_5c", _paths_a(), 64, average),
            ("Mixed_5d", _paths_a(), 64, average),
            ("Mixed_6a", _paths_b(), 0, "down"),
            ("Mixed_6b", _paths_c(128), 192, average),
            ("Mixed_6c", _paths_c(160), 192, average),
            ("Mixed_6d", _paths_c(160), 192, average),
            ("Mixed_6e", _paths_c(192), 192, average),
            ("Mixed_7a", _paths_d(), 0, "down"),
            ("Mixed_7b", _paths_e(), 192, average),
            ("Mixed_7c", _paths_e(), 192, "max" if pooling == "fid" else average),
        ):
            block = _Block(channels, paths, pool_channels, pool)
            self.add_module(name, block)
            self._blocks.append(name)
            channels = block.channels
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InceptionV3:
        """Stays in evaluation mode: its normalisation statistics are part of the metric."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, 299, 299):
            raise ValueError(f"Inception takes (N, 3, 299, 299), got {tuple(x.shape)}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = nn.functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = nn.functional.max_pool2d(x, 3, 2)
        for name in self._blocks:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))
