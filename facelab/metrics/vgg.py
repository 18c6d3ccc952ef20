# SPDX-License-Identifier: Apache-2.0
"""The 4096 features of VGG16's second fully connected layer, for precision and recall (arXiv 1904.06991)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from facelab.errors import UserError
from facelab.metrics.features import check_pictures, read_tensor_file

SIZE = 224
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: halve by maxima
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for pictures in 0..1
FEATURES = 4096


class VggFeatures(nn.Module):
    """uint8 pictures -> (N, 4096) features of VGG16 after the ReLU of its second fully connected layer.

    Pictures are resized to 224 px (bilinear, antialiased) and standardised with ImageNet's numbers.

    Accepted are the parameter names of ``torchvision.models.vgg16`` (``features.0.weight`` ...
    ``classifier.3.bias``) and those of the TorchScript file that StyleGAN's metrics use
    (``layers.conv1.weight`` ... ``layers.fc2.bias``), of which only tensors are read.

    Args:
        path: the local file.

    Raises:
        UserError: the file is missing, damaged, or another network.
    """

    name = "vgg16-fc2/224"
    frechet_name = "frechet_vgg"
    kernel_name = "kernel_vgg"
    dimension = FEATURES

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        layers, width = [], 3
        for channels in WIDTHS:
            if channels:
                layers += [nn.Conv2d(width, channels, 3, 1, 1), nn.ReLU()]
                width = channels
            else:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.fc1 = nn.Linear(width * 7 * 7, FEATURES)
        self.fc2 = nn.Linear(FEATURES, FEATURES)
        self.load_state_dict(_published(read_tensor_file(path), self.state_dict(), Path(path)))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        x = nn.functional.interpolate(pictures.float() / 255, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        mean, deviation = (x.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        x = self.body((x - mean) / deviation).flatten(1)
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))


def published_names(ours: Mapping[str, Tensor], torchscript: bool) -> dict[str, str]:
    """Our name -> the name in torchvision's file, or in the TorchScript file of StyleGAN's metrics."""
    convolutions = sorted({int(n.split(".")[1]) for n in ours if n.startswith("body.")})
    found = {}
    for name in ours:
        module, _, kind = name.rpartition(".")
        if module.startswith("body."):
            place = int(module.split(".")[1])
            theirs = f"layers.conv{convolutions.index(place) + 1}" if torchscript else f"features.{place}"
        else:
            theirs = f"layers.{module}" if torchscript else {"fc1": "classifier.0", "fc2": "classifier.3"}[module]
        found[name] = f"{theirs}.{kind}"
    return found


def _published(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = published_names(expected, "layers.conv1.weight" in tensors)
    state = {}
    for ours, theirs in names.items():
        if theirs not in tensors or tensors[theirs].shape != expected[ours].shape:
            got = tuple(tensors[theirs].shape) if theirs in tensors else "nothing of that name"
            raise UserError(
                f"{path} is not VGG16: {theirs} must be {tuple(expected[ours].shape)}, got {got}; "
                "expected the names of torchvision's vgg16 or of StyleGAN's vgg16.pt"
            )
        state[ours] = tensors[theirs].float()
    return state
