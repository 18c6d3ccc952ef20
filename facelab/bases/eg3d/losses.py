# SPDX-License-Identifier: Apache-2.0
"""The losses of EG3D's four phases, on plain functions and tensors (arXiv 2112.07945, supplement).

``judge(image, raw, label)`` is a discriminator; what it sees went through :class:`Sight` before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops import filter2d
from facelab.draws import Draws
from facelab.losses.adversarial import at_least_float32
from facelab.nn.augment import AugmentPipe
from facelab.nn.filtered_resizing import bilinear

Judge = Callable[[Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Sight:
    """What is done to pictures before a discriminator sees them.

    Attributes:
        taps: of a separable blur in pixels of whichever picture is blurred
            (:func:`facelab.nn.filtered_resizing.blur_taps`), or None.
        pipe: augmentation, or None.
    """

    taps: Tensor | None = None
    pipe: AugmentPipe | None = None

    def real(self, image: Tensor, raw: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Real pictures (N, 3, S, S) and their resized copies (N, 3, R, R), both blurred."""
        return self._augment(self._blur(image), None if raw is None else self._blur(raw), draws)

    def fake(self, image: Tensor, raw: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Generated pictures; the raw rendering is not blurred."""
        return self._augment(self._blur(image), raw, draws)

    def _blur(self, image: Tensor) -> Tensor:
        return image if self.taps is None else filter2d(image, self.taps)

    def _augment(self, image: Tensor, raw: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        if self.pipe is None:
            return image, raw
        if raw is None:
            return self.pipe(image, draws), None
        both = self.pipe(torch.cat([image, bilinear(raw, image.shape[-1])], dim=1), draws)
        return both[:, :3], bilinear(both[:, 3:], raw.shape[-1])


def label_noise(label: Tensor, deviation: Tensor, strength: float, draws: Draws) -> Tensor:
    """(N, 25) labels with normal noise of ``strength`` deviations; the labels given are left as they are."""
    if strength <= 0:
        return label
    shape = label.shape
    noise = draws.host(lambda own: own.normal("label_noise", shape), label.device)
    return label + noise * deviation * strength


def gradient_penalty(inputs: Sequence[Tensor], logits: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """R1 per sample: the sum over ``inputs`` of |grad of the logits|^2, (N,), differentiable in the weights.

    Args:
        inputs: what entered the discriminator, after blur and augmentation, with ``requires_grad``.
        logits: (N, 1).
        scale: loss scale; see :func:`facelab.losses.adversarial.r1_penalty`.

    Raises:
        ValueError: an input does not require a gradient.
    """
    if not all(x.requires_grad for x in inputs):
        raise ValueError("R1 needs requires_grad_() on what enters the discriminator, before it is judged")
    gradients = torch.autograd.grad(at_least_float32(logits).sum() * scale, list(inputs), create_graph=True)
    terms = [(at_least_float32(g) / scale).square().flatten(1).sum(1) for g in gradients]
    return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class DensityPoints:
    """Where densities are compared.

    Attributes:
        half_side: points are uniform in the cube [-half_side, half_side]^3.
        share: factor on the terms. Points outside the box have the same density everywhere; taking points of the box
            only, this factor (the box's share of the original's cube) keeps the weight's meaning.
    """

    half_side: float
    share: float = 1.0

    @staticmethod
    def of_box(box_side: float, reference: bool) -> DensityPoints:
        """Of the field's box; with ``reference`` of the original's cube of side 2."""
        if reference or box_side >= 2:
            return DensityPoints(1.0)
        return DensityPoints(box_side / 2, (box_side / 2) ** 3)

    def draw(self, draws: Draws, name: str, count: int, points: int, device: torch.device) -> Tensor:
        """(count, points, 3)."""
        return (2 * draws.uniform(name, (count, points, 3), device) - 1) * self.half_side
