# SPDX-License-Identifier: Apache-2.0
"""Pictures with CelebAMask-HQ masks, in FENeRF's folder layout and two simpler ones.

Layouts that are read as they are (``root`` is what the user names):

- ``root/celebahq_mask_img/*.jpg|png`` and ``root/celebahq_mask_mask/*.png`` (FENeRF),
- ``root/images/*`` and ``root/masks/*.png``,
- ``root/N.jpg`` beside ``root/N_mask.png``.

Pictures and masks belong together by name; if no names agree, by place in the sorted lists, as
FENeRF does it. ``root/dataset.json`` may state ``{"crop": 1.0}`` when pictures are framed for
training already (FENeRF's crop of 0.8 is assumed otherwise).
"""

from __future__ import annotations

import json
from pathlib import Path

from facelab.data import reading
from facelab.data.image_folder import PictureSet
from facelab.data.transforms import CROP, AreaChain, Chain, FenerfReference
from facelab.errors import UserError

FOLDERS = (("celebahq_mask_img", "celebahq_mask_mask"), ("images", "masks"))
MASK_ENDINGS = ("_mask", "_seg", "_label")
DESCRIPTION = "dataset.json"


class CelebAMaskHQ(PictureSet):
    """Picture and mask pairs as FENeRF's training samples.

    Args:
        root: folder in one of the layouts above.
        image_size: side of the samples in pixels.
        crop: side of the middle square over the picture's short side; None takes
            ``dataset.json``'s value, or 0.8.
        background_mask: blacken the picture where the mask is background.
        flips: mirror half of the samples in training.
        reference: FENeRF's own chain, with its resizing and without the exchange of left and
            right classes; ``crop`` does not apply.
        cache: see :class:`facelab.data.image_folder.PictureSet`.

    Raises:
        UserError: no such folder, no layout recognised, counts differ; one line.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        crop: float | None = None,
        background_mask: bool = True,
        flips: bool = True,
        reference: bool = False,
        cache: str | Path = "auto",
    ) -> None:
        images, masks, notes = find_pairs(root)
        if reference:
            chain: Chain = FenerfReference(image_size, background_mask, flips)
        else:
            crop = stated_crop(root) if crop is None else crop
            chain = AreaChain(image_size, crop, background_mask, flips)
        super().__init__(images, masks, chain, "black", cache)
        self._notes = notes


def find_pairs(root: str | Path) -> tuple[list[Path], list[Path], tuple[str, ...]]:
    """-> (pictures, the mask of each, notes), sorted by picture name.

    Raises:
        UserError: missing folder, empty folder, unknown layout, or counts differ (names the first without a partner).
    """
    root = Path(root)
    expected = (
        "expected celebahq_mask_img/ + celebahq_mask_mask/, images/ + masks/, or N.jpg beside N_mask.png (sets with "
        "cameras: a dataset.json with labels)"
    )
    if not root.is_dir():
        got = "a file" if root.exists() else "no such folder"
        raise UserError(f"no data set at {root}: {expected}, got {got}; check the path or run scripts/prepare_data.py")
    for image_name, mask_name in FOLDERS:
        image_folder, mask_folder = root / image_name, root / mask_name
        if image_folder.is_dir() and mask_folder.is_dir():
            return _pair(reading.list_images(image_folder), _masks_of(mask_folder), root)
        for present, absent in ((image_folder, mask_folder), (mask_folder, image_folder)):
            if present.is_dir():
                raise UserError(f"data set {root}: {present.name}/ is there but {absent.name}/ is missing; {expected}")
    files = reading.list_images(root)
    masks = [p for p in files if p.suffix.lower() == ".png" and p.stem.endswith("_mask")]
    images = [p for p in files if not (p.suffix.lower() == ".png" and "_mask" in p.stem)]
    if not masks:
        got = "an empty folder" if not any(root.iterdir()) else f"{len(images)} pictures and no masks"
        raise UserError(f"no data set at {root}: {expected}, got {got}; run scripts/prepare_data.py to make one")
    return _pair(images, masks, root)


def stated_crop(root: str | Path) -> float:
    """The crop that ``dataset.json`` states, or FENeRF's 0.8. UserError on a file that cannot be read."""
    path = Path(root) / DESCRIPTION
    if not path.exists():
        return CROP
    try:
        crop = json.loads(path.read_text(encoding="utf-8")).get("crop", CROP)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON object, got {error}; mend or remove the file") from error
    if not isinstance(crop, (int, float)) or isinstance(crop, bool) or not 0 < crop <= 1:
        raise UserError(f"{path}: crop must be a number in (0, 1], got {crop!r}; mend or remove the entry")
    return float(crop)


def _masks_of(folder: Path) -> list[Path]:
    files = reading.list_images(folder)
    lossy = [p for p in files if p.suffix.lower() in (".jpg", ".jpeg")]
    masks = [p for p in files if p.suffix.lower() == ".png"]
    if lossy and not masks:
        raise UserError(
            f"{lossy[0]}: expected a PNG mask, got JPEG, which alters class numbers; make the masks again as PNG"
        )
    return masks


def _pair(images: list[Path], masks: list[Path], root: Path) -> tuple[list[Path], list[Path], tuple[str, ...]]:
    if not images and not masks:
        raise UserError(f"data set {root}: expected pictures and masks, got empty folders; run scripts/prepare_data.py")
    by_name = _by_stem(masks)
    names = {p.stem for p in images}
    lonely_images = [p for p in images if p.stem not in by_name]
    lonely_masks = [p for stem, p in by_name.items() if stem not in names]
    if len(images) != len(masks):
        kind, lonely = ("picture", lonely_images) if len(images) > len(masks) else ("mask", lonely_masks)
        first = f"first {kind} without a partner: {lonely[0].name}" if lonely else f"two {kind}s share a name"
        raise UserError(
            f"data set {root}: {len(images)} pictures but {len(masks)} masks, expected as many; {first}; add or remove it"
        )
    if not lonely_images and len(by_name) == len(names) == len(images):
        return images, [by_name[p.stem] for p in images], ()
    if len(lonely_images) == len(images):
        note = f"no names agree; paired by sorted order, first {images[0].name} with {masks[0].name}"
        return images, masks, (note,)
    raise UserError(
        f"data set {root}: picture {lonely_images[0].name} has no mask of its name though others do; "
        f"expected {lonely_images[0].stem}.png; rename or remove it"
        if lonely_images
        else f"data set {root}: two pictures share a name up to the ending; expected one picture for each mask; remove one"
    )


def _by_stem(masks: list[Path]) -> dict[str, Path]:
    """Masks by the name of their picture: ``N.png`` and ``N_mask.png`` both stand for picture N."""
    table: dict[str, Path] = {}
    for path in masks:
        stem = path.stem
        for ending in MASK_ENDINGS:
            stem = stem.removesuffix(ending)
        table[stem] = path
    return table
