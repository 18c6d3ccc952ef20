# SPDX-License-Identifier: Apache-2.0
"""prepare_data.py lmdb: content, order, masks, reports, interruption and restart, what is refused."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from facelab.cli.prepare import prepare_data as main
from facelab.data import lmdb_prepare
from facelab.data.classes import NUM_CLASSES
from facelab.data.lmdb_prepare import prepare_lmdb, square, square_mask
from facelab.data.lmdb_store import LmdbStore
from facelab.data.thumbnails import open_pictures
from facelab.errors import Interrupted, UserError
from tests.data.pictures import blocky_mask, smooth_picture

pytest.importorskip("lmdb", reason="needs the lmdb package: pip install facelab[lmdb]")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five pictures in two subfolders, portrait and landscape; their order by path is not that of their parts."""
    root = tmp_path / "src"
    for number, (name, size) in enumerate(
        [
            ("a/3.png", (40, 48)),
            ("a/1.png", (48, 40)),
            ("a-b/0.png", (40, 40)),
            ("a/2.jpg", (64, 40)),
            ("z.png", (40, 41)),
        ]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_picture(*size, number)).save(path)
    return root


ORDER = ("a-b/0.png", "a/1.png", "a/2.jpg", "a/3.png", "z.png")  # by path as text


def masks_for(source: Path, folder: Path) -> Path:
    for name in ORDER:
        image = Image.open(source / name)
        path = (folder / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocky_mask(*image.size)).save(path)
    return folder


def entry(store: LmdbStore, size: int, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(store.read(size, index))))


def content(root: Path, sizes: tuple[int, ...] = (16, 8)) -> dict[tuple[int, int], bytes]:
    store = LmdbStore(root)
    return {(size, i): store.read(size, i) for size in sizes for i in range(len(store))}


def test_pictures_are_resized_cropped_and_numbered_by_path(source, tmp_path):
    report = prepare_lmdb(source, tmp_path / "dst_lmdb", (16, 8), progress=False)
    store = LmdbStore(tmp_path / "dst_lmdb")
    assert report.length == len(store) == 5 and store.sizes() == (8, 16) and report.finished and not report.left_out
    for index, name in enumerate(ORDER):
        image = Image.open(source / name).convert("RGB")
        width, height = image.size
        side = min(width, height)
        for size in (8, 16):
            scaled = image.resize((int(size * width / side), int(size * height / side)), Image.Resampling.LANCZOS)
            left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
            expected = np.asarray(scaled)[top : top + size, left : left + size]
            assert (entry(store, size, index) == expected).all(), (name, size)


def test_bilinear_and_unchanged_pictures(source, tmp_path):
    prepare_lmdb(source, tmp_path / "dst_lmdb", (40, 8), resample="bilinear", progress=False, workers=1)
    store = LmdbStore(tmp_path / "dst_lmdb")
    image = Image.open(source / ORDER[0])
    assert (entry(store, 40, 0) == np.asarray(image)).all()
    assert (entry(store, 8, 0) == np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))).all()


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (23, 20), (20, 20)])
def test_label_maps_take_the_way_of_their_pictures(size):
    """A picture of two colours and its label map keep their border at the same place."""
    columns, rows = np.arange(size[0]) >= size[0] // 2, np.arange(size[1]) >= size[1] // 3
    mask = (columns[None] ^ rows[:, None]).astype(np.uint8)
    image = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, 2))
    found = np.asarray(square(image, 10, Image.Resampling.BILINEAR))[..., 0]
    small = square_mask(mask, 10)
    sure = (found < 64) | (found > 191)
    assert sure.mean() > 0.5 and ((found > 127) == small)[sure].all()


def test_masks_lie_beside_the_set(source, tmp_path):
    folder = masks_for(source, tmp_path / "masks")
    (folder / "a" / "1.png").unlink()
    report = prepare_lmdb(source, tmp_path / "dst_lmdb", (16, 8), masks=folder, progress=False)
    assert report.length == 4 and list(report.left_out) == ["a/1.png"] and "no mask 1.png" in report.left_out["a/1.png"]
    assert report.masks == [str(tmp_path / "dst_mask_8"), str(tmp_path / "dst_mask_16")]
    for index, name in enumerate(n for n in ORDER if n != "a/1.png"):
        stored = np.load(tmp_path / "dst_mask_16" / f"{index:05d}.npy")
        truth = blocky_mask(*Image.open(source / name).size)
        assert stored.dtype == np.uint8 and (stored == square_mask(truth, 16)).all()
    pixels = sum(np.bincount(np.load(p).ravel(), minlength=NUM_CLASSES) for p in (tmp_path / "dst_mask_16").iterdir())
    assert report.pixels == pixels.tolist() and report.images[1] == 4
    samples = open_pictures(tmp_path / "dst_lmdb", 16, 8, masks="auto")
    assert samples.validate().decoded == 4 and (samples.item(2).label_map[0].numpy() == np.load(
        tmp_path / "dst_mask_16" / "00002.npy"
    )).all()  # fmt: skip


def test_masks_in_the_source_are_no_pictures(tmp_path):
    source = tmp_path / "pairs"
    source.mkdir()
    for i in range(3):
        Image.fromarray(smooth_picture(16, 16, i)).save(source / f"{i}.jpg")
        Image.fromarray(blocky_mask(16, 16)).save(source / f"{i}_mask.png")
    Image.fromarray(smooth_picture(16, 16, 9)).save(source / "2_maskcolor.png")
    report = prepare_lmdb(source, tmp_path / "set", (8,), progress=False)
    assert report.length == 3 and report.masks == [str(tmp_path / "set" / "mask_8")]
    assert (open_pictures(tmp_path / "set", 8, 8, masks="auto").item(0).label_map[0].numpy()
            == square_mask(blocky_mask(16, 16), 8)).all()  # fmt: skip


def test_damaged_and_small_pictures_are_reported(source, tmp_path):
    data = (source / "a" / "1.png").read_bytes()
    (source / "a" / "1.png").write_bytes(data[: len(data) // 2])
    report = prepare_lmdb(source, tmp_path / "dst_lmdb", (48, 8), progress=False)
    assert report.length == 4 and report.enlarged == 4 and list(report.left_out) == ["a/1.png"]
    store = LmdbStore(tmp_path / "dst_lmdb")
    assert entry(store, 48, 3).shape == (48, 48, 3) and len(store) == 4  # numbers have no gap
    text = "\n".join(report.lines())
    assert "4 pictures at 8, 48 px" in text and "1 left out, first: a/1.png" in text and "were enlarged" in text
    stored = json.loads((tmp_path / "dst_lmdb" / "report.json").read_text())
    assert stored["length"] == 4 and stored["finished"] and "a/1.png" in stored["left_out"]


def test_an_error_in_between_is_taken_up_where_it_was(source, tmp_path, monkeypatch):
    whole = prepare_lmdb(
        source, tmp_path / "whole_lmdb", (16, 8), masks=masks_for(source, tmp_path / "m"), progress=False
    )
    monkeypatch.setattr(lmdb_prepare, "STEP_ENTRIES", 1)
    made, real = [], lmdb_prepare.make_entries

    def failing(job):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job.picture)
        return real(job)

    monkeypatch.setattr(lmdb_prepare, "make_entries", failing)
    options = {"masks": tmp_path / "m", "progress": False, "workers": 1}
    with pytest.raises(Interrupted, match=r"interrupted after 3 of 5 pictures.*same command"):
        prepare_lmdb(source, tmp_path / "dst_lmdb", (16, 8), **options)
    with pytest.raises(UserError, match=r"not finished \(3 pictures so far\)"):
        LmdbStore(tmp_path / "dst_lmdb")
    stored = json.loads((tmp_path / "dst_lmdb" / "report.json").read_text())
    assert stored["length"] == 3 and not stored["finished"]
    made.clear()
    report = prepare_lmdb(source, tmp_path / "dst_lmdb", (16, 8), **options)
    assert [str(p.relative_to(source)) for p in made] == list(ORDER[3:]) and report.kept == 3
    assert report.pixels == whole.pixels and report.images == whole.images
    assert content(tmp_path / "dst_lmdb") == content(tmp_path / "whole_lmdb")
    gc.collect()
    made.clear()
    again = prepare_lmdb(source, tmp_path / "dst_lmdb", (16, 8), **options)
    assert again.kept == again.length == 5 and not made and again.pixels == whole.pixels


def test_a_killed_run_goes_on(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    for i, array in enumerate(noise):
        Image.fromarray(array).save(source / f"{i:02d}.png")
    target = tmp_path / "dst_lmdb"
    code = (
        "import time, facelab.data.lmdb_prepare as p; p.STEP_ENTRIES = 2; real = p.make_entries; "
        "p.make_entries = lambda job: (time.sleep(0.05), real(job))[1]; "
        f"p.prepare_lmdb({str(source)!r}, {str(target)!r}, (64, 16), workers=1, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 30
    while not (target / "data.mdb").exists() or (target / "data.mdb").stat().st_size < 80_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    with pytest.raises(UserError, match="not finished"):
        LmdbStore(target)
    gc.collect()
    report = prepare_lmdb(source, target, (64, 16), progress=False)
    assert 0 < report.kept < 24 and report.length == 24
    prepare_lmdb(source, tmp_path / "whole_lmdb", (64, 16), progress=False)
    assert content(target, (64, 16)) == content(tmp_path / "whole_lmdb", (64, 16))


# ------------------------------------------------------------------ what is refused


def test_other_options_and_other_pictures_are_refused(source, tmp_path):
    target = tmp_path / "dst_lmdb"
    prepare_lmdb(source, target, (8,), progress=False)
    with pytest.raises(UserError, match=r"was begun with sizes=8, got sizes=8,16"):
        prepare_lmdb(source, target, (16, 8), progress=False)
    with pytest.raises(UserError, match=r"was begun with resample=lanczos, got resample=bilinear"):
        prepare_lmdb(source, target, (8,), resample="bilinear", progress=False)
    (source / "z.png").rename(source / "y.png")
    with pytest.raises(UserError, match="was begun with other pictures"):
        prepare_lmdb(source, target, (8,), progress=False)
    (target / "prepare.json").unlink()
    with pytest.raises(UserError, match="already holds an LMDB that this command did not make"):
        prepare_lmdb(source, target, (8,), progress=False)


def test_sources_that_cannot_be_used(source, tmp_path):
    for arguments, options, words in (
        ((tmp_path / "none", tmp_path / "d"), {}, "no pictures at .*got no such folder"),
        ((source, source / "inside"), {}, "lies inside the pictures' folder"),
        ((source, tmp_path / "d"), {"masks": tmp_path / "none"}, "no masks at .*got no such folder"),
        ((source, tmp_path / "d2"), {"masks": source}, "none of 5 pictures has a mask in"),
        ((source, tmp_path / "d3"), {"masks": source, "parser": "x"}, "--masks and --parser"),
        ((source, tmp_path / "d4"), {"resample": "cubic"}, "resample must be lanczos or bilinear"),
        ((source, tmp_path / "d5"), {"sizes": (0,)}, "--size must be pixels"),
        ((source, source / "z.png"), {}, "lies inside|a file stands where a folder is needed"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_lmdb(*arguments, **{"sizes": (8,), "progress": False, **options})
    for path in source.rglob("*.*"):
        path.write_bytes(b"spoiled")
    with pytest.raises(UserError, match="none of 5 pictures could be converted; a-b/0.png"):
        prepare_lmdb(source, tmp_path / "d6", (8,), progress=False)
    with pytest.raises(UserError, match="not finished"):
        LmdbStore(tmp_path / "d6")


# ------------------------------------------------------------------ commands


def run(*arguments: object):
    gc.collect()
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_commands_convert_and_check(source, tmp_path):
    masks, target = masks_for(source, tmp_path / "masks"), tmp_path / "dst_lmdb"
    done = run("lmdb", source, target, "--size", "16, 8", "--masks", masks, "--workers", 2, "--quiet")
    assert done.exit_code == 0 and f"{target}: 5 pictures at 8, 16 px (0 from earlier runs)" in done.output
    checked = run("check", target)
    assert checked.exit_code == 0, checked.output
    assert f"{target}: 5 pictures, sizes 8, 16 px" in checked.output and " 1 skin" in checked.output
    assert f"16 px: 5 decoded and sound, masks in {tmp_path / 'dst_mask_16'}" in checked.output
    (tmp_path / "dst_mask_8" / "00001.npy").unlink()
    np.save(tmp_path / "dst_mask_16" / "00004.npy", np.full((16, 16), 77))
    bad = run("check", target)
    assert bad.exit_code == 2 and "mask value 77" in bad.output and "4 masks but 5 pictures" in bad.output
    assert "2 problems" in bad.output
    only = run("check", target, "--masks", tmp_path / "dst_mask_8")
    assert only.exit_code == 2 and "16 px: 5 decoded and sound, no masks (those in" in only.output


def test_commands_refuse_in_one_line(source, tmp_path):
    for arguments, words in (
        (("lmdb", source, tmp_path / "d", "--size", "64x8"), "--size must be pixels separated by commas"),
        (("lmdb", source, tmp_path / "d", "--parser", tmp_path / "none.pth"), "no parser at"),
        (("lmdb", source, tmp_path / "d", "--resample", "cubic"), "'cubic' is not one of"),
        (("check", source, "--masks", source), "--masks is for an LMDB"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output
        assert len([line for line in result.output.splitlines() if line.startswith("error:")]) == 1
    prepare_lmdb(source, tmp_path / "e", (8,), progress=False)
    assert "leave them out for an LMDB" in run("check", tmp_path / "e", "--report", tmp_path / "r.json").output


def test_a_parser_makes_the_masks(source, tmp_path):
    import torch

    from facelab.data.parsing import save_small_parser
    from facelab.nn.pretrained.face_parsing import SmallParser

    torch.manual_seed(0)
    parser = save_small_parser(tmp_path / "p.safetensors", SmallParser((8, 8), NUM_CLASSES), 16)
    done = run("lmdb", source, tmp_path / "d", "--size", "16,8", "--parser", parser, "--device", "cpu", "--quiet")
    assert done.exit_code == 0, done.output
    parsed = np.asarray(Image.open(tmp_path / "d" / "parsed_masks" / "a" / "3.png"))
    stored = open_pictures(tmp_path / "d", 16, 8, masks="auto").item(3).label_map[0].numpy()
    assert (stored == square_mask(parsed, 16)).all()


@pytest.mark.shared
def test_real_pairs(real_pairs, tmp_path):
    report = prepare_lmdb(real_pairs, tmp_path / "real_lmdb", (128, 64), progress=False)
    assert report.length == 5 and not report.left_out and report.images[4] == 5 and report.images[14] == 0
    stored = open_pictures(tmp_path / "real_lmdb", 128, 64, masks="auto")
    lying = open_pictures(real_pairs, 128, 64, masks="auto")
    assert stored.validate().decoded == 5
    for index in range(5):
        a, b = stored.item(index), lying.item(index)
        assert a.label_map.equal(b.label_map)
        difference = (a.image.float() - b.image.float()).abs().mean()
        assert 0 < difference < 3  # Lanczos against areas
