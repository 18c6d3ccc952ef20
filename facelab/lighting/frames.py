# SPDX-License-Identifier: Apache-2.0
"""The same light in other axes and other people's numbers.

Axes, all right-handed:

- world: x to the subject's left, y up, z out of the face. facelab's lights are given in these;
- viewer of a camera: x to the right of its picture, y up, z towards the camera. A frontal camera's are the world's;
- DPR ("Deep Single-Image Portrait Relighting", ICCV 2019): x to the right of the picture, y into the scene, z up.

facelab's numbers contain the cosine lobe: their product with the basis is the brightness of a white surface. DPR's are
those of the incoming light; brightness is their product with pi (1, 2/3, 1/4) times the basis, by order.

The Condon-Shortley phase turns the sign of the numbers with odd m. FaceDNeRF projects its lights with the phase and
hands them to DPR, which knows none: its functions therefore act turned by pi about the vertical.

N lights; a light is (N, 9) or (N, 9, 3).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.lighting.harmonics import LOBE, basis

LUMINANCE = (0.2126, 0.7152, 0.0722)  # of linear sRGB primaries
ODD = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0)  # sign by index l (l + 1) + m: minus for odd m
DPR_AXES = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))  # viewer coordinates -> DPR's


def rotate(light: Tensor, rotation: Tensor) -> Tensor:
    """Turn lights: what came from direction d comes from ``rotation @ d``.

    Exact: rotations mix the numbers of one order only with each other.

    Args:
        light: (N, 9) or (N, 9, 3).
        rotation: (3, 3) or (N, 3, 3) orthonormal; N or one of light and rotation.

    Raises:
        ValueError: other shapes.
    """
    _check(light)
    if rotation.ndim == 2:
        rotation = rotation[None]
    if rotation.ndim != 3 or rotation.shape[1:] != (3, 3) or (len(rotation) != len(light) and 1 not in (
        len(rotation), len(light)
    )):  # fmt: skip
        raise ValueError(f"rotation must be (3, 3) or ({len(light)}, 3, 3), got {tuple(rotation.shape)}")
    points, solver = _points(str(light.device))
    turned = basis(points @ rotation.to(points))  # rows: rotation^T p
    matrix = (solver @ turned).to(light)
    return torch.einsum("nij,nj...->ni...", matrix.expand(max(len(light), len(matrix)), 9, 9), light)


def viewer_axes(camera: Camera) -> Tensor:
    """(N, 3, 3): the columns are the viewer's right, up and backwards (towards the camera) in world axes."""
    return camera.cam2world[:, :3, :3] * camera.cam2world.new_tensor([1.0, -1.0, -1.0])


def seen_by(light: Tensor, camera: Camera) -> Tensor:
    """World light -> the same light in the viewer axes of each camera (N or one of both)."""
    return rotate(light, viewer_axes(camera).transpose(1, 2))


def from_viewer(light: Tensor, camera: Camera) -> Tensor:
    """Light in the viewer axes of each camera -> world light: undoes :func:`seen_by`."""
    return rotate(light, viewer_axes(camera))


def to_dpr(light: Tensor, camera: Camera | None = None) -> Tensor:
    """World light -> the nine numbers that DPR should see in a picture by ``camera`` (None: a frontal one)."""
    seen = light if camera is None else seen_by(light, camera)
    return rotate(seen, _dpr_axes(light)) / _gain(light)


def from_dpr(numbers: Tensor, camera: Camera | None = None) -> Tensor:
    """DPR's nine numbers of a picture by ``camera`` (None: a frontal one) -> world light."""
    _check(numbers)
    seen = rotate(numbers * _gain(numbers), _dpr_axes(numbers).T)
    return seen if camera is None else from_viewer(seen, camera)


def switch_phase(light: Tensor) -> Tensor:
    """Numbers for a basis with the Condon-Shortley phase <-> for one without, axes unchanged."""
    _check(light)
    return light * _column(light.new_tensor(ODD), light)


def grey(light: Tensor) -> Tensor:
    """(N, 9, 3) linear RGB light -> (N, 9) its luminance; (N, 9) stays."""
    _check(light)
    return light if light.ndim == 2 else light @ light.new_tensor(LUMINANCE)


def _check(light: Tensor) -> None:
    if light.ndim not in (2, 3) or light.shape[1] != 9 or (light.ndim == 3 and light.shape[2] != 3):
        raise ValueError(f"light must be (N, 9) or (N, 9, 3), got {tuple(light.shape)}")


def _column(values: Tensor, light: Tensor) -> Tensor:
    return values.view(1, 9, *([1] * (light.ndim - 2)))


def _gain(light: Tensor) -> Tensor:
    _check(light)
    lobe = light.new_tensor([LOBE[0]] + [LOBE[1]] * 3 + [LOBE[2]] * 5)
    return _column(math.pi * lobe, light)


def _dpr_axes(light: Tensor) -> Tensor:
    return torch.tensor(DPR_AXES, dtype=torch.float64, device=light.device)


@functools.lru_cache(maxsize=8)
def _points(device: str, count: int = 32) -> tuple[Tensor, Tensor]:
    """(count, 3) evenly spread unit vectors and the (9, count) matrix that makes numbers of values there, float64."""
    with torch.inference_mode(False):  # both outlive whatever mode they were first asked for in
        k = torch.arange(count, dtype=torch.float64) + 0.5
        y, angle = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
        ring = (1 - y * y).sqrt()
        points = torch.stack([ring * angle.cos(), y, ring * angle.sin()], dim=-1)
        return points.to(device), torch.linalg.pinv(basis(points)).to(device)
