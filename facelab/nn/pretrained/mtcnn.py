# SPDX-License-Identifier: Apache-2.0
"""MTCNN: three small networks that find faces and five points in each.

Zhang, Zhang, Li, Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional
Networks", 2016. A network of 12 pixels proposes boxes on a pyramid, one of 24 pixels refines them, one
of 48 pixels refines them again and gives the points. The weights (MIT, 2 MB) are three files inside the
package facenet-pytorch; they are read by path with ``weights_only``, the package is never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelab.errors import UserError
from facelab.tensor_files import read_tensor_file

FILES = ("pnet.pt", "rnet.pt", "onet.pt")
PACKAGE, MODULE = "facenet-pytorch", "facenet_pytorch"
INSTALL = "pip install --no-deps facenet-pytorch"
PYRAMID_STEP = 0.709  # about sqrt(1/2): the area halves from level to level
CELL, STRIDE = 12, 2  # receptive field and stride of the proposal network in pixels
BATCH = 512  # crops per pass of the second and third network


class ProposalNet(nn.Module):
    """(N, 3, H, W) -> face probability (N, h, w) and box corrections (N, 4, h, w); fully convolutional, stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(image)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(dim=1)[:, 1], self.conv4_2(x)


class RefineNet(nn.Module):
    """(N, 3, 24, 24) -> face probability (N,) and box corrections (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(image)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return self.dense5_1(x).softmax(dim=1)[:, 1], self.dense5_2(x)


class OutputNet(nn.Module):
    """(N, 3, 48, 48) -> face probability (N,), box corrections (N, 4), points (N, 5, 2) in 0..1 of the box."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(image)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        points = self.dense6_3(x).view(-1, 2, 5).transpose(1, 2)
        return self.dense6_1(x).softmax(dim=1)[:, 1], self.dense6_2(x), points


def _flatten(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, W * H * C): the weights come from a column-major framework."""
    return x.permute(0, 3, 2, 1).flatten(1)


@dataclass(frozen=True)
class MtcnnFaces:
    """Faces of one picture, best first.

    Attributes:
        boxes: (K, 4) left, top, right, bottom in pixels; may reach over the border.
        scores: (K,) probability.
        points: (K, 5, 2) pixels: picture-left eye, picture-right eye, nose tip, left and right mouth corner.
    """

    boxes: Tensor
    scores: Tensor
    points: Tensor


class Mtcnn(nn.Module):
    """The cascade.

    Args:
        min_size: smallest face looked for, in pixels of the picture given.
        thresholds: probabilities that a box must reach in the three networks.
    """

    def __init__(self, min_size: int = 20, thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)) -> None:
        super().__init__()
        if min_size < CELL:
            raise ValueError(f"min_size must be at least {CELL} pixels, got {min_size}")
        self.min_size, self.thresholds = min_size, thresholds
        self.propose, self.refine, self.output = ProposalNet(), RefineNet(), OutputNet()

    @staticmethod
    def from_files(folder: str | Path | None = None, **options) -> Mtcnn:
        """Read ``pnet.pt``, ``rnet.pt``, ``onet.pt`` from a folder (None: the installed package's).

        Raises:
            UserError: no such folder or files, or files with other tensors.
        """
        folder = find_weights() if folder is None else Path(folder)
        model = Mtcnn(**options)
        for name, net in zip(FILES, (model.propose, model.refine, model.output), strict=True):
            _load(net, folder / name)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def detect(self, image: Tensor) -> MtcnnFaces:
        """Find the faces of one picture.

        Args:
            image: (3, H, W) uint8 or float, RGB, 0..255.

        Raises:
            ValueError: another shape.
        """
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"expected a picture (3, H, W), got {tuple(image.shape)}")
        weight = self.propose.conv1.weight
        scaled = (image.to(weight) - 127.5) / 128.0
        boxes = self._proposals(scaled)
        return self._third(scaled, self._second(scaled, boxes))

    def _proposals(self, image: Tensor) -> Tensor:
        """(3, H, W) -> (K, 4) squares from all levels of the pyramid."""
        height, width = image.shape[1:]
        scale = CELL / self.min_size
        found = [(image.new_zeros(0, 4), image.new_zeros(0), image.new_zeros(0, 4))]
        while min(height, width) * scale >= CELL:
            size = (int(height * scale + 1), int(width * scale + 1))
            level = F.interpolate(image[None], size=size, mode="area")
            probability, correction = self.propose(level)
            row, column = (probability[0] >= self.thresholds[0]).nonzero(as_tuple=True)
            score = probability[0, row, column]
            corner = torch.stack([column, row], dim=-1).to(image)
            low, high = (STRIDE * corner + 1) / scale, (STRIDE * corner + CELL) / scale
            boxes = torch.cat([low.floor(), high.floor()], dim=-1)
            keep = suppress(boxes, score, 0.5)
            found.append((boxes[keep], score[keep], correction[0, :, row, column].T[keep]))
            scale *= PYRAMID_STEP
        boxes, scores, corrections = (torch.cat(parts) for parts in zip(*found))
        keep = suppress(boxes, scores, 0.7)
        return _squares(_corrected(boxes[keep], corrections[keep], margin=0))

    def _second(self, image: Tensor, boxes: Tensor) -> Tensor:
        """(K, 4) -> the squares that stay, refined."""
        if not len(boxes):
            return boxes
        results = [self.refine(part) for part in _crops(image, boxes, 24).split(BATCH)]
        score, correction = (torch.cat(parts) for parts in zip(*results))
        sure = score > self.thresholds[1]
        boxes, score, correction = boxes[sure], score[sure], correction[sure]
        keep = suppress(boxes, score, 0.7)
        return _squares(_corrected(boxes[keep], correction[keep]))

    def _third(self, image: Tensor, boxes: Tensor) -> MtcnnFaces:
        if not len(boxes):
            return MtcnnFaces(boxes, boxes.new_zeros(0), boxes.new_zeros(0, 5, 2))
        results = [self.output(part) for part in _crops(image, boxes, 48).split(BATCH)]
        score, correction, points = (torch.cat(parts) for parts in zip(*results))
        sure = score > self.thresholds[2]
        boxes, score, correction, points = boxes[sure], score[sure], correction[sure], points[sure]
        side = boxes[:, None, 2:] - boxes[:, None, :2] + 1
        points = boxes[:, None, :2] + points * side - 1
        boxes = _corrected(boxes, correction)
        keep = suppress(boxes, score, 0.7, of_smaller=True)
        return MtcnnFaces(boxes[keep], score[keep], points[keep])


def suppress(boxes: Tensor, scores: Tensor, threshold: float, of_smaller: bool = False) -> Tensor:
    """Non-maximum suppression -> indices kept, best first.

    Args:
        boxes: (K, 4), corners in pixels (a box of one pixel has equal corners).
        scores: (K,).
        threshold: largest overlap allowed: intersection over union, or over the smaller box.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(dim=1)
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    keep = []
    for k in range(len(boxes)):
        if not alive[k]:
            continue
        keep.append(k)
        low = torch.maximum(boxes[k, :2], boxes[k + 1 :, :2])
        high = torch.minimum(boxes[k, 2:], boxes[k + 1 :, 2:])
        common = (high - low + 1).clamp(min=0).prod(dim=1)
        base = torch.minimum(area[k], area[k + 1 :]) if of_smaller else area[k] + area[k + 1 :] - common
        alive[k + 1 :] &= common <= threshold * base
    return order[torch.tensor(keep, dtype=torch.int64, device=boxes.device)]


def _corrected(boxes: Tensor, correction: Tensor, margin: int = 1) -> Tensor:
    side = boxes[:, 2:] - boxes[:, :2] + margin
    return boxes + correction * torch.cat([side, side], dim=1)


def _squares(boxes: Tensor) -> Tensor:
    side = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    low = (boxes[:, :2] + boxes[:, 2:]) / 2 - side / 2
    return torch.cat([low, low + side], dim=1)


def _crops(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(3, H, W), (K, 4) -> (K, 3, size, size), area-averaged; boxes are cut at the border."""
    height, width = image.shape[1:]
    low, high = boxes[:, :2].trunc().long() - 1, boxes[:, 2:].trunc().long()
    crops = image.new_zeros(len(boxes), 3, size, size)
    for k, ((left, top), (right, bottom)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if left < right and top < bottom:
            crops[k] = F.interpolate(image[None, :, top:bottom, left:right], size=(size, size), mode="area")[0]
    return crops


def find_weights() -> Path:
    """The folder of the weight files in the installed package, without importing it.

    Raises:
        UserError: the package is not installed or holds no such files.
    """
    folders = []
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
        folders.append(Path(str(distribution.locate_file(f"{MODULE}/data"))))
    except importlib.metadata.PackageNotFoundError:
        pass
    spec = importlib.util.find_spec(MODULE)
    folders += [Path(place) / "data" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if all((folder / name).is_file() for name in FILES):
            return folder
    raise UserError(
        f"no MTCNN weights: expected {', '.join(FILES)} in the package {PACKAGE}, got no such files; "
        f"install them with '{INSTALL}', or give landmarks from files or another detector"
    )


def _load(net: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}: expected MTCNN weights; install them with '{INSTALL}'")
    state = read_tensor_file(path, "MTCNN weights", f"reinstall with '{INSTALL}'")
    try:
        net.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: expected MTCNN weights, got a file that does not fit ({reason}); reinstall with '{INSTALL}'"
        ) from error
