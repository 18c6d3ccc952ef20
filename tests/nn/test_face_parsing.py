# SPDX-License-Identifier: Apache-2.0
"""Face parsing: published files, our own parser, masks of folders, augmentation, training."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab import assets
from facelab.cli.parser import compare_masks, masks
from facelab.config import load_staged, resolve_curriculum
from facelab.data import parsing, reading
from facelab.data.classes import BISENET19_TO_CELEBA, CLASSES, FLIP_TABLE, PALETTE, SOFGAN_TO_CELEBA
from facelab.data.parsing import load_parser, save_mask, save_small_parser, write_masks
from facelab.draws import Draws
from facelab.errors import Interrupted, UserError
from facelab.methods.face_parser import augment as aug
from facelab.methods.face_parser.config import AugmentConfig, FaceParserConfig
from facelab.methods.face_parser.training import METHOD, PARSER_FILE, ExportParser, dice_loss
from facelab.nn.pretrained.face_parsing import BiSeNet, FaceParser, SmallParser, bisenet_from_published
from facelab.training.loop import Trainer
from tests.golden.adapters.face_parsing import published_shapes
from tests.golden.harness import detfill

RULES = [{"match": "running_var$", "mean": 1.0, "std": 0.05}, {"match": r"(bn\d?|bn_atten|downsample\.1)\.weight$",
         "mean": 1.0, "std": 0.1}, {"match": "weight$", "std": 0.03}]  # fmt: skip
SOFGAN_NAMES = (  # class order of SofGAN's file; noses and eyes by side
    "background skin l_brow r_brow l_eye r_eye nose nose mouth u_lip l_lip l_ear r_ear ear_r eye_g neck neck_l cloth "
    "hair hat"
)
POPULAR_NAMES = (  # class order of the popular file
    "background skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r nose mouth u_lip l_lip neck neck_l cloth hair hat"
)
STILL = AugmentConfig(
    rotate=0, zoom=(1, 1), shift=0, lower=0, stretch=0, elastic=0, p_flip=0, p_long_hair=0, p_wild_hair=0, p_hair_texture=0,
    p_brows=0, p_eyes=0, p_beard=0, p_neckline=0, p_cloth_texture=0, p_occluder=0, p_shadow=0, p_blur=0, noise=0, colour=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def published() -> dict[int, dict[str, torch.Tensor]]:
    return {classes: detfill(published_shapes(classes), 5, RULES) for classes in (19, 20, 12)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallParser((8, 16))
    for parameter in net.parameters():  # scores that differ from pixel to pixel
        parameter.data.mul_(2.0)
    return save_small_parser(tmp_path_factory.mktemp("parser") / "small.safetensors", net, 32, {"steps": 7})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in {"a.jpg": (40, 40), "b.png": (64, 48), "more/c.jpg": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / name)
    return folder


# --- published files


@pytest.mark.parametrize(("table", "names"), [(SOFGAN_TO_CELEBA, SOFGAN_NAMES), (BISENET19_TO_CELEBA, POPULAR_NAMES)])
def test_class_tables_keep_the_names(table: tuple[int, ...], names: str) -> None:
    assert " ".join(CLASSES[number] for number in table) == names
    assert set(table) == set(range(len(CLASSES)))


@pytest.mark.parametrize("classes", [19, 20])
def test_published_file_gives_celebamask_classes(
    classes: int, published: dict[int, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    state = dict(published[classes])
    favourite = 7  # a class of the file whose score is made to win everywhere
    state["conv_out.conv_out.weight"] = torch.zeros_like(state["conv_out.conv_out.weight"])
    state["conv_out.conv_out.weight"][favourite] = 1.0  # features behind a ReLU are not negative
    counters = {"cp.resnet.bn1.num_batches_tracked": torch.tensor(3)}
    path = tmp_path / "parser.pth"
    torch.save({f"module.{name}": value for name, value in {**state, **counters}.items()}, path)
    parser = load_parser(path)
    parser.size = 64
    labels = parser(torch.rand(1, 3, 80, 96) * 2 - 1, (40, 48))
    assert labels.shape == (1, 40, 48) and labels.unique().tolist() == [
        (SOFGAN_TO_CELEBA if classes == 20 else BISENET19_TO_CELEBA)[favourite]
    ]
    assert (parser.net.upsampling, round(float(parser.mean[0]), 3)) == {20: ("bilinear", 0.5), 19: ("nearest", 0.485)}[
        classes
    ]


def test_upsampling_changes_the_scores(published: dict[int, dict[str, torch.Tensor]]) -> None:
    smooth = bisenet_from_published(published[20])
    blocky = BiSeNet(20, "nearest").eval()
    blocky.load_state_dict(smooth.state_dict())
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert smooth(x).shape == (1, 20, 64, 64) and (smooth(x) - blocky(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="upsampling"):
        BiSeNet(19, "cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("ffm.conv1.weight"), "fusion.squeeze.weight"),
        (lambda s: s.update({"ffm.conv3.weight": torch.zeros(1)}), "unknown tensor 'ffm.conv3.weight'"),
        (lambda s: s.update({"ffm.conv1.weight": torch.zeros(64, 256, 3, 3)}), r"\(64, 256, 1, 1\), got \(64, 256, 3"),
        (lambda s: s.pop("cp.resnet.conv1.weight"), "19 or 20 classes"),
    ],
)
def test_other_networks_are_refused(change, words: str, published, tmp_path: Path) -> None:
    state = dict(published[20])
    change(state)
    torch.save(state, tmp_path / "parser.pth")
    with pytest.raises(UserError, match=words) as error:
        load_parser(tmp_path / "parser.pth")
    assert "\n" not in str(error.value)


def test_other_class_counts_are_refused(published, tmp_path: Path) -> None:
    torch.save(published[12], tmp_path / "parser.pth")
    with pytest.raises(UserError, match="it has 12 classes, expected 19 or 20"):
        load_parser(tmp_path / "parser.pth")


class _Evil:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    torch.save({"cp.resnet.conv1.weight": _Evil(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("evil.pth", "cut.safetensors"):
        with pytest.raises(UserError, match="damaged or holds more than tensors"):
            load_parser(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="no parser file at"):
        load_parser(tmp_path / "absent.pth")


# --- our own


def test_small_parser_fits_its_budget_and_its_file(small: Path, tmp_path: Path) -> None:
    path = save_small_parser(tmp_path / "default.safetensors", SmallParser(), 256)
    assert path.stat().st_size < 3_000_000
    parser, again = load_parser(small), load_parser(small)
    x = torch.rand(3, 3, 50, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert parser.size == 32 and parser.scores(x).shape == (3, 19, 32, 32)
    torch.testing.assert_close(parser.scores(x), again.scores(x), rtol=0, atol=0)
    torch.testing.assert_close(parser.scores(x)[1:2], parser.scores(x[1:2]))  # nothing depends on the batch
    assert len(parser(x).unique()) > 1 and not any(p.requires_grad for p in parser.parameters())


def test_small_parser_says_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="multiples of 4, got"):
        SmallParser((8, 16))(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        SmallParser((8, 12))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        FaceParser(SmallParser((8, 16)), 32, range(19))(torch.zeros(3, 32, 32))


# --- masks of a folder


def test_masks_are_palette_pictures_and_are_kept(small: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "masks"
    report = write_masks(pictures, out, small, size=32, batch=2, workers=2, progress=False)
    assert (report.written, report.kept, report.finished) == (3, 0, True)
    assert list(report.damaged) == ["broken.jpg"] and json.loads((out / "report.json").read_text())["written"] == 3
    sizes = {name: Image.open(out / name).size for name in ("a.png", "b.png", "more/c.png")}
    assert sizes == {"a.png": (32, 32), "b.png": (32, 43), "more/c.png": (32, 32)}
    assert sum(report.pixels) == 2 * 32 * 32 + 32 * 43
    with Image.open(out / "a.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[: 3 * len(PALETTE)] == [v for colour in PALETTE for v in colour]
        values = np.asarray(mask)
    assert (reading.read_mask(out / "a.png")[0] == values).all()
    picture = torch.from_numpy(np.array(Image.open(pictures / "a.jpg").resize((32, 32), Image.Resampling.BILINEAR)))
    alone = parsing.parse_pictures(load_parser(small), picture.permute(2, 0, 1)[None])[0]
    assert (alone == values).mean() > 0.999

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    (out / "a.png").unlink()
    (out / "b.png").write_bytes(b"spoiled")
    again = write_masks(pictures, out, small, size=32, progress=False)
    assert (again.written, again.kept) == (2, 1)
    assert (out / "more/c.png").stat().st_mtime_ns == before[out / "more/c.png"]
    assert (np.asarray(Image.open(out / "a.png")) == values).all()


def test_another_parser_or_size_is_refused(small: Path, pictures: Path, tmp_path: Path) -> None:
    write_masks(pictures, tmp_path / "masks", small, size=32, progress=False)
    other = save_small_parser(tmp_path / "other.safetensors", SmallParser((8, 16)), 32)
    for arguments in ({"parser_path": other, "size": 32}, {"parser_path": small, "size": 16}):
        with pytest.raises(UserError, match="begun with another parser or size"):
            write_masks(pictures, tmp_path / "masks", **arguments, progress=False)


def test_folders_that_cannot_be_parsed(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        write_masks(tmp_path / "absent", tmp_path / "masks", small)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        write_masks(tmp_path / "in", tmp_path / "masks", small)
    (tmp_path / "in/x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1 pictures could be parsed; x.jpg"):
        write_masks(tmp_path / "in", tmp_path / "masks", small, progress=False)
    (tmp_path / "in/x.png").write_bytes(b"")
    with pytest.raises(UserError, match="would share the mask"):
        write_masks(tmp_path / "in", tmp_path / "masks", small, progress=False)


def test_masks_do_not_go_where_the_pictures_lie(small: Path, pictures: Path) -> None:
    for out in (pictures, pictures.parent):
        with pytest.raises(UserError, match="where the pictures lie; choose another folder"):
            write_masks(pictures, out, small, size=32, progress=False)


def test_a_file_that_is_no_parser_is_refused_in_few_words(tmp_path: Path) -> None:
    (tmp_path / "parser.pth").write_bytes(b"\xff\xd8 no parser")
    with pytest.raises(UserError, match=r"damaged or holds more than tensors \(\w+\); get the file again$"):
        load_parser(tmp_path / "parser.pth")


def test_an_interrupt_says_that_masks_are_kept(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def interrupted(*arguments: object, **options: object) -> object:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return plain(*arguments, **options)  # type: ignore[arg-type]

    plain = parsing.parse_pictures
    monkeypatch.setattr(parsing, "parse_pictures", interrupted)
    with pytest.raises(Interrupted, match="what is done is kept"):
        write_masks(pictures, tmp_path / "masks", small, size=32, batch=1, progress=False)
    monkeypatch.undo()
    again = write_masks(pictures, tmp_path / "masks", small, size=32, progress=False)
    assert again.kept == 1 and again.written == 2


def test_the_folder_of_true_masks_is_looked_for_first(small: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = [str(pictures), str(tmp_path / "masks"), "--parser", str(small), "--compare", str(tmp_path / "none")]
    result = CliRunner().invoke(masks, arguments)
    assert result.exit_code == 2 and "expected true masks" in result.output and not (tmp_path / "masks").exists()


def test_comparison_counts_pixels(tmp_path: Path) -> None:
    for folder in ("ours", "true"):
        (tmp_path / folder).mkdir()
    ours, true = np.zeros((4, 4), np.uint8), np.zeros((8, 8), np.uint8)
    ours[:2], true[:4, :4] = 1, 1  # skin: 32 of 64 against 16, all inside
    save_mask(tmp_path / "ours/7.png", ours)
    save_mask(tmp_path / "true/7_mask.png", true)
    result = compare_masks(tmp_path / "ours", tmp_path / "true")
    assert result["iou"] == pytest.approx({"background": 32 / 48, "skin": 16 / 32})
    assert result["miou"] == pytest.approx((32 / 48 + 0.5) / 2) and result["accuracy"] == 0.75
    with pytest.raises(UserError, match="belongs to one in"):
        (tmp_path / "ours/7.png").rename(tmp_path / "ours/8.png")
        compare_masks(tmp_path / "ours", tmp_path / "true")


def test_command_measures_against_true_masks(small: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = [
        str(pictures),
        str(tmp_path / "masks"),
        "--parser",
        str(small),
        "--size",
        "32",
        "--quiet",
        "--device",
        "cpu",
    ]
    first = CliRunner().invoke(masks, arguments)
    assert first.exit_code == 0 and "3 masks by facelab parser at 32 px" in first.output
    measured = CliRunner().invoke(masks, [*arguments, "--compare", str(tmp_path / "masks")])
    assert measured.exit_code == 0 and "3 from earlier runs" in measured.output
    assert json.loads(measured.output.splitlines()[-1])["miou"] == 1.0
    wrong = CliRunner().invoke(masks, [str(pictures), str(tmp_path / "m"), "--parser", str(tmp_path / "no.pth")])
    assert wrong.exit_code == 2 and "no parser at" in wrong.output
    wrong = CliRunner().invoke(masks, [str(pictures), str(tmp_path / "m"), "--parser", "fenerf_parsr"])
    assert wrong.exit_code == 2 and "Did you mean 'fenerf_parser'?" in wrong.output


@pytest.mark.shared
def test_bundled_parser_on_real_faces(tmp_path: Path) -> None:
    """It beats what knows no picture: the best of one label map for all faces gets 0.26, or 0.38 if made of true masks."""
    path, data = assets.find_bundled("face_parser_synthetic"), os.environ.get("FACELAB_REAL_DATA")
    if path is None:
        pytest.skip("no parser is bundled yet")
    if not data or not (Path(data) / "celebamask_pairs").is_dir():
        pytest.skip("FACELAB_REAL_DATA has no folder celebamask_pairs")
    for picture in sorted((Path(data) / "celebamask_pairs").glob("[0-9].jpg")):
        (tmp_path / picture.name).symlink_to(picture)
    write_masks(tmp_path, tmp_path / "masks", path, progress=False)
    assert compare_masks(tmp_path / "masks", Path(data) / "celebamask_pairs")["miou"] > 0.42


# --- synthetic heads that vary like photographs


def heads(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A drawing with hair above a face, a brow, a neck and clothes."""
    labels = torch.zeros(2, size, size, dtype=torch.long)
    labels[:, 4:8, 6:26] = aug.HAIR
    labels[:, 8:20, 10:22] = aug.SKIN
    labels[:, 10, 11:14] = aug.BROWS[1]
    labels[:, 20:24, 13:19] = aug.NECK
    labels[:, 24:, 4:28] = aug.CLOTH
    image = (labels[:, None] * 12 + 10).expand(-1, 3, -1, -1).to(torch.uint8)
    return image * (labels > 0)[:, None], labels


def test_augmentation_is_a_function_of_the_draws() -> None:
    image, labels = heads()
    first = aug.augment(image, labels, 24, Draws(1, step=2), AugmentConfig())
    again = aug.augment(image, labels, 24, Draws(1, step=2), AugmentConfig())
    other = aug.augment(image, labels, 24, Draws(1, step=3), AugmentConfig())
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (2, 3, 24, 24) and first[1].shape == (2, 24, 24) and first[1].dtype == torch.int64
    assert first[0].min() >= -1 and first[0].max() <= 1 and first[1].min() >= 0 and first[1].max() < 19


def test_without_changes_the_face_stays() -> None:
    image, labels = heads()
    picture, same = aug.warp(image.float() / 255, labels, 32, Draws(0), STILL)
    assert torch.equal(same, labels)
    torch.testing.assert_close(picture, image.float() / 255, atol=1e-5, rtol=0)
    mirrored, swapped = aug.warp(image.float() / 255, labels, 32, Draws(0), replace(STILL, p_flip=1))
    torch.testing.assert_close(mirrored, image.float().flip(3) / 255, atol=1e-5, rtol=0)
    assert torch.equal(swapped, torch.tensor(FLIP_TABLE)[labels].flip(2)) and not torch.equal(swapped, labels.flip(2))


def test_hair_falls_beside_the_face_only() -> None:
    image, labels = heads()
    _, grown = aug.grow_hair(image.float() / 255, labels, Draws(4), replace(STILL, p_long_hair=1))
    new = (grown == aug.HAIR) & (labels != aug.HAIR)
    assert new.any() and set(labels[new].tolist()) <= {aug.BACKGROUND, aug.CLOTH}
    assert not new[:, :, 13:19].any()  # below the face there is none
    assert torch.equal(grown[~new], labels[~new])


def test_parts_change_together_with_their_labels() -> None:
    image, labels = heads()
    picture = image.float() / 255
    _, wide = aug.grow_brows(picture, labels, Draws(0), replace(STILL, p_brows=1))
    assert ((wide == aug.BROWS[1]) & (labels == aug.SKIN)).any() and (
        wide[labels != aug.SKIN] == labels[labels != aug.SKIN]
    ).all()
    open_picture, open_neck = aug.widen_neckline(picture, labels, Draws(0), replace(STILL, p_neckline=1))
    skin = (open_neck == aug.NECK) & (labels == aug.CLOTH)
    assert skin.any() and not torch.equal(
        open_picture[skin[:, None].expand_as(picture)], picture[skin[:, None].expand_as(picture)]
    )
    _, covered = aug.cover(picture, labels, Draws(0), replace(STILL, p_occluder=1))
    assert ((covered == aug.BACKGROUND) & (labels != aug.BACKGROUND)).any()
    bearded = aug.paint_beard(
        picture, torch.where(labels == aug.BROWS[1], aug.LIPS[1], labels), Draws(2), replace(STILL, p_beard=1)
    )
    changed = (bearded != picture).any(1)
    assert changed.any() and (labels[changed] == aug.SKIN).all()
    with_eyes = torch.where(labels == aug.BROWS[1], aug.EYES[1], labels)
    shaded = aug.shade_eyes(picture, with_eyes, Draws(2), replace(STILL, p_eyes=1))
    assert (shaded <= picture).all() and (shaded < picture)[
        (with_eyes == aug.EYES[1])[:, None].expand_as(picture)
    ].all()
    assert torch.equal(shaded[:, :, 16:], picture[:, :, 16:])


# --- training


def test_dice_loss_of_known_maps() -> None:
    labels = torch.tensor([[[0, 1], [1, 1]]])
    right = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2) * 100.0
    assert float(dice_loss(right, labels)) == pytest.approx(0.0, abs=1e-6)
    wrong = right[:, [1, 0, 2]]
    assert float(dice_loss(wrong, labels)) == pytest.approx(1 - 1 / 5)  # both classes: (0 + 1) / (4 + 1)


def run(folder: Path, steps: int, resume: str | None = None) -> Trainer:
    staged = load_staged(
        FaceParserConfig, [resolve_curriculum("parser", "debug")], [f"train.max_steps={steps}", "log.progress=false"]
    )
    trainer = Trainer(METHOD, staged, folder, callbacks=[ExportParser()], resume=resume)
    assert trainer.run().finished
    return trainer


def test_training_resumes_exactly_and_exports(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume="auto")
    for (name, a), (_, b) in zip(whole.models.named_parameters(), parts.models.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    parser = load_parser(tmp_path / "parts" / PARSER_FILE)
    with parts.averages["ema"].applied_to(parts.models["parser"]), torch.no_grad():
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
        torch.testing.assert_close(parser.net(x), parts.models["parser"](x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["synthetic", "cpu_96", "debug"])
def test_curricula_resolve(name: str) -> None:
    staged = load_staged(FaceParserConfig, [resolve_curriculum("parser", name)])
    net = METHOD.build(staged.at(0))["parser"]
    assert staged.at(0).model.size % 2 ** len(staged.at(0).model.widths) == 0
    assert sum(p.numel() for p in net.parameters()) * 2 < 3_000_000
