# SPDX-License-Identifier: Apache-2.0
"""Golden cases of the filter and activation ops, with their gradients of first and second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import cuda_ops

from ..harness import Arrays, Meta, given

HELPERS: dict[str, Callable[..., Tensor]] = {
    "filter2d": cuda_ops.filter2d,
    "upsample2d": cuda_ops.upsample2d,
    "downsample2d": cuda_ops.downsample2d,
}


# In the patterns of ``given``, ``*[!d]_x`` is an input and ``*_d_x`` its gradient of second order.


def leaves(arrays: Arrays, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The arrays of one combination that are there, ready for gradients."""
    return {name: arrays[prefix + name].clone().requires_grad_() for name in names if prefix + name in arrays}


def settings(combo: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those settings of a combination that it states."""
    return {name: combo[name] for name in names if name in combo}


def gradients(y: Tensor, seed: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differentiable gradients of sum(y * seed), as d<name>."""
    found = torch.autograd.grad(y, list(inputs.values()), seed, create_graph=True)
    return {f"d{name}": gradient for name, gradient in zip(inputs, found, strict=True)}


def second_order(dx: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of sum(dx * v); zeros where there is no dependence."""
    found = torch.autograd.grad(dx, inputs, v, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]


def named_filter(arrays: Arrays, name: str, prefix: str = "") -> Tensor | None:
    """A filter of the case; "none" is the identity."""
    return None if name == "none" else arrays[prefix + name]


@given("in_*")
def setup_filter(meta: Meta, arrays: Arrays) -> Arrays:
    """Each set of arguments."""
    options = ("normalize", "flip_filter", "gain", "separable")
    return {
        combo["out"]: cuda_ops.setup_filter(arrays["in_" + combo["input"]], **settings(combo, *options))
        for combo in meta["combos"]
    }


@given("filter_*", "*[!d]_x", "*[!d]_dy", "*[!d]_v")
def upfirdn2d(meta: Meta, arrays: Arrays) -> Arrays:
    """Result, gradient and second-order gradient of each combination; the helpers."""
    results: Arrays = {}
    for combo in meta["combos"]:
        p = combo["prefix"]
        inputs, dy = leaves(arrays, p, ["x"]), arrays[p + "dy"].clone().requires_grad_()
        f = named_filter(arrays, combo["filter"], "filter_")
        y = cuda_ops.upfirdn2d(inputs["x"], f, **settings(combo, "up", "down", "padding", "flip_filter", "gain"))
        dx = gradients(y, dy, inputs)["dx"]
        (d_dy,) = second_order(dx, arrays[p + "v"], [dy])
        results |= {p + "y": y, p + "dx": dx, p + "d_dy": d_dy}
    for combo in meta["helpers"]:
        f = named_filter(arrays, combo["filter"], "filter_")
        options = settings(combo, "up", "down", "padding", "flip_filter", "gain")
        results[combo["prefix"] + "y"] = HELPERS[combo["function"]](arrays["h_x"], f, **options)
    return results


@given("*[!d]_x", "*[!d]_b", "*[!d]_dy", "*[!d]_v")
def bias_act(meta: Meta, arrays: Arrays) -> Arrays:
    """Result, gradients of first order, and those of sum(dx * v)."""
    results: Arrays = {}
    for combo in meta["combos"]:
        p = combo["prefix"]
        inputs, dy = leaves(arrays, p, ["x", "b"]), arrays[p + "dy"].clone().requires_grad_()
        y = cuda_ops.bias_act(inputs["x"], inputs.get("b"), **settings(combo, "dim", "act", "alpha", "gain", "clamp"))
        first = gradients(y, dy, inputs)
        second = second_order(first["dx"], arrays[p + "v"], [dy, *inputs.values()])
        results[p + "y"] = y
        results |= {p + name: value for name, value in first.items()}
        results |= {p + f"d_{name}": value for name, value in zip(["dy", *inputs], second, strict=True)}
    return results


@given("k1331", "asym*", "*[!d]_x", "*[!d]_w", "*[!d]_dy")
def conv2d_resample(meta: Meta, arrays: Arrays) -> Arrays:
    """Result and gradients of input and weight."""
    results: Arrays = {}
    for combo in meta["combos"]:
        p = combo["prefix"]
        inputs = leaves(arrays, p, ["x", "w"])
        options = settings(combo, "up", "down", "padding", "groups", "flip_weight", "flip_filter")
        y = cuda_ops.conv2d_resample(inputs["x"], inputs["w"], named_filter(arrays, combo["filter"]), **options)
        results |= {p + "y": y, **{p + name: g for name, g in gradients(y, arrays[p + "dy"], inputs).items()}}
    return results


@given("k1331", "*[!d]_x", "*[!d]_w", "*[!d]_s", "*[!d]_dy", "*[!d]_v", "*[!d]_noise")
def modulated_conv2d(meta: Meta, arrays: Arrays) -> Arrays:
    """Result, gradients of input, weight and style, and those of sum(dx * v)."""
    results: Arrays = {}
    for combo in meta["combos"]:
        p = combo["prefix"]
        inputs = leaves(arrays, p, ["x", "w", "s"])
        y = cuda_ops.modulated_conv2d(
            inputs["x"],
            inputs["w"],
            inputs["s"],
            noise=arrays[p + "noise"] if combo["noise"] else None,
            resample_filter=arrays["k1331"],
            fused_modconv=combo["fused"],
            **settings(combo, "up", "down", "padding", "demodulate", "flip_weight"),
        )
        first = gradients(y, arrays[p + "dy"], inputs)
        d2w, d2s = second_order(first["dx"], arrays[p + "v"], [inputs["w"], inputs["s"]])
        results |= {p + "y": y, p + "d2w": d2w, p + "d2s": d2s, **{p + name: g for name, g in first.items()}}
    return results


@given("fu?", "fd?", "*[!d]_x", "*[!d]_b", "*[!d]_dy", "*[!d]_v")
def filtered_lrelu(meta: Meta, arrays: Arrays) -> Arrays:
    """Result, gradients of input and bias, second-order gradient of the incoming gradient."""
    results: Arrays = {}
    for combo in meta["combos"]:
        p = combo["prefix"]
        inputs, dy = leaves(arrays, p, ["x", "b"]), arrays[p + "dy"].clone().requires_grad_()
        filters = [named_filter(arrays, combo[name]) for name in ("fu", "fd")]
        options = settings(combo, "up", "down", "padding", "gain", "slope", "clamp", "flip_filter")
        y = cuda_ops.filtered_lrelu(inputs["x"], *filters, inputs.get("b"), **options)
        first = gradients(y, dy, inputs)
        (d_dy,) = second_order(first["dx"], arrays[p + "v"], [dy])
        results |= {p + "y": y, p + "d_dy": d_dy, **{p + name: g for name, g in first.items()}}
    return results


@given("gs_x", "gs_grid", "gs_dy", "gs_v", "fma_a", "fma_b", "fma_c", "fma_dy")
def grid_sample_and_fma(meta: Meta, arrays: Arrays) -> Arrays:
    """Both ops with gradients; the sampling with a second order."""
    inputs, dy = leaves(arrays, "gs_", ["x", "grid"]), arrays["gs_dy"].clone().requires_grad_()
    y = cuda_ops.grid_sample_2d(inputs["x"], inputs["grid"])
    first = gradients(y, dy, inputs)
    (d_dy,) = second_order(first["dx"], arrays["gs_v"], [dy])
    terms = leaves(arrays, "fma_", ["a", "b", "c"])
    product = cuda_ops.fma(terms["a"], terms["b"], terms["c"])
    products = gradients(product, arrays["fma_dy"], terms)
    return {
        "gs_y": y,
        "gs_d_dy": d_dy,
        **{f"gs_{name}": value for name, value in first.items()},
        "fma_y": product,
        **{f"fma_{name}": value for name, value in products.items()},
    }


ADAPTERS = {
    "ops/setup_filter": setup_filter,
    "ops/upfirdn2d": upfirdn2d,
    "ops/bias_act": bias_act,
    "ops/conv2d_resample": conv2d_resample,
    "ops/modulated_conv2d": modulated_conv2d,
    "ops/filtered_lrelu": filtered_lrelu,
    "ops/grid_sample_and_fma": grid_sample_and_fma,
}
