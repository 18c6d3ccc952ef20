# SPDX-License-Identifier: Apache-2.0
"""Masks for pictures: parser files -> :class:`~facelab.nn.pretrained.face_parsing.FaceParser` -> palette PNGs.

Of a parser's file only tensors are read; nothing in it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.data import reading
from facelab.data.classes import BISENET19_TO_CELEBA, NUM_CLASSES, PALETTE, SOFGAN_TO_CELEBA
from facelab.errors import Interrupted, UserError
from facelab.files import atomic_path, make_folder
from facelab.nn.pretrained.face_parsing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SOFGAN_CLASSES,
    FaceParser,
    SmallParser,
    bisenet_from_published,
    is_bisenet,
)
from facelab.progress import progress_bar
from facelab.tensor_files import one_line_for, read_tensor_file

FORMAT = "facelab-face-parser"
SETTINGS, REPORT = "masks.json", "report.json"
BISENET_SIZE = 512
_TABLES = {SOFGAN_CLASSES: SOFGAN_TO_CELEBA, len(BISENET19_TO_CELEBA): BISENET19_TO_CELEBA}


# --- files of parsers


def load_parser(path: str | Path, device: torch.device | str = "cpu") -> FaceParser:
    """A face parser from a file: SofGAN's (20 classes), the popular BiSeNet (19 classes), or one of our own.

    Which it is shows in its tensors. All give CelebAMask-HQ class numbers.

    Raises:
        UserError: no such file, damaged, or no face parser that is known.
    """
    path = Path(path)
    tensors, meta = _read(path)
    try:
        if meta.get("format") == FORMAT:
            parser = _small_parser(tensors, json.loads(meta["config"]))
        elif is_bisenet(tensors):
            parser = _published(tensors)
        else:
            raise ValueError("expected a BiSeNet face parser with 19 or 20 classes, or a parser of facelab's")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a face parser that facelab knows: {reason}; get the file again") from error
    return parser.to(device)


def save_small_parser(
    path: str | Path, net: SmallParser, size: int, meta: Mapping[str, Any] | None = None, dtype=torch.float16
) -> Path:
    """Write a parser of our own as safetensors that :func:`load_parser` reads.

    Args:
        size: side in pixels that it was trained for.
        meta: numbers and words about its training, kept in the file's header.
        dtype: of the stored weights.
    """
    from safetensors.torch import save_file

    config = {"widths": list(net.widths), "classes": net.classes, "size": size}
    header = {"format": FORMAT, "config": json.dumps(config), "meta": json.dumps(dict(meta or {}))}
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in net.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return Path(path)


def _small_parser(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> FaceParser:
    net = SmallParser(config["widths"], config["classes"])
    if config["classes"] != NUM_CLASSES:
        raise ValueError(f"it has {config['classes']} classes, expected {NUM_CLASSES}")
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    # SmallParser takes [-1, 1], which is the default normalisation of FaceParser
    return FaceParser(net, int(config["size"]), range(NUM_CLASSES), name=f"facelab parser at {config['size']} px")


def _published(tensors: Mapping[str, Tensor]) -> FaceParser:
    net = bisenet_from_published(tensors)
    classes = len(tensors["conv_out.conv_out.weight"])
    if classes not in _TABLES:
        raise ValueError(f"it has {classes} classes, expected {' or '.join(map(str, sorted(_TABLES)))}")
    if classes == SOFGAN_CLASSES:
        return FaceParser(net, BISENET_SIZE, SOFGAN_TO_CELEBA, name="SofGAN BiSeNet (20 classes)")
    return FaceParser(net, BISENET_SIZE, _TABLES[classes], IMAGENET_MEAN, IMAGENET_STD, "BiSeNet (19 classes)")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the header of a .safetensors or PyTorch file."""
    if not path.is_file():
        raise UserError(f"no parser file at {path}: expected a .pth or .safetensors file; check the path")
    meta: dict[str, str] = {}
    words = "a .pth or .safetensors file of tensors", "get the file again"
    content = read_tensor_file(path, *words)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with one_line_for(path, *words), safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} must hold a state dictionary (name -> tensor), got {type(content).__name__}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}, meta


# --- folders of pictures


@dataclass
class MaskReport:
    """What a run made; stored as ``report.json``.

    Attributes:
        written, kept: masks made now, and found from an earlier run.
        damaged: picture -> reason.
        pixels: per class, over the masks written now.
    """

    parser: str
    written: int = 0
    kept: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    pixels: list[int] = field(default_factory=lambda: [0] * NUM_CLASSES)
    finished: bool = False


@torch.no_grad()
def parse_pictures(
    parser: FaceParser, pictures: Tensor, sizes: Sequence[tuple[int, int]] | None = None
) -> list[np.ndarray]:
    """(N, 3, H, W) uint8 -> N uint8 maps of CelebAMask-HQ classes, of ``sizes`` (h, w) or the parser's own size."""
    device = parser.table.device
    scores = parser.scores(pictures.to(device).float() / 127.5 - 1)
    wanted = [None] * len(pictures) if sizes is None else sizes
    maps = [parser.labels(one[None], size)[0] for one, size in zip(scores, wanted, strict=True)]
    return [labels.to(torch.uint8).cpu().numpy() for labels in maps]


def write_masks(
    images: str | Path,
    out: str | Path,
    parser_path: str | Path,
    *,
    size: int = 512,
    batch: int = 16,
    device: torch.device | str = "cpu",
    workers: int = 4,
    progress: bool = True,
) -> MaskReport:
    """Masks for all pictures of a folder and its subfolders, as palette PNGs under the same relative names.

    Done masks are kept, so the same command goes on after an interruption. Damaged pictures are named in the report
    and do not stop the others.

    Args:
        images: folder of aligned portraits.
        out: folder of the masks; a PNG's value is its class, its palette shows the usual colours.
        parser_path: file of the parser.
        size: short side of the masks; never larger than the picture's.
        batch: pictures that go through the network together.
        device: where the network runs.
        workers: threads that read and write files.
        progress: show a bar.

    Raises:
        UserError: no pictures, names that collide, another parser or size began the folder, no picture could be read.
        Interrupted: Ctrl-C; what is done is kept.
    """
    images, out = Path(images), Path(out)
    if size < 8 or batch < 1 or workers < 1:
        raise UserError(f"size must be at least 8, batch and workers at least 1, got {size}, {batch}, {workers}")
    jobs = _jobs(images, out)
    parser = load_parser(parser_path, device)
    _claim(out, {"parser": _digest(Path(parser_path)), "size": size})
    report = MaskReport(parser.name)
    todo = [job for job in jobs if not _is_done(job[1])]
    report.kept = len(jobs) - len(todo)
    try:
        with ThreadPoolExecutor(workers) as pool, torch.inference_mode():
            for done in _with_bar(_run(todo, parser, size, batch, pool, report), len(todo), progress):
                report.written += done
        report.finished = True
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is done is kept, give the same command again to go on") from None
    finally:
        with atomic_path(out / REPORT) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if not report.written and not report.kept:
        name, reason = next(iter(report.damaged.items()))
        raise UserError(f"none of {len(jobs)} pictures could be parsed; {name}: {reason}")
    return report


_Job = tuple[Path, Path]  # picture, mask


def _jobs(images: Path, out: Path) -> list[_Job]:
    if not images.is_dir():
        raise UserError(f"no folder {images}: expected pictures; check the path")
    inside = out.resolve()
    if inside == images.resolve() or inside in images.resolve().parents:
        raise UserError(f"masks cannot go to {out}, where the pictures lie; choose another folder for them")
    pictures = [p for p in reading.list_images(images, recursive=True) if inside not in p.resolve().parents]
    if not pictures:
        raise UserError(f"{images} holds no pictures ({', '.join(reading.IMAGE_SUFFIXES)}); check the path")
    jobs: dict[Path, Path] = {}
    for picture in pictures:
        mask = (out / picture.relative_to(images)).with_suffix(".png")
        if mask in jobs:
            raise UserError(f"{picture} and {jobs[mask].name} would share the mask {mask.name}; rename one of them")
        jobs[mask] = picture
    return [(picture, mask) for mask, picture in jobs.items()]


def _run(
    jobs: Sequence[_Job], parser: FaceParser, size: int, batch: int, pool: ThreadPoolExecutor, report: MaskReport
) -> Iterator[int]:
    """Read the next batch while one is in the network and one is being written."""
    groups = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    ahead = [pool.map(lambda job: _load(job, parser.size), group) for group in groups[:1]]
    writing: list[Any] = []
    for number, group in enumerate(groups):
        loaded = list(ahead.pop())
        if number + 1 < len(groups):
            ahead.append(pool.map(lambda job: _load(job, parser.size), groups[number + 1]))
        for job, item in zip(group, loaded, strict=True):
            if isinstance(item, str):
                report.damaged[job[0].name] = item
        good = [(job, item) for job, item in zip(group, loaded, strict=True) if not isinstance(item, str)]
        for written in writing:
            written.result()
        if good:
            writing = _parse_group(good, parser, size, pool, report)
        yield len(good)
    for written in writing:
        written.result()


def _parse_group(good: list, parser: FaceParser, size: int, pool: ThreadPoolExecutor, report: MaskReport) -> list:
    pictures = torch.stack([torch.from_numpy(array) for _, (array, _) in good]).permute(0, 3, 1, 2)
    masks = parse_pictures(parser, pictures, [_mask_shape(original, size) for _, (_, original) in good])
    for mask in masks:
        counts = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
        report.pixels = [a + int(b) for a, b in zip(report.pixels, counts, strict=True)]
    return [pool.submit(save_mask, job[1], mask) for (job, _), mask in zip(good, masks, strict=True)]


def _load(job: _Job, side: int) -> tuple[np.ndarray, tuple[int, int]] | str:
    """((side, side, 3) uint8, (width, height) of the file), or why not."""
    try:
        image = reading.read_image(job[0])
    except UserError as error:
        return str(error)
    return np.array(image.resize((side, side), Image.Resampling.BILINEAR)), image.size


def _mask_shape(picture: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) of a picture -> (height, width) of its mask."""
    scale = min(1.0, short_side / min(picture))
    return round(picture[1] * scale), round(picture[0] * scale)


def save_mask(path: str | Path, labels: np.ndarray) -> None:
    """Write (H, W) uint8 classes as a PNG whose values are the classes and whose palette shows their colours."""
    values = np.ascontiguousarray(labels, dtype=np.uint8)
    picture = Image.frombytes("P", (values.shape[1], values.shape[0]), values.tobytes())
    picture.putpalette([value for colour in PALETTE for value in colour])
    with atomic_path(path) as temporary:
        picture.save(temporary, optimize=True)


def _is_done(mask: Path) -> bool:
    if not mask.exists():
        return False
    try:
        reading.read_mask(mask)
    except UserError:
        return False  # spoiled: make it again
    return True


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Make the folder, or refuse one that another parser or size has begun to fill."""
    make_folder(out)
    path = out / SETTINGS
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another folder") from error
    if before != settings:
        raise UserError(f"{out} was begun with another parser or size; give the same ones or choose another folder")


def _with_bar(done: Iterator[int], total: int, progress: bool) -> Iterator[int]:
    with progress_bar(total=total, unit="picture", show=progress, smoothing=0.05) as bar:
        for count in done:
            yield count
            bar.update(count)
