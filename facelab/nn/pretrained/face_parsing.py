# SPDX-License-Identifier: Apache-2.0
"""Face parsing networks: which of the 19 CelebAMask-HQ classes each pixel of a portrait belongs to.

Two architectures. :class:`BiSeNet` (arXiv 1808.00897, a ResNet-18 as context path) takes the published files: SofGAN's
with 20 classes, which FENeRF makes its masks with, and the popular one with 19. :class:`SmallParser` is a light
encoder and decoder of our own. :class:`FaceParser` wraps either with its preprocessing and its class numbers; files
are read by :mod:`facelab.data.parsing`.

Letters: N pictures, C channels, H and W height and width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Upsampling = Literal["bilinear", "nearest"]
CONTEXT = 128  # channels of BiSeNet's context features
_STAGES = (64, 128, 256, 512)


class ConvNorm(nn.Module):
    """Convolution without bias that keeps the size (divided by the stride), batch normalisation, ReLU on request."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return torch.relu(x) if self.relu else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet, arXiv 1512.03385, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs, relu=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, relu=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet18Trunk(nn.Module):
    """(N, 3, H, W) -> features at 1/8 (128 channels), 1/16 (256) and 1/32 (512) of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STAGES[0], 7, 2)
        width = _STAGES[0]
        for number, channels in enumerate(_STAGES, start=1):
            first = BasicBlock(width, channels, 1 if number == 1 else 2)
            self.add_module(f"stage{number}", nn.Sequential(first, BasicBlock(channels, channels, 1)))
            width = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        x = self.get_submodule("stage1")(x)
        feat8 = self.get_submodule("stage2")(x)
        feat16 = self.get_submodule("stage3")(feat8)
        return feat8, feat16, self.get_submodule("stage4")(feat16)


class AttentionRefinement(nn.Module):
    """Features, each channel weighed by a gate that sees their global mean (BiSeNet, figure 2b)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.features = ConvNorm(inputs, CONTEXT)
        self.gate = ConvNorm(CONTEXT, CONTEXT, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x * torch.sigmoid(self.gate(x.mean(dim=(2, 3), keepdim=True)))


class FeatureFusion(nn.Module):
    """Two feature maps mixed, with channel attention on top (BiSeNet, figure 2c)."""

    def __init__(self, channels: int = 2 * CONTEXT) -> None:
        super().__init__()
        self.mix = ConvNorm(channels, channels, 1)
        self.squeeze = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.excite = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.mix(torch.cat([detail, context], dim=1))
        attention = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))))
        return x * attention + x


class Classifier(nn.Module):
    """3x3 convolution, then class scores."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.features = ConvNorm(inputs, hidden)
        self.classify = nn.Conv2d(hidden, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class BiSeNet(nn.Module):
    """(N, 3, H, W) normalised pictures -> (N, classes, H, W) scores.

    The detail path is the trunk's 1/8 features, as in the published face parsers.

    Args:
        classes: number of classes.
        upsampling: between the scales of the context path: ``bilinear`` (corners aligned) in SofGAN's parser,
            ``nearest`` in the popular one. The scores are brought to the picture's size bilinearly in both.
    """

    def __init__(self, classes: int, upsampling: Upsampling = "bilinear") -> None:
        super().__init__()
        if upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling must be 'bilinear' or 'nearest', got {upsampling!r}")
        self.upsampling: Upsampling = upsampling
        self.trunk = ResNet18Trunk()
        self.context = ConvNorm(_STAGES[3], CONTEXT, 1)
        self.refine32, self.refine16 = AttentionRefinement(_STAGES[3]), AttentionRefinement(_STAGES[2])
        self.head32, self.head16 = ConvNorm(CONTEXT, CONTEXT), ConvNorm(CONTEXT, CONTEXT)
        self.fusion = FeatureFusion()
        self.output = Classifier(2 * CONTEXT, 2 * CONTEXT, classes)

    def forward(self, x: Tensor) -> Tensor:
        feat8, feat16, feat32 = self.trunk(x)
        average = self.context(feat32.mean(dim=(2, 3), keepdim=True))  # one value a channel: any upsampling repeats it
        coarse = self._up(self.refine32(feat32) + average, feat16)
        fine = self._up(self.refine16(feat16) + self.head32(coarse), feat8)
        scores = self.output(self.fusion(feat8, self.head16(fine)))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=True)

    def _up(self, x: Tensor, like: Tensor) -> Tensor:
        if self.upsampling == "nearest":
            return F.interpolate(x, like.shape[2:], mode="nearest")
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


_BISENET_NAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^cp\.resnet\.conv1\.", "trunk.stem.conv."),
        (r"^cp\.resnet\.bn1\.", "trunk.stem.norm."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.conv1\.", r"trunk.stage\1.\2.first.conv."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.bn1\.", r"trunk.stage\1.\2.first.norm."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.conv2\.", r"trunk.stage\1.\2.second.conv."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.bn2\.", r"trunk.stage\1.\2.second.norm."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.downsample\.0\.", r"trunk.stage\1.\2.shortcut.conv."),
        (r"^cp\.resnet\.layer(\d)\.(\d)\.downsample\.1\.", r"trunk.stage\1.\2.shortcut.norm."),
        (r"^cp\.arm(16|32)\.conv\.conv\.", r"refine\1.features.conv."),
        (r"^cp\.arm(16|32)\.conv\.bn\.", r"refine\1.features.norm."),
        (r"^cp\.arm(16|32)\.conv_atten\.", r"refine\1.gate.conv."),
        (r"^cp\.arm(16|32)\.bn_atten\.", r"refine\1.gate.norm."),
        (r"^cp\.conv_head(16|32)\.conv\.", r"head\1.conv."),
        (r"^cp\.conv_head(16|32)\.bn\.", r"head\1.norm."),
        (r"^cp\.conv_avg\.conv\.", "context.conv."),
        (r"^cp\.conv_avg\.bn\.", "context.norm."),
        (r"^ffm\.convblk\.conv\.", "fusion.mix.conv."),
        (r"^ffm\.convblk\.bn\.", "fusion.mix.norm."),
        (r"^ffm\.conv1\.", "fusion.squeeze."),
        (r"^ffm\.conv2\.", "fusion.excite."),
        (r"^conv_out\.conv\.conv\.", "output.features.conv."),
        (r"^conv_out\.conv\.bn\.", "output.features.norm."),
        (r"^conv_out\.conv_out\.", "output.classify."),
    )
)
_UNUSED = re.compile(r"^conv_out(16|32)\.|\.num_batches_tracked$")  # heads that only training needs; counters


def is_bisenet(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dictionary is that of a published BiSeNet face parser."""
    return "cp.resnet.conv1.weight" in state and "conv_out.conv_out.weight" in state


def bisenet_from_published(state: Mapping[str, Tensor]) -> BiSeNet:
    """A published state dictionary (original names) -> the network, in evaluation mode.

    The number of classes is read off the last layer; 20 classes are SofGAN's file, others upsample by ``nearest``.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape; names it.
    """
    if not is_bisenet(state):
        raise ValueError("not a BiSeNet face parser: expected tensors such as cp.resnet.conv1.weight")
    classes = len(state["conv_out.conv_out.weight"])
    net = BiSeNet(classes, "bilinear" if classes == SOFGAN_CLASSES else "nearest")
    renamed = {_our_name(name): value for name, value in state.items() if not _UNUSED.search(name)}
    expected = {name: value for name, value in net.state_dict().items() if not _UNUSED.search(name)}
    for name, value in expected.items():
        if name not in renamed:
            raise ValueError(f"not a whole BiSeNet: no tensor for {name}")
        if renamed[name].shape != value.shape:
            raise ValueError(f"{name} must have shape {tuple(value.shape)}, got {tuple(renamed[name].shape)}")
    net.load_state_dict(renamed, strict=False)  # the counters alone are left out; both sides were compared above
    return net.eval()


def _our_name(name: str) -> str:
    for pattern, ours in _BISENET_NAMES:
        new, hits = pattern.subn(ours, name)
        if hits:
            return new
    raise ValueError(f"unknown tensor {name!r} for a BiSeNet face parser")


# --- our own


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation, the first with a stride, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _group_norm(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if changes else nn.Identity()
        self.stride = stride
        nn.init.zeros_(self.norm2.weight)  # a block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        short = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        return F.silu(y + self.shortcut(short))


class SmallParser(nn.Module):
    """(N, 3, H, W) pictures in [-1, 1] -> (N, classes, H, W) scores; H and W multiples of 2 ** len(widths).

    Residual blocks at 1/2, 1/4, 1/8 ... of the size, two more at the coarsest with the global mean fed back, and a
    decoder that adds the finer features back in. Group normalisation: nothing depends on the batch.

    Args:
        widths: channels at each scale, finest first.
        classes: number of classes.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 160), classes: int = 19) -> None:
        super().__init__()
        if len(widths) < 2 or any(width < 8 or width % 8 for width in widths):
            raise ValueError(f"widths must be two or more multiples of 8, got {list(widths)}")
        self.widths, self.classes = tuple(widths), classes
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), _group_norm(widths[0]), nn.SiLU(), nn.Identity()
        )
        self.down = nn.ModuleList([ResidualBlock(widths[0], widths[0])])
        self.down.extend(ResidualBlock(a, b, 2) for a, b in zip(widths, widths[1:], strict=False))
        deep = widths[-1]
        self.deep = ResidualBlock(deep, deep)
        self.whole = nn.Sequential(nn.Linear(deep, deep), nn.SiLU(), nn.Linear(deep, deep))
        self.mix = nn.ModuleList(nn.Conv2d(a + b, a, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(ResidualBlock(a, a) for a in widths[:-1])
        self.classify = nn.Conv2d(widths[0], classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size, step = x.shape[2:], 2 ** len(self.widths)
        if size[0] % step or size[1] % step:
            raise ValueError(f"height and width must be multiples of {step}, got {tuple(size)}")
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.deep(x + self.whole(x.mean(dim=(2, 3)))[:, :, None, None])
        for level in reversed(range(len(self.widths) - 1)):
            fine = kept[level]
            x = F.interpolate(x, fine.shape[2:], mode="bilinear", align_corners=False)
            x = self.up[level](self.mix[level](torch.cat([fine, x], dim=1)))
        return F.interpolate(self.classify(x), size, mode="bilinear", align_corners=False)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


# --- pictures in, label maps out

SOFGAN_CLASSES = 20
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FaceParser(nn.Module):
    """A parsing network with its preprocessing and class numbers.

    Args:
        net: (N, 3, size, size) -> (N, classes, size, size) scores.
        size: side in pixels to which pictures are brought.
        table: class of the net -> class of the label map.
        mean, std: normalisation of channels in 0..1; the default maps to [-1, 1].
        name: what the parser is, for messages.
    """

    table: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        size: int,
        table: Sequence[int],
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        name: str = "parser",
    ) -> None:
        super().__init__()
        self.net, self.size, self.name = net, size, name
        self.register_buffer("table", torch.tensor(table), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def scores(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, classes of the net, size, size)."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must be (N, 3, H, W), got {tuple(pictures.shape)}")
        if pictures.shape[2:] != (self.size, self.size):
            pictures = F.interpolate(
                pictures, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            )
        return self.net((pictures * 0.5 + 0.5 - self.mean) / self.std)

    def labels(self, scores: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Scores -> (N, h, w) int64 labels; ``size`` (h, w), default that of the scores.

        Scores, not labels, are brought to another size, so that edges stay smooth.
        """
        if size is not None and tuple(scores.shape[2:]) != tuple(size):
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        return self.table[scores.argmax(dim=1)]  # type: ignore[index]

    @torch.no_grad()
    def forward(self, pictures: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, h, w) int64 labels; ``size`` as in :meth:`labels`, default the net's own."""
        return self.labels(self.scores(pictures), size)
