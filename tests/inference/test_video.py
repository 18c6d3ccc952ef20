# SPDX-License-Identifier: Apache-2.0
"""Videos: frames read back, odd sizes, failures that leave nothing behind."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from facelab.errors import UserError
from facelab.inference import video
from facelab.inference.pictures import read_picture


def ramp_frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth colour ramps whose brightness and hue depend on the frame."""
    rows, columns = np.mgrid[0:height, 0:width]
    return [
        np.stack([rows * 200 / height, columns * 200 / width, np.full(rows.shape, 40 + 20 * i)], -1).astype(np.uint8)
        for i in range(count)
    ]


@pytest.fixture
def needs_ffmpeg():
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 33)])
def test_frames_come_back_in_order_size_and_colour(tmp_path, needs_ffmpeg, height, width):
    path = tmp_path / "turn.mp4"
    frames = ramp_frames(7, height, width)
    with video.VideoWriter(path, fps=12.5, crf=10) as writer:
        for frame in frames:
            writer.add(torch.from_numpy(frame).permute(2, 0, 1))
        assert not path.exists()  # appears only when it is whole
    back = list(video.read_video(path))
    assert len(back) == 7
    assert back[0].shape == (height + height % 2, width + width % 2, 3)
    for expected, got in zip(frames, back, strict=True):
        error = np.abs(got[:height, :width].astype(int) - expected.astype(int))
        assert error.mean() < 3  # right: 1.7; a wrong matrix or range in the file: 5.3 and more
    assert [p.name for p in tmp_path.iterdir()] == ["turn.mp4"]


def test_meta_data_of_the_file(tmp_path, needs_ffmpeg):
    import imageio_ffmpeg

    with video.open_video(tmp_path / "a.mp4", fps=10) as sink:
        for frame in ramp_frames(5, 32, 32):
            sink.add(frame)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert meta["fps"] == 10 and meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    assert meta["duration"] == pytest.approx(0.5, abs=0.05)


def test_a_failing_block_leaves_the_old_file_and_no_temporary_one(tmp_path, needs_ffmpeg):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stopped"), video.VideoWriter(path) as writer:
        writer.add(ramp_frames(1, 32, 32)[0])
        raise RuntimeError("stopped")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_no_frames_and_changing_sizes(tmp_path, needs_ffmpeg):
    with pytest.raises(UserError, match="no frames"), video.VideoWriter(tmp_path / "a.mp4"):
        pass
    with pytest.raises(ValueError, match="frame 1 is"), video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.add(ramp_frames(1, 32, 32)[0])
        writer.add(ramp_frames(1, 32, 30)[0])
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_says_arrives_as_one_line(tmp_path, needs_ffmpeg):
    with (
        pytest.raises(UserError, match=r"ffmpeg stopped: .+") as caught,
        video.VideoWriter(tmp_path / "a.mp4", crf=-100) as writer,
    ):
        for frame in ramp_frames(200, 64, 64):
            writer.add(frame)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_ffmpeg_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install imageio-ffmpeg") as caught:
        video.open_video(tmp_path / "a.mp4")
    assert "\n" not in str(caught.value)


def test_frame_folder_holds_exact_frames(tmp_path):
    frames = ramp_frames(3, 5, 7)
    with video.open_video(tmp_path / "frames") as sink:
        for frame in frames:
            sink.add(frame)
    names = sorted(p.name for p in (tmp_path / "frames").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    last = read_picture(tmp_path / "frames" / names[2]).permute(1, 2, 0).numpy()
    assert np.array_equal(last, frames[2])
    with pytest.raises(UserError, match="already holds frames"):
        video.open_video(tmp_path / "frames")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: video.open_video(folder / "a.mp5"), "Did you mean '.mp4'"),
        (lambda folder: video.VideoWriter(folder / "a.mp4", fps=0), "fps > 0"),
        (lambda folder: list(video.read_video(folder / "a.mp4")), "no such file"),
        (lambda folder: (folder / "b.mp4").write_text("x") and list(video.read_video(folder / "b.mp4")), "damaged"),
    ],
)
def test_bad_calls_give_one_line(tmp_path, needs_ffmpeg, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_frames_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        video.frame_array(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        video.frame_array(np.zeros((4, 4), dtype=np.uint8))
