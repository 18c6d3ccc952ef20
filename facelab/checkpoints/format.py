# SPDX-License-Identifier: Apache-2.0
"""facelab's checkpoint format: folders written whole or not at all, and single-file models.

A run keeps ``<run>/checkpoints/<step:08d>/`` and a text file ``<run>/checkpoints/latest`` that names the newest.
A checkpoint folder holds

* ``checkpoint.json``: format version, facelab version, ``meta`` (method, resolved config, step, images,
  deviations, ...), the list of files with sizes and CRC-32;
* one safetensors file for each weight group (``generator``, ``ema``, ``discriminator_img`` ...);
* ``state.json`` and ``state*.safetensors``: optimiser moments, scaler, RNG and data position.

A single-file model (:func:`export_model`) is one safetensors file whose header carries ``meta``.
Nothing here uses pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import facelab
from facelab.assets import bundled
from facelab.checkpoints import state_codec, tensor_files
from facelab.errors import UserError, nearest
from facelab.files import _umask, describe_os_error
from facelab.files import atomic_path as atomic_write

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "atomic_write",
    "checkpoint_folder",
    "export_model",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "prune",
    "save_checkpoint",
]

FORMAT_VERSION = 1
INDEX = "checkpoint.json"
LATEST = "latest"
_GROUP = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
_STEP_FOLDER = re.compile(r"\d{8,}")
_MODELS = (".safetensors", ".pkl", ".pt", ".pth")  # files that are one model, ours or to be converted
_TEMPORARY, _REPLACED, _DELETED = ".tmp", ".replaced", ".deleted"

Weights = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    weights: group name -> parameter name -> tensor. state: the nested training state as it was saved (None if it was
    not read or never stored). meta: method, config, step, images, deviations ... path: the folder or file it came from.
    """

    weights: Weights
    state: object
    meta: dict[str, object] = field(default_factory=dict)
    path: Path = Path()

    @property
    def step(self) -> int:
        """Training step, 0 where ``meta`` has none."""
        return int(self.meta.get("step", 0))  # type: ignore[call-overload]


def checkpoint_folder(run: str | Path, step: int) -> Path:
    """``<run>/checkpoints/<step:08d>``, the folder to give to :func:`save_checkpoint`."""
    return Path(run) / "checkpoints" / f"{step:08d}"


def save_checkpoint(
    folder: str | Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: object = None,
    meta: Mapping[str, object] | None = None,
    max_shard_mb: float = 1024,
    check_finite: bool = True,
) -> Path:
    """Write one checkpoint folder, all of it or nothing, then point ``latest`` beside it at it.

    Everything goes to a temporary sibling folder first, is flushed to the disk and renamed; a process killed at any
    moment leaves the earlier checkpoints and ``latest`` as they were, and the next save removes what it left behind.

    Args:
        folder: the checkpoint's own folder, see :func:`checkpoint_folder`. An existing one is replaced.
        weights: group name -> state dict.
        state: nested dict, list, tuple, tensor, array, number, text, bytes; see ``state_codec``.
        meta: JSON-able description: method, config, step, images, deviations ...
        max_shard_mb: largest file to write, in MiB; larger groups are split, larger tensors are cut.
        check_finite: refuse NaN and infinities in any tensor.

    Raises:
        UserError: a tensor is not finite (named), the disk is full, the folder cannot be written.
        ValueError: a group name, type or meta entry that cannot be stored.
    """
    folder = Path(folder)
    if not _STEP_FOLDER.fullmatch(folder.name):
        raise ValueError(
            f"{folder}: expected a folder named after the step, as in 00001000; use checkpoint_folder(run, step)"
        )
    tree, tensors = state_codec.encode_state(state)
    _check_weights(weights)
    if check_finite:
        _check_finite(weights, tensors)
    meta_text = _json(dict(meta or {}), "meta")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_TEMPORARY, dir=folder.parent))
        try:
            _write_contents(temporary, weights, tree, tensors, meta_text, int(max_shard_mb * 2**20))
            _put_in_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(describe_os_error(error, folder)) from error
    with atomic_write(folder.parent / LATEST) as path:
        path.write_text(folder.name + "\n")
    return folder


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    with_state: bool = True,
    groups: tuple[str, ...] | None = None,
) -> Checkpoint:
    """Read a checkpoint: a run folder, its ``checkpoints`` folder, one checkpoint folder or a single-file model.

    Args:
        device: where the weights go; the training state stays on the CPU.
        with_state: read the training state too (False for inference).
        groups: read only these weight groups; all by default.

    Raises:
        UserError: nothing there, or a file is missing, cut off or changed.
    """
    found = find_checkpoint(path)
    if found.is_file():
        return load_model(found, device)
    index = _read_index(found)
    wanted = tuple(index["weights"]) if groups is None else groups
    for group in wanted:
        if group not in index["weights"]:
            raise UserError(
                f"{found}: expected weights '{group}', got {sorted(index['weights'])}.{nearest(group, index['weights'])}"
            )
    names = [name for group in wanted for name in index["weights"][group]]
    names += index["state"] if with_state else []
    _check_files(found, index, names)
    weights = {
        group: tensor_files.read_shards([found / name for name in index["weights"][group]], device) for group in wanted
    }
    state = _read_state(found, index) if with_state else None
    return Checkpoint(weights, state, index["meta"], found)


def export_model(
    path: str | Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> Path:
    """Write a single-file model: one ``.safetensors`` with ``meta`` (method, config, deviations, card) in its header.

    ``dtype`` converts floating-point tensors (``torch.float16`` for bundled models). Same errors as
    :func:`save_checkpoint`; a value too large for ``dtype`` counts as not finite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    _check_weights(weights)
    cast = {
        group: {k: t.to(dtype) if dtype is not None and t.is_floating_point() else t for k, t in tensors.items()}
        for group, tensors in weights.items()
    }
    if check_finite:
        _check_finite(cast, {})
    header = {
        "format": "facelab",
        "format_version": str(FORMAT_VERSION),
        "facelab": facelab.__version__,
        "meta": _json(dict(meta or {}), "meta"),
    }
    flat = {f"{group}/{name}": tensor for group, tensors in cast.items() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        tensor_files.write_file(temporary, tensor_files.safetensors_chunks(flat, header))
    return path


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Checkpoint:
    """Read a single-file model; ``dtype`` converts floating-point tensors (``torch.float32`` undoes the fp16 of bundled ones).

    Raises:
        UserError: missing, damaged, or a safetensors file that facelab did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no model at {path}: expected a .safetensors file; check the path")
    header, _ = tensor_files.read_metadata(path)
    if header.get("format") != "facelab":
        raise UserError(
            f"{path}: expected a model written by facelab, got another safetensors file; convert it with "
            "scripts/convert_checkpoint.py"
        )
    _check_version(header.get("format_version", "?"), path)
    weights: Weights = {}
    for name, tensor in tensor_files.read_safetensors(path, device).items():
        group, _, key = name.partition("/")
        weights.setdefault(group, {})[key] = (
            tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        )
    return Checkpoint(weights, None, tensor_files.model_meta(header), path)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run (or of its ``checkpoints`` folder), by step."""
    root = _root_of(Path(folder))
    found = (p for p in root.iterdir() if _STEP_FOLDER.fullmatch(p.name)) if root.is_dir() else ()
    return sorted((p for p in found if (p / INDEX).is_file()), key=lambda p: int(p.name))


def prune(folder: str | Path, keep_last: int = 3, keep_every: int | None = None) -> list[Path]:
    """Delete old checkpoints; keep the last ``keep_last``, every multiple of ``keep_every`` steps and ``latest``.

    Returns the deleted folders. Each is renamed before it is emptied, so half a checkpoint is never mistaken for one.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: expected at least 1")
    everything = list_checkpoints(folder)
    pointed = _pointed_at(_root_of(Path(folder)))
    deleted = []
    for path in everything[:-keep_last]:
        if path == pointed or (keep_every and int(path.name) % keep_every == 0):
            continue
        grave = path.with_name(f".{path.name}{_DELETED}")
        try:
            os.rename(path, grave)
        except OSError as error:
            raise UserError(describe_os_error(error, path)) from error
        shutil.rmtree(grave, ignore_errors=True)
        deleted.append(path)
    return deleted


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder or model file that ``path`` stands for. UserError when there is none."""
    path = Path(path)
    if path.is_file():
        return path.parent if path.name == INDEX else path
    if not path.exists():
        replaced = path.with_name(f".{path.name}{_REPLACED}")  # killed between the two renames of a replacement
        if (replaced / INDEX).is_file():
            return replaced
        raise UserError(f"no checkpoint at {path}: no such file or folder; check the path.{_hint(path)}")
    if (path / INDEX).is_file():
        return path
    root = _root_of(path)
    pointed = _pointed_at(root)
    if pointed is not None:
        return pointed
    everything = list_checkpoints(root)
    if everything:
        return everything[-1]
    raise UserError(
        f"no checkpoint in {path}: expected a run folder with checkpoints/, or a folder with {INDEX}; "
        "check the path, or train first"
    )


def _hint(path: Path) -> str:
    """What ``path``, which is not there, may have meant: the model of that name, else the nearest model or folder."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    names = [p.name for p in beside if p.suffix in _MODELS or p.is_dir()]
    if path.name == str(path):  # a bare name may stand for a bundled model
        names += [asset.name for asset in bundled()]
    whole = f"{path.name}.safetensors"
    return f" Did you mean '{whole}'?" if whole in names else nearest(path.name, names)


def _root_of(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _pointed_at(root: Path) -> Path | None:
    """The folder that ``latest`` names; None without a pointer. Warns when it names nothing usable."""
    try:
        name = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if _STEP_FOLDER.fullmatch(name):
        for candidate in (root / name, root / f".{name}{_REPLACED}"):
            if (candidate / INDEX).is_file():
                return candidate
    warnings.warn(
        f"{root / LATEST} names '{name[:40]}', which is not there; using the newest complete checkpoint", stacklevel=3
    )
    return None


def _write_contents(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    tree: object,
    tensors: dict[str, Tensor],
    meta: str,
    limit: int,
) -> None:
    files: list[tensor_files.WrittenFile] = []
    index_weights: dict[str, list[str]] = {}
    for group, state_dict in weights.items():
        written = tensor_files.write_shards(folder, group, state_dict, limit)
        index_weights[group] = [f.name for f in written]
        files += written
    text = _json(tree, "state").encode()
    state_files = [tensor_files.WrittenFile("state.json", *tensor_files.write_file(folder / "state.json", [text]))]
    if tensors:
        state_files += tensor_files.write_shards(folder, "state", tensors, limit)
    files += state_files
    index = {
        "format": "facelab",
        "format_version": FORMAT_VERSION,
        "facelab": facelab.__version__,
        "meta": json.loads(meta),
        "weights": index_weights,
        "state": [f.name for f in state_files],
        "files": {f.name: {"size": f.size, "crc32": f.crc32} for f in files},
    }
    tensor_files.write_file(folder / INDEX, [json.dumps(index, indent=1).encode()])
    os.chmod(folder, 0o777 & ~_umask())
    _flush_folder(folder)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``; an existing one steps aside under a name that loading still finds."""
    aside = folder.with_name(f".{folder.name}{_REPLACED}")
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    _flush_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean_leftovers(root: Path) -> None:
    """Remove what an interrupted save or deletion left; bring a checkpoint back that was being replaced."""
    for path in root.iterdir():
        if not path.name.startswith(".") or not path.is_dir():
            continue
        if path.name.endswith(_REPLACED):
            home = path.with_name(path.name[1 : -len(_REPLACED)])
            if not home.exists():
                os.rename(path, home)
                continue
        if path.name.endswith((_TEMPORARY, _REPLACED, _DELETED)) and path.name[1:2].isdigit():
            shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        for key, kind in (("meta", dict), ("weights", dict), ("state", list), ("files", dict)):
            if not isinstance(index[key], kind):
                raise ValueError(f"'{key}' is not a {kind.__name__}")
        if any("/" in name or os.sep in name or name.startswith(".") for name in index["files"]):
            raise ValueError("a file name leaves the folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: expected a facelab checkpoint index, got {error!r}; use an earlier checkpoint of this run"
        ) from error
    _check_version(index.get("format_version", "?"), path)
    return index


def _check_version(version: object, path: Path) -> None:
    if str(version) != str(FORMAT_VERSION):
        raise UserError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, got {version}; update facelab to read it"
        )


def _check_files(folder: Path, index: dict, names: list[str]) -> None:
    """Compare sizes, then checksums, of the files that will be read with the index."""
    remedy = "use an earlier checkpoint of this run, or copy the folder again"
    for name in names:
        expected = index["files"].get(name)
        path = folder / name
        if expected is None or not path.is_file():
            size = f"{expected['size']} bytes" if expected else "an entry in its index"
            raise UserError(f"{path} is missing: expected {size}, got no file; {remedy}")
        got = path.stat().st_size
        if got != expected["size"]:
            raise UserError(f"{path} is damaged: expected {expected['size']} bytes, got {got}; {remedy}")
    for name in names:
        checksum = tensor_files.checksum_of(folder / name)
        if checksum != index["files"][name]["crc32"]:
            raise UserError(
                f"{folder / name} is damaged: expected CRC-32 {index['files'][name]['crc32']:08x}, got {checksum:08x} "
                f"at the right size of {index['files'][name]['size']} bytes; {remedy}"
            )


def _read_state(folder: Path, index: dict) -> object:
    """The training state, on the CPU: RNG states must live there and optimisers move theirs themselves."""
    shards = [folder / name for name in index["state"] if name.endswith(".safetensors")]
    try:
        tree = json.loads((folder / "state.json").read_bytes())
        return state_codec.decode_state(tree, tensor_files.read_shards(shards))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder}: the training state does not fit together ({error}); use an earlier checkpoint"
        ) from error


def _check_weights(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    for group, tensors in weights.items():
        if not _GROUP.fullmatch(group) or group.split("-")[0] in ("state", "checkpoint"):
            raise ValueError(f"weight group {group!r}: expected a plain word, not 'state' or 'checkpoint'")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"weights '{group}', entry '{name}': expected a tensor, got {type(tensor).__name__}")


def _check_finite(weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Tensor]) -> None:
    named = [(f"{group}.{name}", t) for group, tensors in weights.items() for name, t in tensors.items()]
    for name, tensor in [*named, *state.items()]:
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            continue
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise UserError(
                f"tensor '{name}' was not saved: expected finite numbers, got {count} of {tensor.numel()} NaN or infinite; "
                "go back to the last checkpoint with a smaller learning rate, or set the NaN policy"
            )


def _json(value: object, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be stored as JSON: {error}") from error
