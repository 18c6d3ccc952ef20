# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/weights.py`` does: list, verify, import and fetch the files of ``networks/manifest.yaml``.

:func:`fetch` is the only function of facelab that downloads anything, and only when it is called by name.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import facelab
from facelab import assets
from facelab.assets import Asset
from facelab.errors import UserError
from facelab.files import atomic_path, describe_os_error
from facelab.progress import progress_bar

if TYPE_CHECKING:
    from facelab.checkpoints.recognise import Match

RECORD = "imported.record"  # JSON; the suffix keeps it out of wheels
_CHUNK = 1 << 20
_ATTEMPTS = 5  # per mirror; each goes on where the last one stopped
_TIMEOUT = 30.0  # seconds without an answer
_HEADS = (b"PK\x03\x04", b"\x80", b"MATLAB 5.0")  # first bytes of files that can be recognised


@dataclass(frozen=True)
class Check:
    """Result of :func:`verify` for one present file. ok is None where nothing is known to compare with."""

    asset: Asset
    path: Path
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Imported:
    """Result of :func:`import_folder` for one file; target is None if it was not taken."""

    source: Path
    target: Path | None
    detail: str


def table(entries: Iterable[Asset] | None = None, method: str | None = None, missing_only: bool = False) -> str:
    """A table of the manifest: name, method, present or not, licence, and the commands that miss the file."""
    chosen = [
        asset
        for asset in (assets.manifest().values() if entries is None else entries)
        if (method is None or method in asset.methods) and not (missing_only and assets.locate(asset))
    ]
    rows = [("name", "for", "present", "licence", "missed by")]
    for asset in chosen:
        present = assets.locate(asset) is not None
        missed = "" if present else "; ".join(asset.commands)
        rows.append((asset.name, ", ".join(asset.methods), "yes" if present else "no", asset.licence, missed))
    widths = [min(44, max(len(row[i]) for row in rows)) for i in range(4)]
    lines = [
        "  ".join([*(_cut(cell, w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows
    ]
    there = sum(row[2] == "yes" for row in rows[1:])
    folders = ", ".join(str(root) for root in assets.roots())
    return "\n".join(
        [lines[0], "-" * len(lines[0]), *lines[1:], "", f"{there} of {len(chosen)} present; looked in {folders}"]
    )


def details(name: str) -> str:
    """All that the manifest says of one entry, in lines."""
    asset = assets.get(name)
    found = assets.locate(asset)
    lines = [
        f"{asset.name}: {asset.description}",
        f"file      {found or asset.file + ' (missing)'}",
        f"from      {asset.source}",
        f"licence   {asset.licence}",
        f"size      {f'{asset.size} bytes' if asset.size else 'not known'}",
        f"sha256    {asset.sha256 or 'not known'}" + (f" (md5 {asset.md5})" if asset.md5 else ""),
        f"needed by {'; '.join(asset.commands) or 'nothing yet'}",
    ]
    return "\n".join(lines)


def verify(names: Sequence[str] = ()) -> list[Check]:
    """Check the present files: SHA-256 or MD5 where known, else the one recorded at import, else the structure.

    Args:
        names: entries to check; all present ones by default. UserError if a named one is missing.
    """
    chosen = [(assets.get(name), assets.find(name)) for name in names]
    if not names:
        chosen = [(a, path) for a in assets.manifest().values() if (path := assets.locate(a)) is not None]
    return [_verify_one(asset, path) for asset, path in chosen]


def import_folder(
    folder: str | Path, link: bool = False, report: Callable[[Imported], None] | None = None
) -> list[Imported]:
    """Find official files in a folder (or one file) by content and put them where facelab looks.

    A file is known by its checksum where the manifest has one, else by the names and shapes of its tensors. Where
    several entries fit (the same network trained on other data), the name of the file or of a folder above it must
    say which (``cats``, ``ffhq512-64`` ...). Existing files are never replaced.

    Args:
        link: make symbolic links instead of copies.
        report: called with each result as it comes.

    Raises:
        UserError: no such folder, no place to put files, disk full.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(f"no folder at {folder}: expected one with downloaded weight files; check the path")
    store = assets.store()
    results = []
    for source in _candidates(folder, store):
        result = _import_one(source, folder, store, link)
        results.append(result)
        if report is not None:
            report(result)
    return results


def fetch(name: str, url: str | None = None, progress: bool = True) -> Path:
    """Download one file of the manifest to the place where facelab looks for it.

    Mirrors are tried in order; a broken transfer goes on where it stopped, also in a later call. The file gets its
    name only when it is complete and its size and checksum, where known, are right.

    Args:
        url: use this address instead of the manifest's.
        progress: show a bar on stderr.

    Raises:
        UserError: no address is known, every mirror failed (each named with its reason), disk full.
    """
    asset = assets.get(name)
    urls = (url,) if url else asset.urls
    target = assets.store() / asset.file
    if target.exists():
        raise UserError(
            f"{target} is already there; check it with 'python scripts/weights.py verify {name}' or remove it first"
        )
    if not urls:
        raise UserError(
            f"{name} cannot be fetched: no download address is known; get it ({asset.source}), then run "
            "'python scripts/weights.py import FOLDER', or give an address with --url"
        )
    part = target.with_name(target.name + ".part")
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for address in urls:
            try:
                _download(address, part, asset, progress)
                problem = _problem(asset, part)
                if problem is None:
                    with open(part, "rb") as file:
                        os.fsync(file.fileno())
                    os.replace(part, target)
                    _forget(part)
                    _record(target.parents[len(Path(asset.file).parts) - 1], asset, target, address, "fetched")
                    return target
                part.unlink()
                _forget(part)
                failures.append(f"{address}: {problem}")
            except _TransferError as error:
                failures.append(f"{address}: {error}")
    except OSError as error:
        raise UserError(describe_os_error(error, target)) from error
    kept = f"; {part.stat().st_size} bytes are kept, run it again to go on" if part.exists() else ""
    raise UserError(f"{name} could not be fetched: {'; '.join(failures)}{kept}")


# Verifying


def _verify_one(asset: Asset, path: Path) -> Check:
    if path.is_dir():
        return Check(asset, path, None, "a folder: not checked")
    from facelab.checkpoints import recognise

    if asset.size is not None and path.stat().st_size != asset.size:
        return Check(
            asset, path, False, f"damaged: expected {asset.size} bytes, got {path.stat().st_size}; get it again"
        )
    known = {"sha256": asset.sha256} if asset.sha256 else {"md5": asset.md5} if asset.md5 else {}
    recorded = _read_record(path, asset).get("sha256")
    for kind, expected, words in [(k, v, "manifest") for k, v in known.items()] or [
        ("sha256", recorded, "import record")
    ]:
        if expected is None:
            continue
        got = recognise.checksum(path, kind)
        if got != expected:
            return Check(asset, path, False, f"damaged: expected {kind} {expected} ({words}), got {got}; get it again")
        return Check(asset, path, True, f"{kind} as in the {words}")
    if asset.structure is None:
        return Check(asset, path, None, "no checksum and no structure is known: not checked")
    try:
        found = recognise.describe(path, [asset])
    except UserError as error:
        return Check(asset, path, False, str(error))
    if not found.matches:
        return Check(asset, path, False, f"not this file: expected {asset.description}, got {found.text}; get it again")
    words = {"structure": "tensors as expected", "kind": "of the right kind; sizes are not known or differ"}
    return Check(asset, path, True, f"{words[found.matches[0].certainty]} (checksum not known)")


# Importing


def _candidates(folder: Path, store: Path) -> Iterator[Path]:
    """Files that could be checkpoints, in order of name; what lies in the store is left out."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    inside = store.resolve()
    for path in files:
        resolved = path.resolve()
        if (inside in resolved.parents or path.suffix == ".npz") and not folder.is_file():
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(16).startswith(_HEADS):
                yield path


def _import_one(source: Path, folder: Path, store: Path, link: bool) -> Imported:
    from facelab.checkpoints import recognise

    try:
        found = recognise.describe(source)
    except UserError as error:
        return Imported(source, None, str(error).removeprefix(f"{source} "))
    usable = [match.asset for match in found.best if _is_taken(match)]
    if not usable:
        changed = any(match.certainty == "structure" for match in found.best)
        why = (
            "; its checksum is not that of the official file: changed or trained on, use it by its path"
            if changed
            else ""
        )
        return Imported(source, None, f"not taken: {found.text.removeprefix(f'{source}: ')}{why}")
    asset = usable[0] if len(usable) == 1 else _by_name(source, folder, usable)
    if asset is None:
        names = ", ".join(f"{a.name} ('{a.hint or a.name}')" for a in usable)
        return Imported(
            source, None, f"could be {names}: give the file or its folder the name in brackets and import again"
        )
    target = store / asset.file
    if target.exists():
        same = recognise.checksum(source) == recognise.checksum(target)
        return Imported(
            source,
            target if same else None,
            f"{asset.name}: " + ("already there" if same else f"another file is at {target}; remove it first"),
        )
    _place(source, target, link)
    _record(store, asset, target, str(source), found.best[0].certainty)
    return Imported(
        source,
        target,
        f"{asset.name}: {'linked' if link else 'copied'} to {target} (known by {found.best[0].certainty})",
    )


def _is_taken(match: Match) -> bool:
    """Whether a match is sure enough: the best proof that the manifest allows for this entry."""
    asset = match.asset
    if asset.sha256 or asset.md5:
        return match.certainty == "checksum"
    return match.certainty == "structure" or (asset.structure is not None and asset.structure.digest is None)


def _by_name(source: Path, folder: Path, candidates: Sequence[Asset]) -> Asset | None:
    """The one candidate whose hint stands in the file's name or in a folder's below (and with) the imported one."""
    root = folder if folder.is_dir() else folder.parent
    words = "/".join([root.resolve().name, *source.relative_to(root).parts]).lower()
    hits = [asset for asset in candidates if asset.hint and asset.hint.lower() in words]
    return hits[0] if len(hits) == 1 else None


def _place(source: Path, target: Path, link: bool) -> None:
    if not link:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(source.resolve(), target)
    except OSError as error:
        raise UserError(describe_os_error(error, target)) from error


def _record(store: Path, asset: Asset, target: Path, source: str, how: str) -> None:
    """Note what was put where, with its SHA-256, so that a later change is noticed."""
    from facelab.checkpoints import recognise

    entries = _read_records(store)
    entries[asset.name] = {
        "file": asset.file,
        "source": source,
        "known_by": how,
        "size": target.stat().st_size,
        "sha256": recognise.checksum(target),
        "facelab": facelab.__version__,
    }
    with atomic_path(store / RECORD) as path:
        path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def _read_records(store: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads((store / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _read_record(path: Path, asset: Asset) -> Mapping[str, Any]:
    """The record beside a present file; empty if it was put there by hand."""
    root = path.parents[len(Path(asset.file).parts) - 1]
    entry = _read_records(root).get(asset.name, {})
    return entry if isinstance(entry, dict) else {}


# Fetching


class _TransferError(Exception):
    """Why one mirror did not deliver."""


def _download(url: str, part: Path, asset: Asset, progress: bool) -> None:
    """Fill ``part`` from ``url``, going on where it ends. _TransferError when the mirror gives up."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _TransferError("not an http or https address")
    reason = ""
    stalled = 0
    while stalled < _ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer(url, part, asset, progress):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416 and part.exists():  # what is there does not belong to this file
                part.unlink()
                _forget(part)
            elif error.code < 500:
                raise _TransferError(f"the server says {error.code} {error.reason}") from None
            reason = f"the server says {error.code} {error.reason}"
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        stalled = 0 if after > before else stalled + 1
    raise _TransferError(reason)


def _transfer(url: str, part: Path, asset: Asset, progress: bool) -> bool:
    """One request; True when the file is complete as far as the server tells."""
    have = part.stat().st_size if part.exists() else 0
    tag = _remembered_tag(part, url)
    request = urllib.request.Request(url, headers={"User-Agent": f"facelab/{facelab.__version__}"})
    if have and tag is not None:
        request.add_header("Range", f"bytes={have}-")
        if tag:
            request.add_header("If-Range", tag)
    else:
        have = 0
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise _TransferError("got a web page instead of the file")
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else asset.size
        _remember_tag(part, url, answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        bar = progress_bar(
            total=total, initial=have, desc=asset.name, unit="B", unit_scale=True, unit_divisor=1024, show=progress
        )
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size >= total


def _problem(asset: Asset, path: Path) -> str | None:
    """What is wrong with a downloaded file, or None."""
    from facelab.checkpoints import recognise

    size = path.stat().st_size
    if asset.size is not None and size != asset.size:
        return f"expected {asset.size} bytes, got {size}"
    for kind, expected in (("sha256", asset.sha256), ("md5", asset.md5)):
        if expected is not None:
            got = recognise.checksum(path, kind)
            return None if got == expected else f"expected {kind} {expected}, got {got}"
    if asset.structure is None:
        return None
    try:
        found = recognise.describe(path, [asset])
    except UserError as error:
        return str(error)
    return None if found.matches else f"expected {asset.description}, got {found.text}"


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _remember_tag(part: Path, url: str, tag: str) -> None:
    _note_of(part).write_text(json.dumps({"url": url, "tag": tag}))


def _remembered_tag(part: Path, url: str) -> str | None:
    """The server's tag of the partial file; None if it came from another address and must not be continued."""
    try:
        note = json.loads(_note_of(part).read_text())
        return str(note["tag"]) if note["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _forget(part: Path) -> None:
    _note_of(part).unlink(missing_ok=True)


def _cut(text: str, width: int) -> str:
    return (text if len(text) <= width else text[: width - 1] + "…").ljust(width)
