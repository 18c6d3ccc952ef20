# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/facednerf.md from what measure_facednerf.py found:

    python tests/benchmarks/facednerf_tables.py RESULT.json [RESULT.json ...] docs/facednerf.md

What stands between the two marks of the document is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from facelab.errors import UserError
from facelab.files import atomic_path

BEGIN, END = "<!-- measured: written by tests/benchmarks/facednerf_tables.py -->", "<!-- end of measured -->"
Row = dict[str, Any]


def tables(found: Row) -> str:
    """All of a file of measure_facednerf.py as Markdown; a part that was not measured is left out."""
    parts = [
        (what, make([row for row in found["rows"] if row["part"] == part]))
        for part, what, make in (
            ("inversion", "Inversion, means over the heads; other views: five from -0.5 to 0.5 rad", _inversion),
            ("relighting", "Relighting, means over heads and five views: after (before; in the true pictures)", _light),
            ("text", "Text, a diffusion model of random weights", _text),
        )
        if any(row["part"] == part for row in found["rows"])
    ]
    return "\n\n".join([_about(found), *(f"{what}:\n\n{text}" for what, text in parts)])


def _about(found: Row) -> str:
    changed = [f"`--steps {found['steps']}`"] if found["steps"] is not None else []
    changed += [f"`--tune-steps {found['tune_steps']}`"] if found["tune_steps"] is not None else []
    changed += [f"`{setting}`" for setting in found["settings"]]
    how = f"with {', '.join(changed)}" if changed else "as the presets say"
    light = f"; DPR at {found['dpr'][2]} pixels, {found['dpr'][1]} statistics" if found["dpr"] else ""
    reader = next((row for row in found["rows"] if row["part"] == "reader"), None)
    if reader is not None:
        light += f"; the reader is off by {reader['median_angle_degrees']:.0f} degrees (median)"
    return (
        f"{len(found['heads'])} held-out synthetic heads (seed {found['heads_seed']}, {found['pixels']} pixels) and "
        f"`{found['model']}` on {found['device']}, {how}{light}."
    )


def _inversion(rows: Sequence[Row]) -> str:
    name = next(key for key in rows[0]["photo"] if key.startswith(("lpips", "perceptual")))
    person = "identity_cosine" in rows[0]["photo"]
    lines = []
    for row in rows:
        photo, others = row["photo"], row["others"]
        cells = [row["by"], f"{photo['psnr']:.1f}", f"{photo['ssim']:.3f}", f"{photo[name]:.3f}"]
        cells += [f"{photo['identity_cosine']:.3f}"] if person else []
        cells += [f"{others['psnr']:.1f}", f"{others['ssim']:.3f}", f"{others[name]:.3f}"]
        cells += [f"{others['identity_cosine']:.3f}"] if person else []
        lines.append([*cells, *_cost(row)])
    same = ["identity"] if person else []
    head = ["preset", "PSNR", "SSIM", name, *same, "other views: PSNR", "SSIM", name, *same, "seconds a head", "GB"]
    return _table(head, lines)


def _light(rows: Sequence[Row]) -> str:
    kinds = [("angle_degrees", "angle, degrees", 0), ("sh_error", "error of the 8 relative numbers", 2),
             ("shading_correlation", "correlation with its shading", 2), ("dpr_error", "DPR's error", 2),
             ("psnr_to_truth", "PSNR to the true picture", 1)]  # fmt: skip
    kinds = [kind for kind in kinds if kind[0] in rows[0]["after"]]
    lines = []
    for row in rows:
        cells = [row["light"], row["judge"]]
        for key, _, digits in kinds:
            shown = [f"{row[when][key]:.{digits}f}" for when in ("after", "before", "truth") if key in row[when]]
            cells.append(f"{shown[0]} ({'; '.join(shown[1:])})")
        lines.append([*cells, *_cost(row)])
    return _table(["light", "judge", *(title for _, title, _ in kinds), "seconds a head", "GB"], lines)


def _text(rows: Sequence[Row]) -> str:
    (row,) = rows
    return (
        f"{row['steps']} steps moved the codes by {row['codes_moved_deviations']:.2f} of their deviation and the picture by "
        f"{row['picture_moved_by_codes']:.3f}, the tuning by {row['picture_moved_by_tuning']:.3f} (mean, range 2)."
    )


def _cost(row: Row) -> list[str]:
    return [f"{row['seconds'] / row['heads']:.0f}", f"{row['gigabytes']:.1f}"] if "seconds" in row else ["", ""]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def read(source: Path) -> str:
    """The tables of a file. UserError where it is none of measure_facednerf.py."""
    try:
        return tables(json.loads(source.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{source}: expected what measure_facednerf.py --out writes ({reason}); check the path"
        ) from error


def write(sources: Sequence[Path], document: Path) -> None:
    """Put the tables of the sources between the marks of the document. UserError for what cannot be read or written."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{document}: cannot be read ({error}); check the path") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{document}: expected the marks {BEGIN} and {END} once each; put them where the tables belong")
    before, _, rest = text.partition(BEGIN)
    made = "\n\n".join(read(source) for source in sources)
    with atomic_path(document) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; its errors are one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", metavar="RESULT.json", type=Path, nargs="+", help="of measure_facednerf.py --out")
    parser.add_argument("document", metavar="DOCUMENT.md", type=Path, help="between whose marks the tables go")
    options = parser.parse_args(arguments)
    try:
        write(options.results, options.document)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
