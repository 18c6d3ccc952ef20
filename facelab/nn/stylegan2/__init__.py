# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2: mapping network, synthesis network, super-resolution; the backbone of EG3D and its descendants."""

from facelab.nn.stylegan2.layers import EqualizedConv2d, FullyConnected, normalize_second_moment
from facelab.nn.stylegan2.mapping import MappingNetwork
from facelab.nn.stylegan2.network import StyleGAN2Generator, SynthesisNetwork
from facelab.nn.stylegan2.noise import const_noise, draw_noise, noise_layers, resolve_noise
from facelab.nn.stylegan2.precision import AS_BUILT, FULL, Precision
from facelab.nn.stylegan2.superresolution import KINDS, Superresolution, SuperresolutionKind
from facelab.nn.stylegan2.synthesis import SynthesisBlock, SynthesisLayer, ToRGB

__all__ = [
    "AS_BUILT",
    "FULL",
    "KINDS",
    "EqualizedConv2d",
    "FullyConnected",
    "MappingNetwork",
    "Precision",
    "StyleGAN2Generator",
    "Superresolution",
    "SuperresolutionKind",
    "SynthesisBlock",
    "SynthesisLayer",
    "SynthesisNetwork",
    "ToRGB",
    "const_noise",
    "draw_noise",
    "noise_layers",
    "normalize_second_moment",
    "resolve_noise",
]
