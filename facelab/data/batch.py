# SPDX-License-Identifier: Apache-2.0
"""What a data set hands to training: pictures with whatever is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from facelab.cameras import Camera


@dataclass(frozen=True)
class Batch:
    """N samples; every field is optional. With a frame axis, each sample has T frames.

    Attributes:
        image: (N, 3, H, W) uint8, or (N, T, 3, H, W).
        label_map: (N, H, W) integers, CelebAMask-HQ classes, or (N, T, H, W).
        camera: N cameras; with a frame axis N * T of them, the frames of one sample together.
        light: (N, 9) second-order spherical harmonics, or (N, T, 9).
        coefficients: (N, C) face model coefficients, or (N, T, C).
        thumbnail: (N, 3, h, w) uint8, the image made small (what a volume renderer's output is compared with).
    """

    image: Tensor | None = None
    label_map: Tensor | None = None
    camera: Camera | None = None
    light: Tensor | None = None
    coefficients: Tensor | None = None
    thumbnail: Tensor | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            if self.image.ndim not in (4, 5) or self.image.shape[-3] != 3 or self.image.dtype != torch.uint8:
                got = f"{tuple(self.image.shape)} {self.image.dtype}"
                raise ValueError(f"image must be uint8 (N, 3, H, W) or (N, T, 3, H, W), got {got}")
        if self.label_map is not None:
            if self.label_map.ndim not in (3, 4) or self.label_map.is_floating_point():
                got = f"{tuple(self.label_map.shape)} {self.label_map.dtype}"
                raise ValueError(f"label_map must be integers (N, H, W) or (N, T, H, W), got {got}")
        if self.thumbnail is not None:
            if self.thumbnail.ndim != 4 or self.thumbnail.shape[1] != 3 or self.thumbnail.dtype != torch.uint8:
                got = f"{tuple(self.thumbnail.shape)} {self.thumbnail.dtype}"
                raise ValueError(f"thumbnail must be uint8 (N, 3, h, w), got {got}")
        sizes = {name: len(value) for name, value in self._present().items() if isinstance(value, Tensor)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of a batch must have one length, got {sizes}")
        if self.camera is not None and sizes and len(self.camera) != len(self) * self.frames:
            raise ValueError(f"expected {len(self) * self.frames} cameras, got {len(self.camera)}")

    def __len__(self) -> int:
        """Number of samples N; 0 for a batch without fields."""
        for value in self._present().values():
            if isinstance(value, Tensor):
                return len(value)
        return 0 if self.camera is None else len(self.camera)

    @property
    def frames(self) -> int:
        """T, or 1 without a frame axis."""
        for value, plain in ((self.image, 4), (self.label_map, 3), (self.light, 2), (self.coefficients, 2)):
            if value is not None:
                return value.shape[1] if value.ndim == plain + 1 else 1
        return 1

    def float_image(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The image in [-1, 1], as networks want it: 0 -> -1, 255 -> 1. ValueError without an image."""
        if self.image is None:
            raise ValueError("this batch has no image")
        return self.image.to(dtype) / 127.5 - 1

    def float_thumbnail(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The thumbnail in [-1, 1], as :meth:`float_image`. ValueError without one."""
        if self.thumbnail is None:
            raise ValueError("this batch has no thumbnail")
        return self.thumbnail.to(dtype) / 127.5 - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Every field on ``device``; dtypes stay."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self._present().items()}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Every field in page-locked memory, for copies that do not block."""
        pinned = {}
        for name, value in self._present().items():
            if isinstance(value, Camera):
                angles = None if value.angles is None else value.angles.pin_memory()
                pinned[name] = Camera(value.cam2world.pin_memory(), value.intrinsics.pin_memory(), angles)
            else:
                pinned[name] = value.pin_memory()
        return replace(self, **pinned)

    def select(self, index: slice | Sequence[int] | Tensor | int) -> Batch:
        """Some of the samples, in the order asked for; an integer keeps the batch axis."""
        rows = torch.arange(len(self))[[index] if isinstance(index, int) else index]
        chosen: dict[str, object] = {}
        for name, value in self._present().items():
            if isinstance(value, Camera):
                frame_rows = (rows[:, None] * self.frames + torch.arange(self.frames)).flatten()
                chosen[name] = value[frame_rows.to(value.device)]
            else:
                chosen[name] = value[rows.to(value.device)]
        return replace(self, **chosen)

    @staticmethod
    def collate(items: Sequence[Batch]) -> Batch:
        """Concatenate along the batch axis. ValueError if a field stands in some items only."""
        if not items:
            raise ValueError("cannot collate an empty list of batches")
        names = set(items[0]._present())
        for item in items:
            if set(item._present()) != names:
                raise ValueError(f"every item must have the fields {sorted(names)}, got {sorted(item._present())}")
        joined: dict[str, Any] = {}
        for name in names:
            values = [getattr(item, name) for item in items]
            joined[name] = Camera.cat(values) if name == "camera" else torch.cat(values)
        return Batch(**joined)

    def _present(self) -> dict[str, Tensor | Camera]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
