# SPDX-License-Identifier: Apache-2.0
"""Deep3DFaceRecon's regression network (arXiv 1903.08527): a picture of a face -> 257 coefficients of a face model.

A residual network of 50 (or 18) layers with the stride in its 3x3 convolutions, the mean over the picture, one affine
map. The architecture is ours; tensors of the published names are translated by :func:`regressor_from_published`.
What the coefficients mean stands in :mod:`facelab.face_model.bfm`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from facelab.errors import UserError
from facelab.tensor_files import read_tensor_file

SIZE = 224  # pixels of the aligned face that the published weights were trained on
COEFFICIENTS = 257
HEADS = (80, 64, 80, 3, 27, 2, 1)  # rows of the published file's seven maps; ours is one
WIDTHS = (64, 128, 256, 512)
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # by depth; 18 has two 3x3 convolutions a block, 50 has 1x1, 3x3, 1x1
GROUP = "net_recon"  # key of the network inside the published file, beside optimiser and schedule
MANIFEST_NAME = "deep3d_recon"
_COUNTER = "num_batches_tracked"


class ResidualBlock(nn.Module):
    """Convolutions with batch normalisation, plus a shortcut.

    Args:
        inputs: channels that come in.
        kernels: (size, channels, stride) of each convolution.
    """

    def __init__(self, inputs: int, kernels: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        convolutions, width = [], inputs
        for size, channels, stride in kernels:
            convolutions.append(nn.Conv2d(width, channels, size, stride, size // 2, bias=False))
            width = channels
        step = max(stride for _, _, stride in kernels)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _, channels, _ in kernels)
        changes = step != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, step, bias=False) if changes else None
        self.shortcut_norm = nn.BatchNorm2d(width) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y if number == 0 else torch.relu(y)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return torch.relu(x + y)


class FaceRegressor(nn.Module):
    """(N, 3, H, W) RGB in 0..1 of aligned faces -> (N, 257) coefficients.

    The last map starts at zero, that is, at the mean face seen from the front. Batch normalisation: call ``eval()``
    before use, as :func:`load_face_regressor` does.

    Args:
        depth: 50 (published) or 18. ValueError for another one.
    """

    def __init__(self, depth: int = 50) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        self.depth = depth
        self.stem = nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTHS[0])
        groups, inputs = [], WIDTHS[0]
        for level, (width, count) in enumerate(zip(WIDTHS, BLOCKS[depth], strict=True)):
            blocks = []
            for number in range(count):
                stride = 2 if level > 0 and number == 0 else 1
                if depth == 50:
                    kernels = ((1, width, 1), (3, width, stride), (1, 4 * width, 1))
                else:
                    kernels = ((3, width, stride), (3, width, 1))
                blocks.append(ResidualBlock(inputs, kernels))
                inputs = kernels[-1][1]
            groups.append(nn.ModuleList(blocks))
        self.groups = nn.ModuleList(groups)
        self.head = nn.Linear(inputs, COEFFICIENTS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Pictures -> (N, 2048) (or 512) means over the picture. ValueError for another shape."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures must be (N, 3, H, W), got {tuple(x.shape)}")
        x = nn.functional.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 3, 2, 1)
        for group in self.groups:
            for block in group:  # type: ignore[union-attr]
                x = block(x)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# --- published files


def load_face_regressor(path: str | Path | None = None, device: torch.device | str = "cpu") -> FaceRegressor:
    """The network with the weights of a published file (``epoch_20.pth``), in evaluation mode, without gradients.

    Only tensors and plain values are read; a file that asks for anything else is refused.

    Args:
        path: None takes the file that was imported under the manifest's name (``deep3d_recon``).
        device: where to compute.

    Raises:
        UserError: no such file, damaged, or of another network.
    """
    from facelab import assets

    path = assets.find(MANIFEST_NAME, path)
    network = regressor_from_published(_read(path), path)
    return network.requires_grad_(False).eval().to(device)


def regressor_from_published(tensors: Mapping[str, Tensor], path: Path | None = None) -> FaceRegressor:
    """Our network with published weights (both depths, seven last maps or one), in evaluation mode.

    Args:
        tensors: state dictionary with the published names ``backbone.*`` and ``final_layers.*``.
        path: where they come from, for messages.

    Raises:
        UserError: a name is missing, unknown, or has another shape.
    """
    where = "the tensors" if path is None else str(path)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        network = FaceRegressor(50 if "backbone.layer1.0.conv3.weight" in tensors else 18)
    expected = _published_shapes(network, one_map="backbone.fc.weight" in tensors)
    for name, shape in expected.items():
        if name.endswith(_COUNTER) and name not in tensors:
            continue
        got = tuple(tensors[name].shape) if name in tensors else "nothing of that name"
        if got != shape:
            raise UserError(
                f"{where}: not Deep3DFaceRecon's network: {name} must be {shape}, got {got}; expected epoch_20.pth"
            )
    foreign = sorted(set(tensors) - set(expected))
    if foreign:
        raise UserError(f"{where}: not Deep3DFaceRecon's network: unknown tensor {foreign[0]}; expected epoch_20.pth")
    state = {}
    for ours in network.state_dict():
        if ours.startswith("head."):
            continue
        theirs = _published_name(ours)
        counter = ours.endswith(_COUNTER)
        state[ours] = tensors.get(theirs, torch.tensor(0)) if counter else tensors[theirs].float()
    for part in ("weight", "bias"):
        maps = [f"final_layers.{k}.{part}" for k in range(len(HEADS))]
        rows = [tensors[name] for name in (maps if maps[0] in tensors else [f"backbone.fc.{part}"])]
        state[f"head.{part}"] = torch.cat([row.float().flatten(1) if part == "weight" else row.float() for row in rows])
    network.load_state_dict(state, assign=True)
    return network.eval()


def published_state(network: FaceRegressor) -> dict[str, Tensor]:
    """The state dictionary of our network under the published names, with seven last maps: the way back."""
    state = network.state_dict()
    found = {_published_name(name): value for name, value in state.items() if not name.startswith("head.")}
    weights, biases = state["head.weight"].split(HEADS), state["head.bias"].split(HEADS)
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        found[f"final_layers.{k}.weight"], found[f"final_layers.{k}.bias"] = weight[:, :, None, None], bias
    return found


def published_shapes(depth: int = 50) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, in the published layout with seven last maps."""
    with torch.device("meta"):
        return _published_shapes(FaceRegressor(depth), one_map=False)


def _published_shapes(network: FaceRegressor, one_map: bool) -> dict[str, tuple[int, ...]]:
    if not one_map:
        return {name: tuple(value.shape) for name, value in published_state(network).items()}
    state = network.state_dict()
    names = {name: name.replace("head.", "backbone.fc.") for name in state if name.startswith("head.")}
    return {names.get(name) or _published_name(name): tuple(value.shape) for name, value in state.items()}


def _published_name(ours: str) -> str:
    stem = {"stem": "conv1", "stem_norm": "bn1"}
    part, _, rest = ours.partition(".")
    if part in stem:
        return f"backbone.{stem[part]}.{rest}"
    match = re.fullmatch(r"groups\.(\d+)\.(\d+)\.(\w+?)(?:\.(\d+))?\.(\w+)", ours)
    assert match is not None, ours
    group, block, kind, number, leaf = match.groups()
    kinds = {"convolutions": "conv", "norms": "bn", "shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
    layer = kinds[kind] + (str(int(number) + 1) if number else "")
    return f"backbone.layer{int(group) + 1}.{block}.{layer}.{leaf}"


def _read(path: Path) -> Mapping[str, Tensor]:
    """The network's tensors in a published file or in a bare state dictionary."""
    content = read_tensor_file(path, "Deep3DFaceRecon's epoch_20.pth", "get the file again")
    if isinstance(content, Mapping) and GROUP in content:
        content = content[GROUP]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: expected Deep3DFaceRecon's epoch_20.pth with the state dictionary '{GROUP}', "
            f"got {type(content).__name__} without it; check the path"
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}
