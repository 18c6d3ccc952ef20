# SPDX-License-Identifier: Apache-2.0
"""``python -m cuda_ops``: which kernels run here and why; on a GPU, how fast they are beside a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import cuda_ops
from cuda_ops import dispatch
from cuda_ops.timing import milliseconds, terabytes_per_second

OPS = {
    "upfirdn2d": "Triton kernels, or torch",
    "bias_act": "Triton kernels, or torch",
    "film_siren_field": "Triton kernels (precision='fp16'), or torch",
    "grid_lookup": "Triton kernels, or torch",
    "render_triplane": "Triton kernels with first-order gradients, or torch",
    "conv2d_resample": "native convolutions and upfirdn2d",
    "modulated_conv2d": "native convolutions and upfirdn2d",
    "filtered_lrelu": "bias_act and upfirdn2d; no kernel of its own, no model here calls it",
    "grid_sample_2d": "torch, with its own second order",
    "fma": "torch",
}


def versions() -> dict[str, str]:
    """Versions and device, for people and for benchmark files."""
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": found, "gpu": gpu}


def works(x: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Name -> (numbers read and written, op) for a picture x (N, C, H, W)."""
    f = cuda_ops.setup_filter([1, 3, 3, 1], device=x.device)
    b, n, other = torch.zeros(x.shape[1], device=x.device, dtype=x.dtype), x.numel(), torch.empty_like(x)
    return {
        "copy": (2 * n, lambda: other.copy_(x)),
        "upsample2d": (5 * n, lambda: cuda_ops.upsample2d(x, f)),
        "downsample2d": (n + n // 4, lambda: cuda_ops.downsample2d(x, f)),
        "filter2d": (2 * n, lambda: cuda_ops.filter2d(x, f)),
        "bias_act lrelu": (2 * n, lambda: cuda_ops.bias_act(x, b, act="lrelu")),
        "bias_act lrelu clamp": (2 * n, lambda: cuda_ops.bias_act(x, b, act="lrelu", clamp=256.0)),
    }


def device_of_kernels() -> torch.device:
    """Where kernels would run: a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def status() -> list[str]:
    """The lines about what runs and why."""
    device, mode = device_of_kernels(), dispatch.mode()
    problem = dispatch.triton_problem(device)
    if problem is not None and device.type == "cpu" and not dispatch.interpreted():
        problem = "torch sees no CUDA GPU"
    if mode == "reference":
        why = "plain torch, because FACELAB_OPS=reference asks for it"
    elif problem is None:
        why = "Triton kernels" + (" in the interpreter" if device.type == "cpu" else f" for tensors on {device}")
    elif mode == "auto":
        why = f"plain torch, because {problem}"
    else:
        why = f"an error, because FACELAB_OPS={mode} demands kernels and {problem}"
    lines = [f"FACELAB_OPS={mode}: {why}", ", ".join(f"{name} {value}" for name, value in versions().items())]
    return lines + [f"  {name:18}{what}" for name, what in OPS.items()]


def main() -> None:
    words = "Which kernels run here and why; on a GPU, how fast they are beside a copy."
    parser = argparse.ArgumentParser(prog="python -m cuda_ops", description=words)
    parser.add_argument("--batch", type=int, default=8, help="pictures of 128 channels, 256 x 256 (default 8)")
    parser.add_argument("--no-timing", action="store_true", help="only say what is available")
    options = parser.parse_args()
    if options.batch < 1:
        parser.error(f"--batch {options.batch}, expected at least 1")
    try:
        print("\n".join(status()))
    except ValueError as error:  # a misspelt FACELAB_OPS
        parser.error(str(error))
    if options.no_timing:
        return
    if not torch.cuda.is_available():
        print("no timing: torch sees no CUDA GPU")
        return
    print(f"TB/s, each number read and written once, {options.batch} x 128 x 256 x 256:")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, layout in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
            x = torch.randn(options.batch, 128, 256, 256, device="cuda").to(dtype).to(memory_format=layout)
            rates = []
            for op, (numbers, work) in works(x).items():
                rate = terabytes_per_second(numbers, x.element_size(), milliseconds(work)[0])
                rates.append(f"{op} {rate:.2f}")
            print(f"  {str(dtype)[6:]:9}{name:14}" + ", ".join(rates))


if __name__ == "__main__":
    main()
