# SPDX-License-Identifier: Apache-2.0
"""Pictures: fixed ranges, palettes, grids and files, against hand-computed pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.errors import UserError
from facelab.inference import pictures

PALETTE = [(0, 0, 0), (204, 0, 0), (76, 153, 0)]


def test_to_uint8_uses_the_fixed_range_not_that_of_the_frame():
    flat = torch.full((1, 3, 2, 2), 0.5)
    assert pictures.to_uint8(flat).unique().tolist() == [191]  # 0.75 * 255 + 0.5
    assert pictures.to_uint8(torch.tensor([0.0, 5.0, 10.0, 20.0]), 0, 10).tolist() == [0, 128, 255, 255]
    with pytest.raises(UserError, match="holds NaN"):
        pictures.to_uint8(torch.tensor([0.0, float("nan")]))


def test_uint8_survives_the_way_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert pictures.to_uint8(pictures.from_uint8(every)).equal(every)


def test_labels_become_palette_colours():
    picture = pictures.labels_to_rgb(torch.tensor([[[0, 1], [2, 1]]]), PALETTE)
    assert picture[0, :, 1, 0].tolist() == [76, 153, 0]
    assert picture[0, :, 0, 1].tolist() == [204, 0, 0]
    with pytest.raises(ValueError, match=r"0\.\.2 .* got 0\.\.3"):
        pictures.labels_to_rgb(torch.tensor([[[0, 3]]]), PALETTE)


def test_depth_colours_are_fixed_monotone_and_even():
    colors = pictures.depth_colors().double()
    luma = colors @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    assert bool((luma.diff() < 0.6).all()) and float(luma[0]) > 220 and float(luma[-1]) < 45
    assert float(luma.diff().mean()) < -0.7
    step = colors.diff(dim=0).norm(dim=1)
    assert float(step.max()) < 5  # no visible edges
    assert len(torch.unique(colors, dim=0)) > 240
    near, far = pictures.depth_to_rgb(torch.tensor([[[0.88, 1.12]]]), 0.88, 1.12)[0].unbind(-1)
    assert near.flatten().tolist() == colors[0].tolist() and far.flatten().tolist() == colors[-1].tolist()


def test_depth_fades_to_the_background_where_transparent():
    depth, opacity = torch.full((1, 1, 1, 2), 1.0), torch.tensor([[[[0.0, 1.0]]]])
    picture = pictures.depth_to_rgb(depth, 0, 2, opacity, background=(10, 20, 30))
    assert picture[0, :, 0, 0].tolist() == [10, 20, 30]
    assert picture[0, :, 0, 1].tolist() == pictures.depth_colors()[128].tolist()


def test_normals_towards_the_viewer_are_light_blue_and_masked_ones_black():
    normals = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    picture = pictures.normals_to_rgb(normals, torch.tensor([[[True, False]]]))
    assert picture[0, :, 0, 0].tolist() == [128, 128, 255]
    assert picture[0, :, 0, 1].tolist() == [0, 0, 0]


def test_blend_and_side_by_side():
    dark, bright = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    assert pictures.blend(dark, bright, 0.25).unique().tolist() == [50]
    assert pictures.side_by_side(dark, bright)[0, 0].tolist() == [[0, 0, 200, 200]] * 2
    with pytest.raises(ValueError, match="one shape"):
        pictures.blend(dark, bright[..., :1])


def test_grid_places_cells_row_by_row_with_gaps():
    cells = torch.arange(1, 4, dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 3, 1, 2)
    grid = pictures.image_grid(cells, columns=2, gap=1, background=(9, 9, 9))
    assert grid[0].tolist() == [[1, 1, 9, 2, 2], [9, 9, 9, 9, 9], [3, 3, 9, 9, 9]]
    assert pictures.image_grid(cells).shape == (3, 2, 4)
    with pytest.raises(ValueError, match="uint8"):
        pictures.image_grid(cells.float())


def test_contact_sheet_keeps_pictures_and_writes_captions():
    cells = torch.full((2, 3, 8, 40), 100, dtype=torch.uint8)
    sheet = pictures.contact_sheet(cells, ["", "psi 0.7"], columns=2)
    strip = 13 + 2 * pictures.CAPTION_MARGIN
    assert sheet.shape == (3, 8 + strip, 84)
    assert sheet[:, :8, :40].unique().tolist() == [100]
    assert int(sheet[:, 8:, :40].min()) == 255  # no caption, no ink
    assert int(sheet[:, 8:, 44:].min()) < 100
    titled = pictures.contact_sheet(cells, ["a", "b"], columns=2, title="two")
    assert titled.shape[1] == sheet.shape[1] + 2 * strip
    with pytest.raises(ValueError, match="one caption per picture"):
        pictures.contact_sheet(cells, ["a"])


def test_long_captions_are_shortened_to_the_width():
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    text = pictures._shorten("a very long caption indeed", font, 60)
    assert text.endswith("...") and font.getlength(text) <= 60 and text.startswith("a v")


def test_png_files_hold_exactly_what_was_written(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "a.png"
    pictures.save_png(path, picture)
    assert pictures.read_picture(path).equal(picture)
    pictures.save_png(path, picture.permute(1, 2, 0).numpy()[..., 0])
    assert pictures.read_picture(path)[1].equal(picture[0])
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]  # no temporary file stays


def test_label_png_holds_class_numbers_and_shows_colours(tmp_path):
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    pictures.save_label_png(tmp_path / "mask.png", labels, PALETTE)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert np.asarray(image).tolist() == labels.tolist()
        assert image.convert("RGB").getpixel((2, 0)) == (76, 153, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing.png", "No such file"),
        (lambda folder: (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n") and folder / "cut.png", "cut.png"),
        (lambda folder: (folder / "text.png").write_text("hello") and folder / "text.png", "not a picture"),
    ],
)
def test_unreadable_pictures_give_one_line(tmp_path, make, words):
    with pytest.raises(UserError, match=words) as caught:
        pictures.read_picture(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="file stands where a folder is needed"):
        pictures.save_png(tmp_path / "taken" / "a.png", torch.zeros(3, 2, 2, dtype=torch.uint8))
