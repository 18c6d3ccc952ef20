# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of CNeRF's field costs: operations, multiplications, memory kept, graph breaks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from facelab.fields.output import FieldOutput
from facelab.fields.sdf import gradient_by_autograd
from facelab.methods.cnerf.field import BoundCNerf, CNerfField, CNerfFieldConfig

Evaluate = Callable[[BoundCNerf, Tensor, Tensor], tuple[FieldOutput, Tensor]]


class Operations(TorchDispatchMode):
    """Counts what is sent to the kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def scene(regions: int, width: int = 16) -> tuple[BoundCNerf, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    config = CNerfFieldConfig(regions, 3, width, 8)
    field = CNerfField(config)
    field.reset_parameters(source)
    styles = torch.randn(1, regions, 5, 8, generator=source)
    points = 0.05 * torch.randn(1, 12, 10, 3, generator=source)
    directions = torch.nn.functional.normalize(torch.randn(1, 12, 3, generator=source), dim=-1)
    return field.bind(styles, features=False), points, directions


def eikonal(evaluate: Evaluate, bound: BoundCNerf, points: Tensor, directions: Tensor) -> Tensor:
    output, gradient = evaluate(bound, points, directions)
    assert output.sdf is not None
    return ((gradient.norm(dim=-1) - 1) ** 2).mean() + output.rgb.mean() + output.sdf.square().mean()


def pulled(bound: BoundCNerf, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
    return bound.with_gradient(points, directions)


def test_operations_do_not_grow_with_the_regions() -> None:
    counts = []
    for regions in (2, 9):
        with Operations() as counted:
            eikonal(pulled, *scene(regions)).backward()
        counts.append(counted.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("regions", [9])
def test_gradient_is_cheaper_than_a_double_backward(regions: int) -> None:
    """Multiplications of forward and backward, and what the graph keeps."""
    work, kept = {}, {}
    for name, evaluate in (("pulled", pulled), ("double", gradient_by_autograd)):
        bound, points, directions = scene(regions, 32)
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = eikonal(evaluate, bound, points, directions)
            loss.backward()
        work[name], kept[name] = counter.get_total_flops(), sum(sizes.values())
    assert work["pulled"] < work["double"]
    assert kept["pulled"] < 0.7 * kept["double"]


def test_one_graph_for_a_compiler() -> None:
    bound, points, directions = scene(3)
    torch._dynamo.reset()
    compiled = torch.compile(pulled, backend="eager", fullgraph=True)
    output, gradient = compiled(bound, points, directions)
    expected, slope = pulled(bound, points, directions)
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(output.sdf, expected.sdf)
