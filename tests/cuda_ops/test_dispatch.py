# SPDX-License-Identifier: Apache-2.0
"""FACELAB_OPS: read at use, one warning, clear errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import dispatch
from cuda_ops.__main__ import main, status

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    dispatch.forget_warnings()
    yield
    dispatch.forget_warnings()


def test_fallback_warns_once_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "auto")
    with pytest.warns(RuntimeWarning, match="some_op: plain torch runs.*on the CPU"):
        assert dispatch.choose("some_op", CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("some_op", CPU) == "reference"
    with pytest.warns(RuntimeWarning, match="the width is 5"):
        dispatch.choose("some_op", CPU, "the width is 5")


def test_reference_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("some_op", CPU) == "reference"


@pytest.mark.parametrize("demanded", ["cuda", "triton"])
def test_a_demand_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch, demanded: str) -> None:
    monkeypatch.setenv("FACELAB_OPS", demanded)
    with pytest.raises(RuntimeError, match=f"FACELAB_OPS={demanded} but some_op has no kernel here: the tensors"):
        dispatch.choose("some_op", CPU)


def test_a_misspelt_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "tritn")
    with pytest.raises(ValueError, match="'tritn', expected one of auto, cuda, triton, reference"):
        dispatch.mode()


def test_the_variable_is_read_at_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "reference")
    assert dispatch.mode() == "reference"
    monkeypatch.setenv("FACELAB_OPS", "AUTO")
    assert dispatch.mode() == "auto"


def test_the_twin_is_the_quiet_choice_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("some_op", CPU, cpu_twin=True) == "reference"


def test_a_kernel_that_fails_is_given_up_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel() -> torch.Tensor:
        calls.append(1)
        raise OSError("no C compiler\nand more lines")

    one = torch.ones(1)
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: None)
    monkeypatch.setenv("FACELAB_OPS", "auto")
    gpu = torch.device("cuda")
    with pytest.warns(RuntimeWarning, match="some_op: .*OSError: no C compiler; FACELAB_OPS=triton") as given:
        assert dispatch.run("some_op", gpu, None, kernel, lambda: one) is one
        assert dispatch.run("some_op", gpu, None, kernel, lambda: one) is one
    assert len(given) == 1 and len(calls) == 1
    dispatch.forget_warnings()
    monkeypatch.setenv("FACELAB_OPS", "triton")
    with pytest.raises(OSError, match="no C compiler"):
        dispatch.run("some_op", gpu, None, kernel, lambda: one)


def test_status_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FACELAB_OPS", "auto")
    lines = status()
    assert lines[0] == "FACELAB_OPS=auto: plain torch, because torch sees no CUDA GPU"
    assert any("filtered_lrelu" in line and "no kernel of its own" in line for line in lines)
    monkeypatch.setenv("FACELAB_OPS", "reference")
    assert "because FACELAB_OPS=reference asks for it" in status()[0]


def test_importing_compiles_and_imports_nothing() -> None:
    code = (
        "import sys, cuda_ops.film_siren, cuda_ops.film_siren_backward, cuda_ops.grid_lookup;"
        "sys.exit(any(m in sys.modules for m in ('cuda_ops.siren_kernels', 'cuda_ops.grid_kernels',"
        "'cuda_ops.filter_kernels', 'cuda_ops.bias_act_kernels', 'facelab')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_ops_take_the_short_way_only_where_nothing_looks_on() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 2, 4, 4)
    assert dispatch.eager(x) and dispatch.eager(torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not dispatch.eager(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not dispatch.eager(x)
    seen = []
    torch.func.vjp(lambda x: seen.append(dispatch.eager(x)) or x, x)
    torch.compile(lambda x: seen.append(dispatch.eager(x)) or x, backend="eager")(x)
    assert seen == [False, False]


@pytest.mark.parametrize("case", ["bias_act", "upfirdn2d"])
def test_the_short_way_gives_what_the_op_gives(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of first and second order."""
    monkeypatch.setenv("FACELAB_OPS", "auto")
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    b, f = torch.randn(2, dtype=torch.float64, requires_grad=True), cuda_ops.setup_filter([1, 3, 3, 1])

    def numbers() -> list[Tensor]:
        if case == "bias_act":
            y = cuda_ops.bias_act(x, b, act="softplus", gain=0.7, clamp=2.0)
        else:
            y = cuda_ops.upfirdn2d(x, f, down=2, padding=1) + b.sum()
        first = torch.autograd.grad(y.square().sum(), (x, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, b))
        return [y, *first, *second]

    short = numbers()
    monkeypatch.setattr(dispatch, "eager", lambda x: False)
    for a, b_ in zip(short, numbers(), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b_, rtol=0, atol=0)


def test_the_status_command_names_a_misspelt_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FACELAB_OPS", "tritn")
    monkeypatch.setattr(sys, "argv", ["cuda_ops"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "FACELAB_OPS is 'tritn', expected one of auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "words"), [("tritn", "FACELAB_OPS is 'tritn', expected"), ("triton", "has no kernel here")]
)
def test_a_command_says_what_is_wrong_with_the_setting_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, words: str
) -> None:
    from facelab.cli.common import friendly

    monkeypatch.setenv("FACELAB_OPS", value)
    with pytest.raises(SystemExit) as stop:
        friendly(lambda: cuda_ops.bias_act(torch.ones(1, 2), act="lrelu"))()
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and words in line and line.count("\n") == 1
