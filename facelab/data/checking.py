# SPDX-License-Identifier: Apache-2.0
"""Is a set of pictures with cameras (and masks) what it seems to be? Files, copies, labels, poses, masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.data.classes import NUM_CLASSES
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import CONVENTIONS, mirror_label, to_opencv_cam2world
from facelab.data.eg3d_store import labelled_names, read_description, split_names
from facelab.data.prepare import histogram_lines
from facelab.data.reading import IMAGE_SUFFIXES
from facelab.errors import UserError

FAST_DECODES = 64
MASK_SIZE = 128  # pixels at which masks and pictures are compared
RIGID = 1e-3  # largest deviation of a rotation from orthonormal
RADIUS_SPREAD = 0.01  # of the median radius, beyond which a camera is named
LOOKS = 0.8  # mean cosine from which cameras count as looking at the head
OWN_MASK = 0.6  # share of pictures whose edges must follow their own mask better than another one's
COPY_TOLERANCE = 1e-3  # of labels of mirror images
Tick = Callable[[int], Any]


@dataclass(frozen=True)
class PoseStats:
    """What the cameras of a set imply; angles in radians from frontal, of the camera's position.

    Attributes:
        h_mean, v_mean, h_stddev, v_stddev: yaw (towards the subject's left) and elevation: what a pose
            sampler takes as its means and deviations.
        h_range, v_range: smallest and largest.
        roll_stddev: of the camera about its own axis.
        radius: smallest, median, largest distance to the origin, scene units.
        focal: smallest, median, largest normalised focal length.
        look_at: the point nearest to all optical axes.
        convention: the one of CONVENTIONS under which the cameras look at the head; None if none fits.
        mirrored: correlation of the yaw histogram with its mirror image, 1 = symmetric.
    """

    h_mean: float
    v_mean: float
    h_stddev: float
    v_stddev: float
    h_range: tuple[float, float]
    v_range: tuple[float, float]
    roll_stddev: float
    radius: tuple[float, float, float]
    focal: tuple[float, float, float]
    look_at: tuple[float, float, float] | None
    convention: str | None
    mirrored: float | None


@dataclass(frozen=True)
class MaskStats:
    """Do masks and pictures belong together?

    Attributes:
        compared: pictures that were compared.
        edge_ratio: mean picture gradient on the borders between classes over that everywhere, median.
        own_better: share of pictures whose edges follow their own mask better than the next picture's.
        class_pixels, class_images: per class, pixels over the decoded masks and masks that contain it.
    """

    compared: int
    edge_ratio: float
    own_better: float
    class_pixels: tuple[int, ...]
    class_images: tuple[int, ...]


@dataclass
class SetReport:
    """What a check found: ``problems`` make the set unusable, ``warnings`` should be looked at."""

    root: str
    pictures: int
    decoded: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    poses: PoseStats | None = None
    masks: MaskStats | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        sizes = ", ".join(f"{count} of {size}" for size, count in self.sizes.items())
        text = [f"{self.pictures} pictures, {self.decoded} decoded and sound ({sizes or 'none'})"]
        if self.poses is not None:
            text += _pose_lines(self.poses)
        if self.masks is not None:
            m = self.masks
            text.append(
                f"masks: edges on class borders {m.edge_ratio:.2f} times the mean, "
                f"{100 * m.own_better:.0f} % of {m.compared} fit their own mask best"
            )
            text += histogram_lines(m.class_pixels, m.class_images, self.decoded)
        text += [f"note: {line}" for line in self.notes]
        return text + [f"warning: {line}" for line in self.warnings] + [f"problem: {line}" for line in self.problems]


@dataclass
class _Seen:
    """What was learnt about one picture."""

    size: str = ""
    digest: str = ""
    mirrored: str = ""
    problem: str = ""
    own: float = float("nan")
    other: float = float("nan")
    counts: np.ndarray | None = None


def check_set(dataset: Eg3dDataset, fast: bool = False, tick: Tick | None = None) -> SetReport:
    """Look at a set that was opened without mirroring.

    Args:
        fast: of sets larger than 64 decode only 64, evenly spread; copies are looked for among these.
        tick: told how many pictures were done.

    Returns:
        Everything found; nothing is raised for what is wrong with files or labels.
    """
    count = len(dataset.names)
    step = max(1, count // FAST_DECODES) if fast else 1
    chosen = list(range(0, count, step))
    report = SetReport(str(dataset.store.root), count)
    another = dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))

    def look(index: int) -> _Seen:
        seen = _examine(dataset, index, another[index])
        if tick is not None:
            tick(1)
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = dict(zip(chosen, pool.map(look, chosen), strict=True))
    sound = {index: s for index, s in seen.items() if not s.problem}
    report.decoded = len(sound)
    report.problems += [s.problem for s in seen.values() if s.problem]
    for entry in sound.values():
        report.sizes[entry.size] = report.sizes.get(entry.size, 0) + 1
    if len(report.sizes) > 1:
        report.warnings.append("pictures have several sizes; training brings them to one")
    if len(chosen) < count:
        report.notes.append(f"every {step}th picture was decoded (--fast)")
    _find_copies(dataset, sound, report)
    if dataset.labels is not None:
        check_cameras(dataset.labels, dataset.names, report)
    else:
        report.notes.append("the set has no camera labels")
    _find_lonely(dataset, report)
    if dataset.mask_names is not None:
        _judge_masks(dataset, sound, report)
    return report


# ------------------------------------------------------------------ cameras


def check_cameras(labels: Tensor, names: Sequence[str], report: SetReport) -> None:
    """Judge (N, 25) labels and put the result into ``report``."""
    label = labels.double()
    matrix, inner = label[:, :16].reshape(-1, 4, 4), label[:, 16:].reshape(-1, 3, 3)
    rotation = matrix[:, :3, :3]
    bottom = (matrix[:, 3] - torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)).abs().amax(1)
    skewed = (rotation.transpose(1, 2) @ rotation - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    _name(report.problems, bottom > RIGID, names, "the last row of the camera matrix is not 0 0 0 1")
    _name(report.problems, torch.linalg.det(rotation) < 0, names, "the camera matrix mirrors (negative determinant)")
    _name(report.warnings, skewed > RIGID, names, "the rotation is not orthonormal")
    focal = inner[:, [0, 1], [0, 1]]
    _name(
        report.problems,
        ((focal <= 0) | (focal > 50)).any(1),
        names,
        "intrinsics are not normalised by the picture size",
    )
    centre = (inner[:, :2, 2] - 0.5).abs().amax(1)
    _name(report.notes, (centre > 0.05) & (focal <= 50).all(1), names, "the principal point is not in the middle")
    convention = guess_convention(matrix)
    if convention is None:
        report.warnings.append("the cameras do not look at the origin under any known convention")
    elif convention != "opencv_c2w":
        report.problems.append(
            f"the camera matrices are {convention} ({CONVENTIONS[convention]}), expected opencv_c2w; "
            f"make the set again with prepare_data.py eg3d --convention {convention}"
        )
        matrix = to_opencv_cam2world(matrix, convention)
    report.poses = stats = pose_stats(matrix, inner, convention)
    radius = matrix[:, :3, 3].norm(dim=1)
    median = stats.radius[1]
    far = (radius - median).abs() > RADIUS_SPREAD * median
    which = int((radius - median).abs().argmax())
    _name(
        report.warnings,
        far,
        names,
        f"the radius differs from the median {median:.4g} (up to {float(radius[which]):.4g})",
    )


def pose_stats(cam2world: Tensor, inner: Tensor, convention: str | None) -> PoseStats:
    """Angles, radii, focal lengths and the common point of (N, 4, 4) OpenCV cameras."""
    yaw, pitch, roll = pose_angles(cam2world).unbind(1)
    radius, focal = cam2world[:, :3, 3].norm(dim=1), inner[:, 0, 0]
    histogram = torch.histc(yaw, 31, -math.pi / 2, math.pi / 2)
    mirrored = None
    if len(yaw) > 1 and float(histogram.std()) > 0:
        mirrored = float(torch.corrcoef(torch.stack([histogram, histogram.flip(0)]))[0, 1])
    return PoseStats(
        h_mean=float(yaw.mean()),
        v_mean=float(pitch.mean()),
        h_stddev=float(yaw.std(correction=0)),
        v_stddev=float(pitch.std(correction=0)),
        h_range=(float(yaw.min()), float(yaw.max())),
        v_range=(float(pitch.min()), float(pitch.max())),
        roll_stddev=float(roll.std(correction=0)),
        radius=(float(radius.min()), float(radius.median()), float(radius.max())),
        focal=(float(focal.min()), float(focal.median()), float(focal.max())),
        look_at=common_point(cam2world),
        convention=convention,
        mirrored=mirrored,
    )


def pose_angles(cam2world: Tensor) -> Tensor:
    """(N, 4, 4) -> (N, 3) radians: yaw and elevation of the position (0 = in front), roll (clockwise) about the view axis.

    >>> from facelab.cameras.camera import Camera
    >>> frontal = Camera.on_sphere(torch.pi / 2, torch.pi / 2, 12.0).cam2world
    >>> bool(pose_angles(frontal).abs().max() < 1e-6)
    True
    """
    x, y, z = torch.nn.functional.normalize(cam2world[:, :3, 3].double(), dim=-1).unbind(-1)
    right, down, forward = cam2world[:, :3, :3].double().unbind(-1)
    level = torch.stack([-forward[:, 2], torch.zeros_like(x), forward[:, 0]], -1)  # horizontal, to the camera's right
    level = torch.nn.functional.normalize(level, dim=-1)
    roll = torch.atan2(-(down * level).sum(-1), (right * level).sum(-1))
    return torch.stack([torch.atan2(x, z), torch.asin(y.clamp(-1, 1)), roll], -1)


def guess_convention(matrix: Tensor) -> str | None:
    """The convention under which (N, 4, 4) matrices look at the origin with their up axis up; None if none does."""
    best: tuple[float, str | None] = (LOOKS, None)
    for convention in CONVENTIONS:
        try:
            cam2world = to_opencv_cam2world(matrix, convention)
        except UserError:
            continue
        towards = -torch.nn.functional.normalize(cam2world[:, :3, 3], dim=-1)
        looks = float((cam2world[:, :3, 2] * towards).sum(-1).mean())
        if looks > best[0] + 1e-9 and float(cam2world[:, 1, 1].mean()) < 0:
            best = (looks, convention)
    return best[1]


def common_point(cam2world: Tensor) -> tuple[float, float, float] | None:
    """The point nearest to all optical axes (least squares); None where they are parallel."""
    axis, origin = cam2world[:, :3, 2].double(), cam2world[:, :3, 3].double()
    axis = torch.nn.functional.normalize(axis, dim=-1)
    across = torch.eye(3, dtype=torch.float64) - axis[:, :, None] * axis[:, None, :]
    matrix, target = across.mean(0), (across @ origin[..., None]).mean(0)
    if float(torch.linalg.eigvalsh(matrix)[0]) < 1e-6:
        return None
    x, y, z = torch.linalg.solve(matrix, target)[:, 0].tolist()
    return x, y, z


# ------------------------------------------------------------------ files and masks


def _examine(dataset: Eg3dDataset, index: int, neighbour: int) -> _Seen:
    """Look at one picture; its mask is compared with that of ``neighbour``."""
    seen = _Seen()
    try:
        image = dataset.read_picture(index)
        seen.size = f"{image.width}x{image.height}"
        if image.width != image.height:
            raise UserError(f"{dataset.images[index]}: expected a square picture, got {seen.size}; crop it")
        pixels = np.asarray(image)
        seen.digest, seen.mirrored = _digest(pixels), _digest(pixels[:, ::-1])
        if dataset.mask_names is not None:
            mask = dataset.read_mask(index)
            if mask.shape[0] != mask.shape[1]:
                raise UserError(
                    f"{dataset.mask_names[index]}: the mask is {mask.shape[1]}x{mask.shape[0]}, its picture {seen.size}"
                )
            seen.counts = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
            seen.own = edge_ratio(image, mask)
            if neighbour != index:
                seen.other = edge_ratio(image, dataset.read_mask(neighbour))
    except UserError as error:
        seen.problem = str(error)
    return seen


def edge_ratio(image: Image.Image, mask: np.ndarray) -> float:
    """Mean gradient of the picture on borders between classes over that everywhere; NaN without borders."""
    size = (MASK_SIZE, MASK_SIZE)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float32)
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    gradient = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    border = (np.diff(small.astype(int), axis=0)[:, :-1] != 0) | (np.diff(small.astype(int), axis=1)[:-1] != 0)
    if not border.any() or gradient.mean() == 0:
        return float("nan")
    return float(gradient[border].mean() / gradient.mean())


def _find_lonely(dataset: Eg3dDataset, report: SetReport) -> None:
    """Labels and masks without a picture, and pictures without a mask in a set that has masks."""
    files = dataset.store.names()
    if dataset.labels is not None:
        gone = sorted(labelled_names(read_description(dataset.store, files), dataset.store.root) - set(files))
        if gone:
            report.warnings.append(f"{len(gone)} labels have no picture, the first: {gone[0]}")
    pictures, partners = split_names(files)
    without = [name for name in pictures if name not in partners] if partners else []
    if without:
        report.problems.append(f"{len(without)} of {len(pictures)} pictures have no mask, the first: {without[0]}")
    used = {*pictures, *partners.values()}
    lonely = [n for n in files if n.lower().endswith(IMAGE_SUFFIXES) and n not in used]
    if lonely:
        report.warnings.append(f"{len(lonely)} masks have no picture, the first: {lonely[0]}")


def _judge_masks(dataset: Eg3dDataset, sound: dict[int, _Seen], report: SetReport) -> None:
    own = np.array([s.own for s in sound.values()])
    other = np.array([s.other for s in sound.values()])
    plain = [dataset.names[i] for i, s in sound.items() if math.isnan(s.own)]
    if plain:
        report.warnings.append(f"{len(plain)} masks hold one class only, the first that of {plain[0]}")
    both = ~np.isnan(own) & ~np.isnan(other)
    if not both.any():
        return
    counts = np.array([s.counts for s in sound.values()])
    report.masks = MaskStats(
        compared=int(both.sum()),
        edge_ratio=float(np.median(own[both])),
        own_better=float((own[both] > other[both]).mean()),
        class_pixels=tuple(counts.sum(0).tolist()),
        class_images=tuple((counts > 0).sum(0).tolist()),
    )
    if report.masks.own_better < OWN_MASK:
        report.warnings.append(
            "masks follow their pictures no better than the masks of other pictures do; check that names agree"
        )


def _find_copies(dataset: Eg3dDataset, sound: dict[int, _Seen], report: SetReport) -> None:
    groups: dict[str, list[int]] = {}
    for index, seen in sound.items():
        groups.setdefault(seen.digest, []).append(index)
    copies = [group for group in groups.values() if len(group) > 1]
    if copies:
        first, second = (dataset.names[i] for i in copies[0][:2])
        more = sum(len(group) - 1 for group in copies)
        report.warnings.append(f"{more} pictures are copies of others, the first: {second} of {first}")
    twins = [(i, groups[s.mirrored][0]) for i, s in sound.items() if s.mirrored in groups and s.mirrored != s.digest]
    if twins:
        report.notes.append(f"{len(twins)} pictures have their mirror image in the set")
    if twins and dataset.labels is not None:
        rows = torch.tensor(twins)
        wrong = (mirror_label(dataset.labels[rows[:, 0]]) - dataset.labels[rows[:, 1]]).abs().amax(1) > COPY_TOLERANCE
        both = [dataset.names[i] for i, _ in twins]
        _name(report.warnings, wrong, both, "the camera is not the mirrored one of its mirror image")


def _name(lines: list[str], which: Tensor, names: Sequence[str], what: str) -> None:
    """Append one line that counts the pictures and names the first few."""
    found = torch.nonzero(which)[:, 0].tolist()
    if found:
        some = ", ".join(str(names[int(i)]) for i in found[:3]) + (" ..." if len(found) > 3 else "")
        lines.append(f"{len(found)} of {len(names)}: {what}: {some}")


def _digest(pixels: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()


def _pose_lines(p: PoseStats) -> list[str]:
    degrees = math.degrees
    look = "nowhere in common" if p.look_at is None else "({:.3f}, {:.3f}, {:.3f})".format(*p.look_at)
    symmetric = (
        "" if p.mirrored is None else f", correlation of the yaw histogram with its mirror image {p.mirrored:.2f}"
    )
    return [
        f"cameras: convention {p.convention or 'unknown'}, look at {look}, radius {p.radius[0]:.4g} to {p.radius[2]:.4g} "
        f"(median {p.radius[1]:.4g}), focal {p.focal[0]:.4g} to {p.focal[2]:.4g}",
        f"poses: horizontal mean {degrees(p.h_mean):.1f} stddev {degrees(p.h_stddev):.1f} degrees ({p.h_stddev:.3f} rad), "
        f"{degrees(p.h_range[0]):.1f} to {degrees(p.h_range[1]):.1f}{symmetric}",
        f"poses: vertical mean {degrees(p.v_mean):.1f} stddev {degrees(p.v_stddev):.1f} degrees ({p.v_stddev:.3f} rad), "
        f"{degrees(p.v_range[0]):.1f} to {degrees(p.v_range[1]):.1f}; roll stddev {degrees(p.roll_stddev):.1f} degrees",
    ]
