# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads as training samples: a pool drawn once, then an endless shuffled stream."""

from __future__ import annotations

import torch

from facelab.cameras import Camera
from facelab.data.batch import Batch
from facelab.data.samplers import ResumableSampler
from facelab.errors import UserError
from facelab.progress import progress_bar

CHUNK = 64


class SyntheticPool:
    """A :class:`~facelab.training.protocol.DataSource` of ``count`` heads, kept in memory as uint8.

    Sample k of the stream is a pure function of (seed, k). The pool is drawn on the GPU where there
    is one, and kept on the CPU.

    Args:
        count: heads in the pool.
        size: pixels per side.
        seed: of the heads and of their order.
        yaw_std, pitch_std: of the camera around the frontal view, radians.
        fov: full field of view in degrees.
        device: where to draw; None = cuda if there is one.
        grid: where the pixels of a picture stand, ``corners`` (pi-GAN) or ``centers`` (EG3D).
        background: behind the heads, ``black``, ``grey`` or ``white``.

    Raises:
        UserError: fewer than one head.
    """

    def __init__(
        self,
        count: int,
        size: int,
        seed: int,
        yaw_std: float,
        pitch_std: float,
        fov: float,
        device: str | None = None,
        grid: str = "corners",
        background: str = "black",
    ) -> None:
        from facelab.data.synthetic import SyntheticHeads

        if count < 1:
            raise UserError(f"data.heads must be at least 1, got {count}")
        self.count, self.size = count, size
        self.sampler = ResumableSampler(count, seed)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        heads = SyntheticHeads(
            seed,
            size,
            device=device,
            fov=fov,
            yaw_std=yaw_std,
            pitch_std=pitch_std,
            grid=grid,
            background=background,
        )
        images, labels, cameras = [], [], []
        with progress_bar(total=count, unit="head", desc="drawing synthetic heads", leave=False) as bar:
            for start in range(0, count, CHUNK):
                batch = heads.batch(range(start, min(start + CHUNK, count))).as_batch()
                assert batch.image is not None and batch.label_map is not None and batch.camera is not None
                images.append(batch.image.cpu())
                labels.append(batch.label_map.to("cpu", torch.uint8))
                cameras.append(batch.camera.to("cpu"))
                bar.update(len(images[-1]))
        self.batch_of_all = Batch(torch.cat(images), torch.cat(labels), Camera.cat(cameras))

    def __len__(self) -> int:
        return self.count

    def batch(self, image_number: int, count: int) -> Batch:
        """Samples ``image_number`` .. ``image_number + count - 1`` of the stream, on the CPU."""
        return self.batch_of_all.select(torch.tensor(self.sampler.indices_for_chunk(image_number, count)))
