# SPDX-License-Identifier: Apache-2.0
"""Make pickles as other programs write them, the harmless layout and the hostile ones, without their classes."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

BUFFERS = ("resample_filter", "noise_const", "w_avg", "dataset_label_std", "p", "Hz_geom", "Hz_fbank")
TRAP = "import pathlib\npathlib.Path('PWNED').write_text('source text was run')\nraise RuntimeError('source text was run')\n"
# Modules that the official files name. As traps on the search path they show that nothing is imported.
NAMED_MODULES = (
    "torch_utils.persistence",
    "dnnlib.util",
    "training.triplane",
    "training.volumetric_rendering.renderer",
)


class Call:
    """Pickles as a call of a global given by name, without importing it."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.path, self.arguments = (module, name), arguments


class Record:
    """Pickles as an object of a class given by name: NEWOBJ and BUILD."""

    def __init__(self, module: str, name: str, state: dict) -> None:
        self.path, self.state = (module, name), state


class _Pickler(pickle._Pickler):
    """Python's pickler, which writes :class:`Call` as global and REDUCE, :class:`Record` as NEWOBJ and BUILD."""

    def save(self, obj: object, *rest: object) -> None:
        if isinstance(obj, Call):
            self._name(obj.path)
            super().save(obj.arguments)
            self.write(b"R")
        elif isinstance(obj, Record):
            self._name(obj.path)
            self.write(b")\x81")
            super().save(obj.state)
            self.write(b"b")
        else:
            super().save(obj, *rest)

    def _name(self, path: tuple[str, str]) -> None:
        if self.proto >= 4:
            super().save(path[0])
            super().save(path[1])
            self.write(b"\x93")
        else:
            self.write(b"c" + "\n".join(path).encode() + b"\n")


def dump(value: object, protocol: int = 4) -> bytes:
    """``value`` as a pickle."""
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def blob(tensor: Tensor) -> bytes:
    """The storage of a tensor in torch's format before 1.6."""
    stream = io.BytesIO()
    torch.save(
        torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True),
        stream,
        _use_new_zipfile_serialization=False,
    )
    return stream.getvalue()


def tensor_call(tensor: Tensor) -> Call:
    """A tensor as plain pickle writes it."""
    storage = Call("torch.storage", "_load_from_bytes", blob(tensor))
    shape, stride = tuple(tensor.shape), tensor.stride()
    return Call(
        "torch._utils", "_rebuild_tensor_v2", storage, 0, shape, stride, False, Call("collections", "OrderedDict")
    )


def embedded(name: str, state: dict, source: str = TRAP) -> Call:
    """A module record with source text, as the persistence of the StyleGAN family writes it."""
    record = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", record)


def numpy_scalar(value: float) -> Call:
    """A float64 of numpy 2."""
    kind = Call("numpy", "dtype", "f8", False, True)
    return Call("numpy._core.multiarray", "scalar", kind, struct.pack("<d", value))


def easy_dict(values: Mapping[str, object]) -> dict:
    """Nested settings; a plain dictionary, which is what the class is."""
    return {key: easy_dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def module_record(
    state: Mapping[str, Tensor], classes: Mapping[str, str], attributes: Mapping[str, object], name: str = ""
) -> Call:
    """A module and all below it from a flat state dict.

    Args:
        state: dotted key -> tensor.
        classes: dotted module name -> class name; modules that are missing here are called Layer.
        attributes: of the topmost module.
    """
    parameters: dict[str, object] = {}
    buffers: dict[str, object] = {}
    below: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = tensor
        elif head in BUFFERS:
            buffers[head] = tensor_call(tensor)
        else:
            parameters[head] = Call("torch._utils", "_rebuild_parameter", tensor_call(tensor), False, {})
    children = {
        head: module_record(inner, classes, {"gain": numpy_scalar(0.5)}, f"{name}.{head}".lstrip("."))
        for head, inner in below.items()
    }
    return embedded(
        classes.get(name, "Layer"),
        {
            "training": False,
            "_parameters": parameters,
            "_buffers": buffers,
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": {},
            "_modules": children,
            **attributes,
        },
    )


def network_record(
    class_name: str, state: Mapping[str, Tensor], init_kwargs: Mapping[str, object], **attributes: object
) -> Call:
    """A whole network with constructor arguments and attributes."""
    plain = {key: easy_dict(value) if isinstance(value, Mapping) else value for key, value in attributes.items()}
    return module_record(state, {"": class_name}, {"_init_args": (), "_init_kwargs": easy_dict(init_kwargs), **plain})


def small_network_pickle(protocol: int = 4) -> bytes:
    """A network pickle of a few kilobytes with everything that the layout knows."""
    numbers = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    state = {
        "b4.conv1.weight": normal(2, 2, 3, 3),
        "b4.conv1.noise_const": normal(4, 4),
        "mapping.w_avg": normal(4),
        "dataset_label_std": normal(25),
    }
    generator = network_record(
        "TriPlaneGenerator",
        state,
        {"z_dim": 4, "rendering_kwargs": {"box_warp": 1, "avg_camera_pivot": [0, 0, 0.2]}},
        neural_rendering_resolution=96,
        rendering_kwargs={"box_warp": 1.5},
    )
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    decoder = Record("training.triplane", "OSGDecoder", empty)
    axes = {"plane_axes": tensor_call(normal(3, 3, 3))}  # a plain attribute, no buffer
    renderer = Record("training.volumetric_rendering.renderer", "ImportanceRenderer", {**empty, **axes})
    other = embedded("DualDiscriminator", {**empty, "_modules": {"a": decoder, "b": renderer}})
    tree = {"training_set_kwargs": {"path": "x.zip", "max_size": 8}, "G": generator, "D": other, "G_ema": generator}
    return dump({**tree, "augment_pipe": None}, protocol)


def lay_traps(folder: Path) -> None:
    """Modules under the names that official files mention; importing any of them leaves a file behind."""
    for name in NAMED_MODULES:
        *parents, last = name.split(".")
        place = folder.joinpath(*parents)
        place.mkdir(parents=True, exist_ok=True)
        for number in range(len(parents)):
            (folder.joinpath(*parents[: number + 1]) / "__init__.py").touch()
        (place / f"{last}.py").write_text(TRAP)
