# SPDX-License-Identifier: Apache-2.0
"""Super-resolution of a rendered feature image with two StyleGAN2 blocks (EG3D, arXiv 2112.07945, section 4.3).

Shapes: N batch, R side of the rendered image, L number of style codes, W width of a style code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.draws import Draws
from facelab.errors import nearest
from facelab.nn.stylegan2.layers import reset_children
from facelab.nn.stylegan2.network import FusedModulation, block_noise, is_fused
from facelab.nn.stylegan2.noise import NoiseMaps, NoiseMode, resolve_noise
from facelab.nn.stylegan2.precision import AS_BUILT, Precision
from facelab.nn.stylegan2.synthesis import SynthesisBlock


@dataclass(frozen=True)
class SuperresolutionKind:
    """Sizes of a super-resolution module.

    Attributes:
        input_resolution: side the rendered image is brought to before the first block.
        first_up: factor of the first block, 1 or 2; the second always doubles.
        channels: features after the first and the second block.
    """

    input_resolution: int
    first_up: int
    channels: tuple[int, int]

    @property
    def output_resolution(self) -> int:
        """Side of the image that comes out."""
        return self.input_resolution * self.first_up * 2


KINDS = {
    "2x": SuperresolutionKind(64, 1, (128, 64)),
    "4x": SuperresolutionKind(128, 1, (128, 64)),
    "8x": SuperresolutionKind(128, 2, (128, 64)),
    "8xdc": SuperresolutionKind(128, 2, (256, 128)),
}


class Superresolution(nn.Module):
    """Rendered RGB and features -> image, steered by the last style code.

    The inputs are resized bilinearly to the module's input resolution where they differ from it; two blocks refine
    the features, and each adds its RGB to the upsampled image.

    Args:
        kind: sizes; a name of :data:`KINDS` or an own one.
        in_channels: feature channels of the rendering.
        w_dim: width of a style code.
        img_channels: channels of RGB.
        num_fp16_res: above 0, both blocks are marked for half precision, and their outputs are limited to +-256,
            also when they run in full precision.
        antialias: low-pass before the resizing of a larger input.
        fused_modconv: see :func:`facelab.nn.stylegan2.network.is_fused`.
        generator: draws the first weights; None: seed 0.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        kind: str | SuperresolutionKind,
        *,
        in_channels: int = 32,
        w_dim: int = 512,
        img_channels: int = 3,
        num_fp16_res: int = 4,
        antialias: bool = True,
        use_noise: bool = True,
        fused_modconv: FusedModulation = "inference_only",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kind, str):
            if kind not in KINDS:
                hint = nearest(kind, KINDS)
                raise ValueError(f"super-resolution: expected one of {', '.join(KINDS)}, got '{kind}'.{hint}")
            kind = KINDS[kind]
        self.kind, self.antialias, self.in_channels, self.img_channels = kind, antialias, in_channels, img_channels
        self.fused_modconv: FusedModulation = fused_modconv
        clamp = 256.0 if num_fp16_res > 0 else None
        self.blocks = nn.ModuleList()
        widths = (in_channels, *kind.channels)
        side = kind.input_resolution
        for index, up in enumerate((kind.first_up, 2)):
            side *= up
            self.blocks.append(
                SynthesisBlock(
                    widths[index],
                    widths[index + 1],
                    w_dim,
                    side,
                    img_channels,
                    is_last=index == 1,
                    up=up,
                    use_noise=use_noise,
                    clamp=clamp,
                    use_fp16=num_fp16_res > 0,
                )
            )
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights and stored noise anew."""
        reset_children(self, generator)

    def forward(
        self,
        rgb: Tensor,
        features: Tensor,
        ws: Tensor,
        *,
        noise_mode: NoiseMode = "none",
        noise_maps: NoiseMaps | None = None,
        draws: Draws | None = None,
        precision: Precision = AS_BUILT,
    ) -> Tensor:
        """rgb (N, img_channels, R, R), features (N, in_channels, R, R), ws (N, L, W) -> (N, img_channels, H, H).

        H is ``kind.output_resolution``; the last of the L codes is used. The inputs are left as they are.

        Args:
            noise_mode, noise_maps, draws: see :func:`facelab.nn.stylegan2.noise.resolve_noise`.
            precision: see :class:`Precision`.

        Raises:
            ValueError: other shapes.
        """
        return self._run(rgb, features, ws, noise_mode, noise_maps, draws, precision)[0]

    def with_legacy_raw(
        self,
        rgb: Tensor,
        features: Tensor,
        ws: Tensor,
        *,
        noise_mode: NoiseMode = "none",
        noise_maps: NoiseMaps | None = None,
        draws: Draws | None = None,
        precision: Precision = AS_BUILT,
    ) -> tuple[Tensor, Tensor]:
        """The image, and the raw image as the original leaves it behind.

        Its first block adds RGB in place when it keeps the size and the input was not resized (2x at 64, 4x at 128):
        the raw image it returns, and shows its discriminator, then is the rendered one plus the first block's RGB.
        Otherwise it is ``rgb``.
        """
        image, first = self._run(rgb, features, ws, noise_mode, noise_maps, draws, precision)
        changed = self.kind.first_up == 1 and rgb.shape[-1] == self.kind.input_resolution
        return image, first if changed else rgb

    def _run(
        self,
        rgb: Tensor,
        features: Tensor,
        ws: Tensor,
        noise_mode: NoiseMode,
        noise_maps: NoiseMaps | None,
        draws: Draws | None,
        precision: Precision,
    ) -> tuple[Tensor, Tensor]:
        """The image, and RGB after the first block."""
        self._check(rgb, features, ws)
        noise = resolve_noise(self, ws.shape[0], noise_mode, noise_maps, draws)
        fused = is_fused(self.fused_modconv, self.training)
        codes = ws[:, -1:].expand(-1, 3, -1)
        x, img = self._resized(features), self._resized(rgb)
        images = []
        for index, block in enumerate(self.blocks):
            maps = block_noise(noise, f"blocks.{index}.")
            x, img = cast(SynthesisBlock, block)(x, img, codes, maps, precision=precision, fused=fused)
            images.append(img)
        return images[1], images[0]

    def _resized(self, x: Tensor) -> Tensor:
        side = self.kind.input_resolution
        if x.shape[-1] == side:
            return x
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=self.antialias)

    def _check(self, rgb: Tensor, features: Tensor, ws: Tensor) -> None:
        side = features.shape[-1]
        for name, x, channels in (("rgb", rgb, self.img_channels), ("features", features, self.in_channels)):
            if x.ndim != 4 or tuple(x.shape) != (ws.shape[0], channels, side, side):
                raise ValueError(f"{name}: expected shape {(ws.shape[0], channels, side, side)}, got {tuple(x.shape)}")
        width = cast(SynthesisBlock, self.blocks[0]).w_dim
        if ws.ndim != 3 or ws.shape[1] < 1 or ws.shape[2] != width:
            raise ValueError(f"ws: expected shape (N, L, {width}), got {tuple(ws.shape)}")
