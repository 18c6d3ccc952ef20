# SPDX-License-Identifier: Apache-2.0
"""Feature networks for picture distances, and the distances of two picture sets.

Only the FID Inception network gives numbers called ``fid`` and ``kid``. Without its file there is
a fixed network with random weights, whose numbers are called ``frechet_random`` and
``kernel_random``: they compare models with each other, never with published FIDs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from facelab import tensor_files
from facelab.errors import UserError
from facelab.metrics.frechet import FeatureStats, frechet_distance
from facelab.metrics.inception import InceptionV3
from facelab.metrics.kernel import kernel_distance

Resize = Literal["pytorch-fid", "clean"]
INCEPTION_SIZE = 299
FID_CLASSES = 1008  # the FID network's classifier; ImageNet ports have 1000


class FeatureNet(Protocol):
    """uint8 pictures -> feature vectors.

    Attributes:
        name: identifies weights and preprocessing, stored beside every number.
        frechet_name: what the Frechet distance of these features is called.
        kernel_name: what the kernel distance is called.
        dimension: width of a feature vector.
    """

    name: str
    frechet_name: str
    kernel_name: str
    dimension: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, dimension) float32 on the same device."""
        ...


class RandomFeatureNet(nn.Module):
    """A convolutional network whose weights are a pure function of ``seed``.

    Computed in float32 on the CPU and in float64 elsewhere (where float32 may be rounded to TF32),
    so that devices agree to about six digits.

    Pictures are scaled to [-1, 1] and resized to 64 px (bilinear, antialiased). Four times: 3x3
    convolution, ReLU, halving by averages. The 512 features are the mean and deviation of the 32
    maps of the first stage, the means of the second (64) and third (128), and the 64 maps of the
    fourth averaged over each quarter of the picture.
    """

    name = "random-conv-v1"
    frechet_name = "frechet_random"
    kernel_name = "kernel_random"
    dimension = 512
    channels = (32, 64, 128, 64)
    size = 64

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        if seed != 0:
            self.name = f"{type(self).name}-seed{seed}"
        width = 3
        for number, channels in enumerate(self.channels):
            # numpy's PCG64 keeps its stream across versions and platforms
            numbers = np.random.Generator(np.random.PCG64([seed, number]))
            weight = numbers.standard_normal((channels, width, 3, 3)) * np.sqrt(2 / (9 * width))
            bias = numbers.standard_normal(channels) * 0.1
            self.register_buffer(f"weight_{number}", torch.from_numpy(weight.astype(np.float32)))
            self.register_buffer(f"bias_{number}", torch.from_numpy(bias.astype(np.float32)))
            width = channels

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        precision = torch.float32 if pictures.device.type == "cpu" else torch.float64
        x = pictures.to(precision) / 127.5 - 1
        x = nn.functional.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        features = []
        for number in range(len(self.channels)):
            weight, bias = self.get_buffer(f"weight_{number}").to(x), self.get_buffer(f"bias_{number}").to(x)
            x = torch.relu(nn.functional.conv2d(x, weight, bias, padding=1))
            last = number == len(self.channels) - 1
            features.append(nn.functional.adaptive_avg_pool2d(x, 2 if last else 1).flatten(1))
            if number == 0:
                features.append(x.std(dim=(2, 3), correction=0))
            x = nn.functional.avg_pool2d(x, 2)
        return torch.cat(features, dim=1).float()


class InceptionFeatures(nn.Module):
    """The 2048 features of the FID Inception network (TensorFlow's of 2015-12-05), from a local file.

    The architecture is ours; of the file only tensors are read, nothing in it is executed.
    Accepted is a state dictionary with the parameter names of ``torchvision.models.inception_v3``
    (``Conv2d_1a_3x3.conv.weight`` ... ``Mixed_7c.branch_pool.bn.running_var``) and a classifier
    ``fc.weight`` of 1008 rows, which is how pytorch-fid publishes the FID weights
    (``pt_inception-2015-12-05-6726825d.pth``), as .pth, .safetensors or TorchScript archive.
    Files with other names for the same tensors are refused: guessing an order would give wrong
    numbers that look right. So are torchvision's ImageNet weights (1000 classes): not FID.

    Args:
        path: the local file.
        resize: ``pytorch-fid``: bilinear, corners not aligned, no antialias, on floats.
            ``clean``: clean-fid's rule, Pillow's antialiased bicubic on float channels. Both end at
            299 px and [-1, 1]. Numbers of different rules must not be compared.

    Raises:
        UserError: the file is missing, damaged, or not such a state dictionary.
    """

    frechet_name = "fid"
    kernel_name = "kid"
    dimension = 2048

    def __init__(self, path: str | Path, resize: Resize = "pytorch-fid") -> None:
        super().__init__()
        if resize not in ("pytorch-fid", "clean"):
            raise ValueError(f"resize must be 'pytorch-fid' or 'clean', got {resize!r}")
        self.resize = resize
        self.name = f"inception-2015-12-05/{resize}"
        self.network = InceptionV3("fid")
        self.network.load_state_dict(_fid_state(read_tensor_file(path), self.network.state_dict(), Path(path)))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        check_pictures(pictures)
        resized = resize_clean(pictures) if self.resize == "clean" else resize_pytorch_fid(pictures)
        return self.network(resized * 2 - 1)


def resize_pytorch_fid(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) float in [0, 1]: bilinear without antialias."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return nn.functional.interpolate(pictures.float() / 255, size=size, mode="bilinear", align_corners=False)


def resize_clean(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) float in [0, 1]: Pillow's bicubic on float channels, clipped."""
    from PIL import Image

    channels = pictures.cpu().numpy().astype(np.float32).reshape(-1, *pictures.shape[2:])
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized = [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in channels]
    table = torch.from_numpy(np.stack(resized)).clamp(0, 255) / 255
    return table.view(*pictures.shape[:2], *size).to(pictures.device)


def read_tensor_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors, .pth or TorchScript file; no code of the file runs. UserError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such weight file: {path}")
    words = "tensors by name (.safetensors, .pth or TorchScript)", "check the path or get it again"
    with tensor_files.one_line_for(path, *words):
        if path.suffix != ".safetensors" and _is_torchscript(path):
            from facelab.checkpoints.torchscript import read_torchscript

            return dict(read_torchscript(path))
    content = tensor_files.read_tensor_file(path, *words)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} must hold a state dictionary (name -> tensor), got {type(content).__name__}")
    return dict(content)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _fid_state(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    classes = len(tensors["fc.weight"]) if "fc.weight" in tensors else None
    if classes not in (None, FID_CLASSES):
        raise UserError(
            f"{path} has {classes} classes, the FID network {FID_CLASSES}: "
            "ImageNet weights give no FID; use pt_inception-2015-12-05-6726825d.pth"
        )
    state = {}
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif name not in tensors or tensors[name].shape != value.shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing of that name"
            raise UserError(
                f"{path} is not the FID Inception network: {name} must be {tuple(value.shape)}, got {got}; "
                "expected the parameter names of torchvision's inception_v3 as in pt_inception-2015-12-05-6726825d.pth"
            )
        else:
            state[name] = tensors[name].float()
    if classes is None:
        raise UserError(
            f"{path} has no fc.weight of {FID_CLASSES} rows, so it may not be the FID network; "
            "use pt_inception-2015-12-05-6726825d.pth"
        )
    return state


def image_distances(
    net: FeatureNet,
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    *,
    kernel_subsets: int = 0,
    kernel_subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """Frechet (and kernel) distance of two picture sets, under the names that the network gives them.

    Args:
        net: the feature network; pictures are given to it on their own device.
        real, fake: batches of (N, 3, H, W) uint8 pictures, read once.
        kernel_subsets: subsets of the kernel distance; 0 leaves it out and keeps memory constant.
        kernel_subset_size: pictures of each set per subset.
        seed: of the choice of subsets.

    Returns:
        The distances by name, with ``features`` (the network), ``real_count`` and ``fake_count``.
    """
    stats, kept = [], []
    for batches in (real, fake):
        accumulator, vectors = FeatureStats(net.dimension), []
        for batch in batches:
            features = net(batch).cpu()
            accumulator.add(features)
            if kernel_subsets:
                vectors.append(features)
        if accumulator.count < 2:
            raise UserError(f"a picture distance needs at least 2 pictures of each set, got {accumulator.count}")
        stats.append(accumulator)
        kept.append(vectors)
    result: dict[str, float | int | str] = {
        net.frechet_name: frechet_distance(stats[0], stats[1]),
        "features": net.name,
        "real_count": stats[0].count,
        "fake_count": stats[1].count,
    }
    if kernel_subsets:
        distance = kernel_distance(torch.cat(kept[0]), torch.cat(kept[1]), kernel_subsets, kernel_subset_size, seed)
        result[net.kernel_name] = distance.mean
        result[f"{net.kernel_name}_std"] = distance.std
    return result


def check_pictures(pictures: Tensor) -> None:
    """ValueError unless these are uint8 (N, 3, H, W)."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8 (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
