# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: a kernel or its plain torch twin.

The environment variable ``FACELAB_OPS`` is read at each use, never at import:

- ``auto`` (default): kernels for tensors on a GPU, the twin elsewhere; ONE warning a reason when a
  kernel was wanted and cannot run;
- ``cuda``, ``triton``: kernels are demanded; where none can run, an OpsError says why. ``triton`` also takes CPU
  tensors when ``TRITON_INTERPRET=1`` (tests without a GPU). An op that has kernels of one kind only
  uses these for both names;
- ``reference``: always the twin, silently.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Result = TypeVar("Result")


class OpsError(RuntimeError, ValueError):
    """``FACELAB_OPS`` asks for what does not exist, or cannot run here. One line, for the user."""


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("auto", "cuda", "triton", "reference")
_warned: set[str] = set()
_failed: dict[str, str] = {}  # op -> why its kernel is not tried again
_lock = threading.Lock()


def mode() -> str:
    """The value of ``FACELAB_OPS`` now. OpsError when it is not one of :data:`MODES`."""
    value = os.environ.get("FACELAB_OPS", "auto").strip().lower() or "auto"
    if value not in MODES:
        raise OpsError(f"FACELAB_OPS is {value!r}, expected one of {', '.join(MODES)}")
    return value


def interpreted() -> bool:
    """True when Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with: pip install triton"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None when they can."""
    if (error := _triton_import_error()) is not None:
        return error
    if device.type == "cpu":
        return None if interpreted() else "the tensors are on the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for device type {device.type!r} of this torch build"
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _capability(index)
    return None if major >= 8 else f"the GPU's compute capability {major}.{minor} is below 8.0"


def eager(x: Tensor) -> bool:
    """True where ``x`` is a plain tensor that nothing traces, fakes, counts or transforms.

    There an op may be called without the machinery of torch.library, which costs more than the kernels of small
    pictures: a hundred microseconds for each call that is differentiated.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def dtype_problem(x: Tensor) -> str | None:
    """Why the filter and activation kernels do not take the dtype of ``x``, or None."""
    return None if x.dtype in DTYPES else f"the dtype is {x.dtype}, the kernels take {', '.join(map(str, DTYPES))}"


def choose(
    op: str, device: torch.device, problem: str | None = None, cpu_twin: bool = False
) -> Literal["triton", "reference"]:
    """Pick the implementation of ``op`` for tensors on ``device``.

    Args:
        op: name for messages.
        device: where the tensors are.
        problem: why the op's kernels do not support these arguments; None = they do.
        cpu_twin: the twin is what is expected on the CPU, so that it needs no warning there.

    Raises:
        OpsError: kernels were demanded by name and cannot run.
    """
    wanted = mode()
    if wanted == "reference":
        return "reference"
    problem = problem or triton_problem(device)
    if problem is None:
        return "triton"
    if wanted in ("cuda", "triton"):
        raise OpsError(f"FACELAB_OPS={wanted} but {op} has no kernel here: {problem}; use FACELAB_OPS=auto")
    if cpu_twin and device.type == "cpu":
        return "reference"
    warn_once(
        f"{op}: plain torch runs instead of the kernels, slower, because {problem}; FACELAB_OPS=reference silences this"
    )
    return "reference"


def run(
    op: str, device: torch.device, problem: str | None, kernel: Callable[[], Result], twin: Callable[[], Result]
) -> Result:
    """``kernel()`` or ``twin()``, as :func:`choose` says; the twin on the CPU without a warning.

    A kernel that fails (no C compiler for Triton's launcher, an unsupported GPU ...) is not tried again
    in this process: with FACELAB_OPS=auto one warning is given and the twin runs from then on.

    Raises:
        OpsError: as in :func:`choose`; or whatever the kernel raised, where it was demanded by name
            or ran out of memory.
    """
    if choose(op, device, _failed.get(op) or problem, cpu_twin=True) == "reference":
        return twin()
    try:
        return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the twin can do the work
        if mode() != "auto":
            raise
        words = str(error).strip().splitlines() or ["no message"]
        _failed[op] = f"the kernel failed with {type(error).__name__}: {words[0]}; FACELAB_OPS=triton shows all of it"
        choose(op, device, _failed[op])
    return twin()


def warn_once(message: str) -> None:
    """Warn with ``message`` the first time it is given in this process."""
    with _lock:
        if message in _warned:
            return
        _warned.add(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def forget_warnings() -> None:
    """Let every warning be given again, and failed kernels be tried again (tests)."""
    with _lock:
        _warned.clear()
        _failed.clear()
