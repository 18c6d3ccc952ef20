# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the kernels for a GPU of compute capability 9.0; needs Triton, but no GPU.

Memory-bound kernels must read and write wide, keep everything in registers, and take no detour through
shared memory: all of that can be read off the machine code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cuda_ops import bias_act_kernels, dispatch, filter_launch, setup_filter

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.interpreted(), reason="the interpreter compiles nothing")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Recorder:
    """Stands for a kernel: compiles it for each launch, as the launch would, and keeps the result."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *positional: Any, num_warps: int, num_stages: int = 3, **named: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        values = {**dict(zip(self.kernel.arg_names, positional)), **named}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value, fixed = values[parameter.name], parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            else:
                signature[parameter.name] = parameter.annotation_type or ("fp32" if type(value) is float else "i32")
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not fixed):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))


def widths(ptx: str, what: str) -> set[int]:
    """Bits of the widest accesses to global memory: of ``ld`` or ``st``."""
    found = re.findall(rf"\b{what}\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", ptx)
    return {int(vector or 1) * int(bits) for vector, bits in found}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("last", [False, True])
def test_filters_keep_to_registers(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    from cuda_ops import filter_kernels

    name = "fir_channels_last" if last else "fir_planar"
    recorder = Recorder(getattr(filter_kernels, name))
    monkeypatch.setattr(filter_kernels, name, recorder)
    x = torch.empty(1, 16, 32, 32, dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if last else x
    filter_launch.upfirdn2d(x, setup_filter([1, 3, 3, 1]), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)
    (compiled,) = recorder.compiled
    assert compiled.metadata.shared == 0
    assert ".local" not in compiled.asm["ptx"]
    assert 64 in widths(compiled.asm["ptx"], "st")  # four columns, or four channels, at once
    assert max(widths(compiled.asm["ptx"], "ld")) == (64 if last else 32)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("down", [1, 2])
def test_filters_read_four_halves_at_once(monkeypatch: pytest.MonkeyPatch, down: int) -> None:
    from cuda_ops import filter_kernels

    recorder = Recorder(filter_kernels.fir_planar)
    monkeypatch.setattr(filter_kernels, "fir_planar", recorder)
    x = torch.empty(1, 16, 32, 32, dtype=torch.float16)
    filter_launch.upfirdn2d(x, setup_filter([1, 3, 3, 1]), (1, 1), (down, down), (2, 1, 2, 1), False, 1.0)
    (compiled,) = recorder.compiled
    assert compiled.metadata.shared == 0 and ".local" not in compiled.asm["ptx"]
    assert not re.findall(r"ld\.global\S*\.[bfu]16", compiled.asm["ptx"])
    assert max(widths(compiled.asm["ptx"], "ld")) == 64


@pytest.mark.parametrize("last", [False, True])
def test_pictures_of_all_sizes_share_a_compiled_filter(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """A compilation takes seconds, and a training step meets pictures of many sizes."""
    from cuda_ops import filter_kernels

    name = "fir_channels_last" if last else "fir_planar"
    kernel, compiled = getattr(filter_kernels, name), set()

    class Launches:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return self._launch

        def _launch(self, *positional: Any, **named: Any) -> None:
            values = {**dict(zip(kernel.arg_names, positional)), **named}
            fixed = [p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize]
            compiled.add(str([(n, values[n]) for n in fixed if not isinstance(values[n], torch.Tensor)]))

    monkeypatch.setattr(filter_kernels, name, Launches())
    for channels, side in ((512, 8), (512, 16), (128, 64), (32, 256)):
        x = torch.empty(1, channels, side, side, dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last) if last else x
        filter_launch.upfirdn2d(x, setup_filter([1, 3, 3, 1]), (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0)
    assert len(compiled) == 1, compiled


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("order", [0, 1])
def test_bias_act_reads_and_writes_16_bytes_a_lane(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    recorder = Recorder(bias_act_kernels.bias_act)
    monkeypatch.setattr(bias_act_kernels, "bias_act", recorder)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, b = torch.empty(1, 16, 64, 64).to(memory_format=layout), torch.empty(16)
        bias_act_kernels.launch(x, [x] * (order + 1), b, 1, "lrelu", 0.2, 1.4, 256.0, order, from_output=order == 1)
    for compiled in recorder.compiled:
        assert compiled.metadata.shared == 0
        assert max(widths(compiled.asm["ptx"], "ld")) == max(widths(compiled.asm["ptx"], "st")) == 128


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_renderers_gradient_adds_four_channels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda_ops import triplane_backward_kernels, triplane_launch
    from cuda_ops.triplane_render import TriplaneSpec

    recorder = Recorder(triplane_backward_kernels.render_backward)
    monkeypatch.setattr(triplane_backward_kernels, "render_backward", recorder)
    planes, rays = torch.empty(2, 3, 32, 64, 64), torch.empty(2, 32, 3)
    decoder = torch.empty(64, 32), torch.empty(64), torch.empty(33, 64), torch.empty(33)
    spec = TriplaneSpec(((0, 1), (0, 2), (2, 0)), 2.0, False, 2.25, 3.3, 48, 48, precision="tf32")
    gradients, depths = (torch.empty(2, 32, 32), torch.empty(3, 2, 32, 1)), torch.empty(2, 32, 96)
    triplane_launch.backward(*gradients, planes, rays, rays, decoder, depths, spec, True, False)
    (compiled,) = recorder.compiled
    added = set(re.findall(r"\b(?:atom|red)\.(\S*add\S*)", compiled.asm["ptx"]))
    assert added == {"global.gpu.relaxed.add.v4.f32"}, added
    assert compiled.metadata.shared <= 96 << 10  # fits GPUs of consumers too
