# SPDX-License-Identifier: Apache-2.0
"""Writing and reading videos frame by frame: memory does not grow with their length.

An mp4 is H.264 (libx264, yuv420p, BT.709), made by the ffmpeg program of the imageio-ffmpeg
package or, without it, the one on the PATH. A name without a suffix is a folder of PNG frames,
which needs no ffmpeg.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from facelab.errors import UserError, nearest
from facelab.files import atomic_path, make_folder
from facelab.inference.pictures import save_png

SUFFIXES = (".mp4", ".mkv", ".mov")


class FrameSink(Protocol):
    """What takes the frames of a video, used as a context manager."""

    def add(self, frame: Tensor | np.ndarray) -> None: ...
    def __enter__(self) -> FrameSink: ...
    def __exit__(self, kind, error, traceback) -> None: ...


def open_video(path: str | Path, fps: float = 25.0, crf: int = 18) -> FrameSink:
    """A sink by the name of its file: ``.mp4``, ``.mkv``, ``.mov``, or no suffix for a folder of PNG frames.

    Raises:
        UserError: another suffix (with the nearest one), or no ffmpeg for a video file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == "":
        return FrameFolder(path)
    if suffix not in SUFFIXES:
        raise UserError(
            f"cannot write a video named {path}: expected {', '.join(SUFFIXES)}, "
            f"or no suffix for a folder of PNG frames, got {suffix}.{nearest(suffix, SUFFIXES)}"
        )
    return VideoWriter(path, fps, crf=crf)


class VideoWriter:
    """Encodes frames as they come; the file appears under its name when the block has succeeded.

    Frames of odd width or height get their last row or column doubled, as yuv420p needs even sizes.

    Args:
        path: ``.mp4``, ``.mkv`` or ``.mov``.
        fps: frames per second.
        size: (height, width) of the frames, or None to take that of the first.
        crf: quality of libx264, 0 (best) .. 51.

    Raises:
        UserError: no ffmpeg program, a folder that cannot be written, no frames, or ffmpeg failed.
        ValueError: a frame of another size or type.

    Example::

        with VideoWriter("turn.mp4", fps=25) as video:
            for frame in frames:  # (3, H, W) uint8 tensors or (H, W, 3) arrays
                video.add(frame)
    """

    def __init__(self, path: str | Path, fps: float = 25.0, size: tuple[int, int] | None = None, *, crf: int = 18):
        if not fps > 0:
            raise UserError(f"a video needs fps > 0, got {fps}")
        self.path, self.fps, self.size, self.crf = Path(path), float(fps), size, crf
        self.frames = 0
        self._ffmpeg = find_ffmpeg()
        self._stack = ExitStack()
        self._temporary: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None

    def __enter__(self) -> VideoWriter:
        self._temporary = self._stack.enter_context(atomic_path(self.path))
        self._messages = self._stack.enter_context(tempfile.TemporaryFile())
        return self

    def add(self, frame: Tensor | np.ndarray) -> None:
        """Encode one frame: (3, H, W) uint8 tensor or (H, W, 3) uint8 array."""
        if self._temporary is None:
            raise ValueError("VideoWriter takes frames inside a with block only")
        array = frame_array(frame)
        self.size = self.size or array.shape[:2]
        if array.shape[:2] != tuple(self.size):
            raise ValueError(f"frame {self.frames} is {array.shape[:2]}, expected {tuple(self.size)} as the others")
        height, width = self.size
        array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._process is None:
            self._process = self._start(array.shape[0], array.shape[1])
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(array).data)
        except OSError:
            self._fail()
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure: BaseException | None = error
        try:
            self._finish(succeeded=error is None)
        except UserError as problem:
            failure = failure or problem
        # atomic_path renames or removes the temporary file depending on what it is told here
        if failure is None:
            self._stack.__exit__(None, None, None)
        else:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
        if failure is not None and error is None:
            raise failure

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:g}", "-i", "-"]
        color = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries"]
        color += ["bt709", "-color_trc", "bt709", "-color_range", "tv"]
        codec = ["-an", "-c:v", "libx264", "-crf", str(self.crf), "-pix_fmt", "yuv420p"]
        command = [self._ffmpeg, "-hide_banner", "-loglevel", "error", "-y", *source, *color, *codec]
        if self.path.suffix.lower() != ".mkv":
            command += ["-movflags", "+faststart"]  # players can start before the whole file is there
        return subprocess.Popen(
            [*command, str(self._temporary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
        )

    def _finish(self, succeeded: bool) -> None:
        if self._process is None:
            if succeeded:
                raise UserError(f"cannot write {self.path}: the video got no frames")
            return
        if not succeeded:
            self._process.kill()
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:
            pass  # ffmpeg has gone; its exit status says why
        if self._process.wait() != 0 and succeeded:
            self._fail()

    def _fail(self) -> None:
        assert self._process is not None and self._messages is not None
        self._process.kill()
        self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        raise UserError(f"cannot write {self.path}: ffmpeg stopped: {lines[-1] if lines else 'without a message'}")


class FrameFolder:
    """Numbered PNG files ``00000.png`` ... in a folder, each written atomically.

    Raises:
        UserError: the folder cannot be written, or already holds frames (they would mix).
    """

    def __init__(self, folder: str | Path):
        self.folder = make_folder(folder)
        self.frames = 0
        if any(self.folder.glob("[0-9]*.png")):
            raise UserError(f"{self.folder} already holds frames; empty it or choose another folder")

    def __enter__(self) -> FrameFolder:
        return self

    def add(self, frame: Tensor | np.ndarray) -> None:
        """Write one frame: (3, H, W) uint8 tensor or (H, W, 3) uint8 array."""
        save_png(self.folder / f"{self.frames:05d}.png", frame_array(frame))
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self.frames == 0:
            raise UserError(f"{self.folder}: the video got no frames")


def read_video(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video as (H, W, 3) uint8 arrays, one at a time.

    Raises:
        UserError: the imageio-ffmpeg package or the file is missing, or the file is not a video.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise UserError("reading videos needs ffmpeg: pip install imageio-ffmpeg") from error
    if not Path(path).is_file():
        raise UserError(f"cannot read video {path}: no such file")
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        width, height = next(reader)["size"]
        for data in reader:
            yield np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise UserError(f"cannot read video {path}: it is damaged or not a video") from error
    finally:
        reader.close()


def find_ffmpeg() -> str:
    """Path of the ffmpeg program: imageio-ffmpeg's, else the one on the PATH. UserError if there is none."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        pass
    found = shutil.which("ffmpeg")
    if found is None:
        raise UserError(
            "writing videos needs ffmpeg: pip install imageio-ffmpeg, or give a name without suffix for PNG frames"
        )
    return found


def frame_array(frame: Tensor | np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 tensor or (H, W, 3) uint8 array -> (H, W, 3) uint8 array. ValueError otherwise."""
    if isinstance(frame, np.ndarray):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        return frame
    if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3:
        raise ValueError(f"a frame must be uint8 (3, H, W), got {frame.dtype} {tuple(frame.shape)}")
    return np.ascontiguousarray(frame.detach().cpu().permute(1, 2, 0).numpy())
