# SPDX-License-Identifier: Apache-2.0
"""Tensors to and from safetensors files: streamed, split by size, with a checksum, never through pickle."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from facelab.errors import UserError

_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_PIECE = "\x1f"  # separates a tensor's name from its piece number; a unit separator never stands in a parameter name


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written: name inside the folder, size in bytes, CRC-32 of its content."""

    name: str
    size: int
    crc32: int


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, int]:
    """Write ``chunks`` to ``path``, flush them to the disk, return (bytes, CRC-32). The one place that writes data."""
    size, checksum = 0, 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
        file.flush()
        os.fsync(file.fileno())
    return size, checksum


def checksum_of(path: Path) -> int:
    """CRC-32 of a file, read in pieces of 4 MiB."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: header first, then one chunk for each tensor.

    Only one tensor at a time is copied to the host, so a checkpoint needs no second copy of the model.

    Raises:
        ValueError: a dtype or layout that the format cannot hold.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide dtypes first: readers may then map every tensor at its natural alignment.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided:
            raise ValueError(
                f"tensor '{name}' has dtype {tensor.dtype}, layout {tensor.layout}: not storable, convert it first"
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield _bytes_of(tensors[name])


def write_shards(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], max_bytes: int, metadata: Mapping[str, str] | None = None
) -> list[WrittenFile]:
    """Write ``tensors`` as ``<stem>.safetensors`` or, where that would pass ``max_bytes``, as numbered shards.

    A tensor larger than a shard is cut into flat pieces; :func:`read_shards` joins them.
    """
    shards = _plan_shards(tensors, max_bytes)
    written = []
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        size, crc32 = write_file(folder / name, safetensors_chunks(shard, metadata))
        written.append(WrittenFile(name, size, crc32))
    return written


def read_shards(paths: Iterable[Path], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of one or more shards and join the pieces of cut ones. UserError on a damaged file."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, tuple[int, ...], Tensor]]] = {}
    for path in paths:
        for name, tensor in read_safetensors(path, device).items():
            if _PIECE not in name:
                tensors[name] = tensor
                continue
            base, number, shape = name.split(_PIECE)
            sizes = tuple(int(n) for n in shape.split("x"))
            pieces.setdefault(base, []).append((int(number), sizes, tensor))
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        tensors[name] = torch.cat([part[2] for part in parts]).reshape(parts[0][1])
    return tensors


def read_safetensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Tensors of one safetensors file, by name in sorted order. UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot read {path}: expected an undamaged safetensors file, got '{reason}'; copy or download it again"
        ) from error
    return {name: tensors[name] for name in sorted(tensors)}


def read_metadata(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """(metadata, name -> (dtype name, shape)) from the header of a safetensors file; tensor data is not touched.

    Raises:
        UserError: not a safetensors file, or cut off.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
            if length > min(size - 8, 100 << 20):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path}: expected a safetensors file, got something else ({error}); check the path"
        ) from error
    if size != 8 + length + end:
        raise UserError(f"{path} is damaged: expected {8 + length + end} bytes, got {size}; copy or download it again")
    return metadata, shapes


def model_meta(header: Mapping[str, str]) -> dict[str, object]:
    """The ``meta`` that a single-file model carries in its header; empty if it has none."""
    meta = json.loads(header.get("meta", "{}"))
    return meta if isinstance(meta, dict) else {}


def _plan_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Distribute tensors over shards of at most ``max_bytes`` of file each, in order."""
    shards: list[dict[str, Tensor]] = [{}]
    used = margin = 256  # header frame and metadata of a shard
    for name, tensor in _pieces(tensors, max(max_bytes - 4096, 1024)):
        size = tensor.numel() * tensor.element_size() + len(name.encode()) * 2 + 160  # data and header entry
        if shards[-1] and used + size > max_bytes:
            shards.append({})
            used = margin
        shards[-1][name] = tensor
        used += size
    return shards


def _pieces(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if _PIECE in name:
            raise ValueError(f"tensor name {name!r} holds a unit separator character, which this format reserves")
        if tensor.numel() * tensor.element_size() <= max_bytes:
            yield name, tensor
            continue
        shape = "x".join(str(n) for n in tensor.shape)
        step = max(1, max_bytes // tensor.element_size())
        flat = tensor.detach().reshape(-1)
        for number, start in enumerate(range(0, flat.numel(), step)):
            yield f"{name}{_PIECE}{number}{_PIECE}{shape}", flat[start : start + step]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())
