# SPDX-License-Identifier: Apache-2.0
"""From the official layouts to pairs: content, reports, restart, interruption."""

from __future__ import annotations

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
from facelab.data import CelebAMaskHQ, prepare
from facelab.data.classes import CLASSES, PALETTE, SOFGAN_TO_CELEBA
from facelab.errors import UserError
from tests.data.pictures import blocky_mask, smooth_picture

ROOT = Path(__file__).parents[2]


def official(root: Path, masks: list[np.ndarray], image_size: int = 64, first: int = 1998) -> Path:
    """CelebAMask-HQ as downloaded, its masks split into part files; numbers cross a folder border."""
    (root / prepare.OFFICIAL_IMAGES).mkdir(parents=True)
    for k, mask in enumerate(masks, start=first):
        Image.fromarray(smooth_picture(image_size, image_size, k)).save(root / prepare.OFFICIAL_IMAGES / f"{k}.jpg")
        folder = root / prepare.OFFICIAL_PARTS / str(k // 2000)
        folder.mkdir(parents=True, exist_ok=True)
        for number in set(np.unique(mask)) - {0}:
            member = np.repeat((mask == number)[..., None] * np.uint8(255), 3, 2)
            Image.fromarray(member).save(folder / f"{k:05d}_{CLASSES[number]}.png")
    return root


@pytest.fixture
def source(tmp_path):
    return official(tmp_path / "src", [np.roll(blocky_mask(32, 32), k, 1) for k in range(4)])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != prepare.REPORT]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_parts_become_the_masks_they_were(source, tmp_path):
    report = prepare.prepare_celebamask_hq(source, tmp_path / "dst", size=32, workers=1, progress=False)
    for k in range(4):
        found = read(tmp_path / "dst" / prepare.MASKS / f"{1998 + k:05d}.png")
        assert (found == np.roll(blocky_mask(32, 32), k, 1)).all()
    assert report.pairs == 4 and report.kept == 0 and report.finished and not report.damaged
    assert sum(report.pixels.values()) == 4 * 32 * 32
    assert report.pixels["l_eye"] == 4 * int((blocky_mask(32, 32) == 4).sum()) and report.images["hat"] == 0
    found = CelebAMaskHQ(tmp_path / "dst", 16)
    assert found.validate().decoded == 4 and read(found.images[0]).shape == (32, 32, 3)
    assert json.loads((tmp_path / "dst" / prepare.REPORT).read_text())["pairs"] == 4


def test_later_parts_cover_earlier_ones(tmp_path):
    paths = []
    for name, columns in (("hair", slice(0, 6)), ("skin", slice(0, 4)), ("cloth", slice(5, 8))):
        member = np.zeros((8, 8), np.uint8)
        member[:, columns] = 1  # any non-zero value is a member
        path = tmp_path / f"00000_{name}.png"
        Image.fromarray(member).save(path)
        paths.append((name, path))
    merged = prepare.merge_parts(prepare._in_painting_order(dict(paths)))
    assert merged[0].tolist() == [13, 13, 13, 13, 13, 18, 18, 18]


def test_unchanged_pictures_are_copied_and_masks_not_enlarged(source, tmp_path):
    prepare.prepare_celebamask_hq(source, tmp_path / "dst", size=64, workers=1, progress=False)
    copied = tmp_path / "dst" / prepare.IMAGES / "01998.jpg"
    assert copied.read_bytes() == (source / prepare.OFFICIAL_IMAGES / "1998.jpg").read_bytes()
    assert read(tmp_path / "dst" / prepare.MASKS / "01998.png").shape == (32, 32)


def test_damaged_and_missing_files_are_named_and_left_out(source, tmp_path):
    images, parts = source / prepare.OFFICIAL_IMAGES, source / prepare.OFFICIAL_PARTS
    (images / "1998.jpg").write_bytes((images / "1998.jpg").read_bytes()[:400])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(parts / "0" / "01999_skin.png")
    (images / "2000.jpg").unlink()
    (images / "7.jpg").write_bytes((images / "1999.jpg").read_bytes())
    report = prepare.prepare_celebamask_hq(source, tmp_path / "dst", size=32, workers=1, progress=False)
    assert report.pairs == 1 and set(report.damaged) == {"01998", "01999"}
    assert report.missing_masks == ["7.jpg"] and report.missing_images == ["2000.jpg"]
    text = "\n".join(report.lines())
    assert "1 pairs" in text and "01998" in text and "7.jpg" in text and "2000.jpg" in text
    assert all("\n" not in reason for reason in report.damaged.values())


def test_second_run_keeps_what_is_done(source, tmp_path):
    dst = tmp_path / "dst"
    whole = prepare.prepare_celebamask_hq(source, dst, size=32, workers=1, progress=False)
    before = state(dst)
    (dst / prepare.MASKS / "01999.png").unlink()
    (dst / prepare.MASKS / "02000.png").write_bytes(b"spoiled")
    again = prepare.prepare_celebamask_hq(source, dst, size=32, workers=1, progress=False)
    after = state(dst)
    assert again.pairs == 4 and again.kept == 2 and again.pixels == whole.pixels
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    redone = {k for k in after if after[k][0] != before[k][0]}
    assert {Path(k).stem for k in redone} == {"01999", "02000"}


def test_worker_processes_make_the_same_files(source, tmp_path):
    one = prepare.prepare_celebamask_hq(source, tmp_path / "one", size=32, workers=1, progress=False)
    two = prepare.prepare_celebamask_hq(source, tmp_path / "two", size=32, workers=2, progress=False)
    assert one.pixels == two.pixels
    contents = [{k: v[1] for k, v in state(tmp_path / name).items()} for name in ("one", "two")]
    assert contents[0] == contents[1] and len(contents[0]) == 9


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start_and_wait_for_masks(arguments: list[str], masks: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 30
    while not (masks.exists() and any(masks.glob("[0-9]*.png"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tmp_path, kill):
    count = 80
    source = official(tmp_path / "src", [blocky_mask(32, 32)] * count, image_size=700)
    dst = tmp_path / "dst"
    arguments = command("celebamask-hq", source, dst, "--size", 256, "--workers", 2, "--quiet")
    process = start_and_wait_for_masks(arguments, dst / prepare.MASKS)
    os.killpg(process.pid, kill)  # as a terminal does: the whole group
    _, errors = process.communicate(timeout=30)
    made = len(list((dst / prepare.MASKS).glob("[0-9]*.png")))
    assert 0 < made < count
    if kill == signal.SIGINT:
        assert process.returncode == 130
        assert errors.count("\n") == 1 and "interrupted after" in errors and "same command again" in errors, errors
        assert json.loads((dst / prepare.REPORT).read_text())["finished"] is False
        assert not list(dst.rglob(".*tmp*"))
    again = prepare.prepare_celebamask_hq(source, dst, size=256, workers=1, progress=False)
    assert again.finished and again.pairs == count and again.kept >= made - 1
    assert len(CelebAMaskHQ(dst, 16)) == count and CelebAMaskHQ(dst, 16).validate().decoded == count


def nested(root: Path, name: str, array: np.ndarray) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_ffhq_matches_by_path_or_name_and_reads_colours(tmp_path):
    mask = blocky_mask(30, 30)
    for k in range(3):
        nested(tmp_path / "images", f"{k:05d}/{k:05d}.png", smooth_picture(60, 60, k))
    nested(tmp_path / "masks", "00000/00000.png", mask)
    nested(tmp_path / "masks", "00001_mask.png", np.array(PALETTE, np.uint8)[mask])
    nested(tmp_path / "masks", "elsewhere/77.png", mask)
    report = prepare.prepare_ffhq(tmp_path / "images", tmp_path / "masks", tmp_path / "dst", 30, 1, False)
    assert report.pairs == 2 and report.missing_masks == ["00002/00002"] and report.missing_images == ["elsewhere/77"]
    for k in range(2):
        assert (read(tmp_path / "dst" / prepare.MASKS / f"{k:05d}.png") == mask).all()


def test_ffhq_with_equal_names_in_several_folders(tmp_path):
    for folder in "ab":
        nested(tmp_path / "images", f"{folder}/1.png", smooth_picture(20, 20))
        nested(tmp_path / "masks", f"{folder}/1.png", np.full((20, 20), ord(folder) - ord("a") + 1, np.uint8))
    prepare.prepare_ffhq(tmp_path / "images", tmp_path / "masks", tmp_path / "dst", 20, 1, False)
    values = {p.stem: int(read(p)[0, 0]) for p in (tmp_path / "dst" / prepare.MASKS).glob("[ab]*.png")}
    assert values == {"a_1": 1, "b_1": 2}


def test_sofgan_masks_are_translated(tmp_path):
    nested(tmp_path / "images", "1.png", smooth_picture(20, 20))
    nested(tmp_path / "masks", "1.png", np.arange(20, dtype=np.uint8)[None].repeat(20, 0))
    arguments = [
        tmp_path / "images",
        tmp_path / "masks",
        tmp_path / "dst",
        "--labels",
        "sofgan",
        "--size",
        20,
        "--workers",
        1,
    ]
    result = CliRunner().invoke(main, ["ffhq", *map(str, arguments), "--quiet"])
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "dst" / prepare.MASKS / "1.png")[3].tolist() == list(SOFGAN_TO_CELEBA)


def make_foreign(source: Path, dst: Path) -> None:
    (dst / prepare.IMAGES).mkdir(parents=True)


def other_size(source: Path, dst: Path) -> None:
    prepare.prepare_celebamask_hq(source, dst, size=16, workers=1, progress=False)


BAD = {
    "no source": (lambda s, d: s.rename(s.with_name("away")), "CelebA-HQ-img"),
    "no parts": (lambda s, d: (s / prepare.OFFICIAL_PARTS).rename(s / "x"), "got no CelebAMask-HQ-mask-anno"),
    "no pairs": (lambda s, d: [p.unlink() for p in (s / prepare.OFFICIAL_IMAGES).iterdir()], "nothing to prepare"),
    "another size": (other_size, "was begun with"),
    "foreign target": (make_foreign, "already holds a data set"),
    "target is a file": (lambda s, d: d.write_text(""), "a file stands where a folder is needed"),
    "all damaged": (
        lambda s, d: [p.write_bytes(b"") for p in (s / prepare.OFFICIAL_IMAGES).iterdir()],
        "none of 4 pairs could be made; 01998: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(source, tmp_path, case):
    spoil, said = BAD[case]
    dst = tmp_path / "dst"
    spoil(source, dst)
    arguments = ["celebamask-hq", str(source), str(dst), "--size", "32", "--workers", "1", "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1 and said in result.output, result.output


def test_full_disk_stops_with_one_line_and_keeps_what_is_done(source, tmp_path, monkeypatch):
    import errno

    from facelab import files

    made = []

    def fail_on_third(path):
        made.append(path)
        if len(made) == 7:  # settings, then image and mask of each pair
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush_to_disk", fail_on_third)
    with pytest.raises(UserError, match="disk is full"):
        prepare.prepare_celebamask_hq(source, tmp_path / "dst", size=32, workers=1, progress=False)
    report = json.loads((tmp_path / "dst" / prepare.REPORT).read_text())
    assert report["pairs"] == 2 and report["finished"] is False and not report["damaged"]


def test_check_reports_and_fails_on_damage(source, tmp_path):
    dst = tmp_path / "dst"
    runner = CliRunner()
    made = runner.invoke(main, ["celebamask-hq", str(source), str(dst), "--size", "32", "--workers", "1", "--quiet"])
    assert made.exit_code == 0 and "4 pairs" in made.output
    good = runner.invoke(main, ["check", str(dst)])
    assert good.exit_code == 0 and "4 pairs, 4 decoded" in good.output and " 4 l_eye" in good.output
    Image.fromarray(np.full((32, 32), 37, np.uint8)).save(dst / prepare.MASKS / "02000.png")
    bad = runner.invoke(main, ["check", str(dst)])
    assert bad.exit_code == 2 and "02000.png: mask value 37" in bad.output and "1 of 4 pairs" in bad.output


def test_help_is_quick_and_needs_no_torch():
    code = "import sys, facelab.cli.prepare; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0
    start = time.monotonic()
    done = subprocess.run(command("--help"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and time.monotonic() - start < 2.5
    for name in ("celebamask-hq", "ffhq", "synthetic", "check"):
        assert name in done.stdout


@pytest.mark.shared
def test_real_masks_survive_the_way_through_parts(real_pairs, tmp_path):
    masks = [read(real_pairs / f"{k}_mask.png") for k in range(5)]
    source = official(tmp_path / "src", masks, first=0)
    for k in range(5):
        (source / prepare.OFFICIAL_IMAGES / f"{k}.jpg").write_bytes((real_pairs / f"{k}.jpg").read_bytes())
    prepare.prepare_celebamask_hq(source, tmp_path / "dst", size=512, workers=2, progress=False)
    for k, mask in enumerate(masks):
        assert (read(tmp_path / "dst" / prepare.MASKS / f"{k:05d}.png") == mask).all()
    direct, prepared = CelebAMaskHQ(real_pairs, 128), CelebAMaskHQ(tmp_path / "dst", 128)
    for k in range(5):
        assert prepared[k].label_map.equal(direct[k].label_map)
        assert (prepared[k].image.float() - direct[k].image.float()).abs().mean() < 1.5
