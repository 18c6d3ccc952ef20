# SPDX-License-Identifier: Apache-2.0
"""Synthesis layers and blocks of StyleGAN2 (arXiv 1912.04958, sections 2 and 4): style codes -> features and images.

Shapes: N batch, W width of a style code, C channels, H height and width of the features (images are square).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cuda_ops import activation_gain, bias_act, modulated_conv2d, setup_filter, upsample2d
from facelab.nn.stylegan2.layers import FILTER, EqualizedConv2d, FullyConnected, reset_children
from facelab.nn.stylegan2.precision import AS_BUILT, Precision

Architecture = Literal["skip", "resnet", "orig"]
ARCHITECTURES = ("skip", "resnet", "orig")


class SynthesisLayer(nn.Module):
    """Modulated and demodulated convolution, noise, bias, activation.

    Args:
        resolution: side of the output, which the noise map has.
        up: 2: the image grows (filtered with ``resample_filter``).
        clamp: the output is limited to +-``clamp * gain``; None: not.
        use_noise: without it the layer has neither a noise map nor a strength.
    """

    noise_const: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        *,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.activation, self.clamp = resolution, up, activation, clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(())) if use_noise else None
        self.register_buffer("noise_const", torch.zeros(resolution, resolution) if use_noise else None)
        self.register_buffer("resample_filter", setup_filter(list(resample_filter), device="cpu"), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight and stored noise N(0, 1), strength and bias 0, style bias 1."""
        reset_children(self, generator)
        self.weight.normal_(generator=generator)
        self.bias.zero_()
        if self.noise_strength is not None:
            self.noise_strength.zero_()
            self.stored_noise().normal_(generator=generator)

    def stored_noise(self) -> Tensor:
        """The map (H, W) of noise mode ``const``. ValueError for a layer without noise."""
        if self.noise_const is None:
            raise ValueError("this synthesis layer was built with use_noise=False; it has no stored noise")
        return self.noise_const

    def forward(
        self, x: Tensor, w: Tensor, noise: Tensor | None = None, *, gain: float = 1.0, fused: bool = True
    ) -> Tensor:
        """x (N, in, H/up, H/up) in any number type, w (N, W) -> (N, out, H, H) in the type of x, times ``gain``.

        Args:
            noise: (H, W) or (N, 1, H, W), not yet multiplied by the layer's strength; None: no noise.
            fused: fold the styles into one grouped convolution; else scale the features. Equal up to rounding.
        """
        if noise is not None:
            if self.noise_strength is None:
                raise ValueError("this synthesis layer was built with use_noise=False; it takes no noise")
            noise = noise * self.noise_strength
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise,
            up=self.up,
            padding=self.weight.shape[-1] // 2,
            resample_filter=cast(Tensor, self.resample_filter),
            flip_weight=self.up == 1,
            fused_modconv=fused,
        )
        clamp = self.clamp * gain if self.clamp is not None else None
        gain = activation_gain(self.activation) * gain
        return bias_act(x, self.bias.to(x.dtype), act=self.activation, gain=gain, clamp=clamp)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, {kernel}, resolution={self.resolution}, up={self.up}"


class ToRGB(nn.Module):
    """Modulated convolution without demodulation: features -> the channels of the image.

    Args:
        clamp: the output is limited to +-``clamp``; None: not.
    """

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, *, kernel_size: int = 1, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight N(0, 1), bias 0, style bias 1."""
        reset_children(self, generator)
        self.weight.normal_(generator=generator)
        self.bias.zero_()

    def forward(self, x: Tensor, w: Tensor, *, fused: bool = True) -> Tensor:
        """x (N, in, H, H), w (N, W) -> (N, out, H, H) in the number type of x."""
        styles = self.affine(w) * (1 / math.sqrt(self.weight[0].numel()))
        padding = self.weight.shape[-1] // 2
        x = modulated_conv2d(x, self.weight, styles, padding=padding, demodulate=False, fused_modconv=fused)
        return bias_act(x, self.bias.to(x.dtype), clamp=self.clamp)


class SynthesisBlock(nn.Module):
    """The layers of one resolution.

    ``skip``: two convolutions, and each block adds its RGB to the upsampled image; ``resnet``: a 1x1 shortcut around
    the convolutions; ``orig``: plain convolutions. The last two write RGB in the last block only.

    Args:
        in_channels: 0: the first block, which starts from a learned constant and has ``conv1`` only.
        resolution: side of the output.
        is_last: the block writes the image in every architecture.
        up: 2, or 1 for a block that keeps the size of features and image.
        use_fp16: marked for half precision (see :class:`Precision`).
        clamp: limit of every convolution's output (``conv_clamp`` of the original); None: none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        *,
        is_last: bool = False,
        architecture: Architecture = "skip",
        up: int = 2,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        clamp: float | None = 256.0,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        self.in_channels, self.resolution, self.w_dim, self.up = in_channels, resolution, w_dim, up
        self.architecture, self.use_fp16 = architecture, use_fp16

        def layer(channels: int, factor: int) -> SynthesisLayer:
            return SynthesisLayer(
                channels, out_channels, w_dim, resolution,
                up=factor, use_noise=use_noise, activation=activation, resample_filter=resample_filter, clamp=clamp,
            )  # fmt: skip

        self.const = nn.Parameter(torch.zeros(out_channels, resolution, resolution)) if in_channels == 0 else None
        self.conv0 = layer(in_channels, up) if in_channels else None
        self.conv1 = layer(out_channels, 1)
        self.to_rgb = (
            ToRGB(out_channels, img_channels, w_dim, clamp=clamp) if is_last or architecture == "skip" else None
        )
        self.skip = (
            EqualizedConv2d(in_channels, out_channels, 1, bias=False, up=up, resample_filter=resample_filter)
            if in_channels and architecture == "resnet"
            else None
        )
        self.register_buffer("resample_filter", setup_filter(list(resample_filter), device="cpu"), persistent=False)

    @property
    def num_conv(self) -> int:
        """Number of convolutions that take a style code."""
        return 1 if self.conv0 is None else 2

    @property
    def num_ws(self) -> int:
        """Number of style codes :meth:`forward` takes, the one of RGB included."""
        return self.num_conv + (self.to_rgb is not None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights of all layers; the constant is N(0, 1)."""
        if self.const is not None:
            self.const.normal_(generator=generator)
        reset_children(self, generator)

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        noise: Mapping[str, Tensor] | None = None,
        *,
        precision: Precision = AS_BUILT,
        fused: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Features, image and style codes -> features and image of this resolution. Nothing is changed in place.

        Args:
            x: (N, in_channels, resolution / up, the same); None for the first block.
            img: (N, img_channels, resolution / up, the same) in full precision; None: nothing to add to.
            ws: (N, num_ws, W) in full precision.
            noise: maps by layer, ``conv0`` and ``conv1``; absent: no noise.

        Returns:
            x (N, out_channels, resolution, resolution) in the type of the block, img in full precision or None.

        Raises:
            ValueError: another shape of ``x`` or ``ws``.
        """
        self._check(x, ws)
        maps = noise or {}
        codes = ws.unbind(dim=1)
        dtype = precision.dtype_of(self.use_fp16, self.conv1.weight)
        source = self.const.expand(ws.shape[0], -1, -1, -1) if self.const is not None else cast(Tensor, x)
        y: Tensor = source.to(dtype=dtype, memory_format=precision.memory_format)
        if self.conv0 is None:
            y = self.conv1(y, codes[0], maps.get("conv1"), fused=fused)
        else:
            gain = math.sqrt(0.5) if self.skip is not None else 1.0
            shortcut = self.skip(y, gain=gain) if self.skip is not None else None
            y = self.conv0(y, codes[0], maps.get("conv0"), fused=fused)
            y = self.conv1(y, codes[1], maps.get("conv1"), gain=gain, fused=fused)
            y = y if shortcut is None else shortcut + y
        if img is not None and self.up > 1:
            img = upsample2d(img, cast(Tensor, self.resample_filter), up=self.up)
        if self.to_rgb is not None:
            rgb = self.to_rgb(y, codes[self.num_conv], fused=fused).to(self.conv1.weight.dtype)
            img = rgb if img is None else img + rgb
        return y, img

    def _check(self, x: Tensor | None, ws: Tensor) -> None:
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.num_ws, self.w_dim):
            raise ValueError(f"ws: expected shape (N, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}")
        if self.const is None:
            side = self.resolution // self.up
            if x is None or tuple(x.shape) != (ws.shape[0], self.in_channels, side, side):
                wanted = (ws.shape[0], self.in_channels, side, side)
                raise ValueError(f"x: expected shape {wanted}, got {None if x is None else tuple(x.shape)}")
