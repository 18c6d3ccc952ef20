# SPDX-License-Identifier: Apache-2.0
"""Fast kernels, each beside a plain torch twin (:mod:`cuda_ops.reference`, :mod:`cuda_ops.reference_filters`,
:mod:`cuda_ops.reference_activations`).

Imports torch only. Kernels are compiled on first use, never at import; :mod:`cuda_ops.dispatch` says
which one runs, ``python -m cuda_ops`` prints it.
"""

from cuda_ops.activation import bias_act
from cuda_ops.convolution import conv2d_resample, filtered_lrelu, modulated_conv2d
from cuda_ops.filters import downsample2d, filter2d, upfirdn2d, upsample2d
from cuda_ops.grid_sample import grid_sample_2d
from cuda_ops.reference_activations import ACTIVATIONS, activation_gain
from cuda_ops.reference_filters import fma, setup_filter

__all__ = [
    "setup_filter",
    "upfirdn2d",
    "filter2d",
    "upsample2d",
    "downsample2d",
    "bias_act",
    "activation_gain",
    "ACTIVATIONS",
    "conv2d_resample",
    "modulated_conv2d",
    "filtered_lrelu",
    "fma",
    "grid_sample_2d",
]
