# SPDX-License-Identifier: Apache-2.0
"""The manifest of weight files, and where files are looked up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from facelab import assets
from facelab.errors import UserError

METHODS = {"pigan", "eg3d", "stylesdf", "fenerf", "facednerf", "nerffaceshop", "cgof", "cnerf"}


def test_every_entry_is_complete_and_nothing_is_made_up() -> None:
    entries = assets.manifest()
    assert {method for asset in entries.values() for method in asset.methods} == METHODS
    files = [asset.file for asset in entries.values()]
    assert len(files) == len(set(files))
    for asset in entries.values():
        assert asset.licence and asset.commands and asset.description, asset.name
        if asset.kind == "bundled":
            assert asset.sha256 and asset.size and asset.file.endswith(".safetensors"), asset.name
        else:
            assert asset.urls or asset.where, f"{asset.name}: nobody could find it"
        assert asset.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", asset.sha256), asset.name
        assert asset.md5 is None or re.fullmatch(r"[0-9a-f]{32}", asset.md5), asset.name
        digest = asset.structure.digest if asset.structure else None
        assert digest is None or re.fullmatch(r"[0-9a-f]{16}", digest), asset.name


@pytest.mark.parametrize("asset", [a for a in assets.manifest().values() if a.kind == "bundled"], ids=lambda a: a.name)
def test_bundled_files_are_what_the_manifest_says(asset: assets.Asset) -> None:
    from facelab.checkpoints.recognise import checksum

    path = assets.find(asset.name)
    assert (path.stat().st_size, checksum(path)) == (asset.size, asset.sha256)


_MANIFEST = """
files:
  alpha:
    kind: official
    file: sub/alpha.pth
    description: the first model
    methods: [pigan]
    commands: [convert_checkpoint pigan]
    where: the project page
    licence: MIT
  tiny:
    kind: bundled
    file: tiny.safetensors
    description: a model that comes along
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A checkout, an installed package and a home of their own, with a manifest of two files."""
    checkout = tmp_path / "checkout"
    package = checkout / "facelab"
    folders = {"home": tmp_path / "home", "checkout": checkout / "networks", "package": package / "_data/networks"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    (folders["checkout"] / "manifest.yaml").write_text(_MANIFEST)
    monkeypatch.setattr(assets, "_package", lambda: package)
    monkeypatch.setenv("FACELAB_HOME", str(folders["home"]))
    return folders


def test_order_of_lookup(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assets.locate("alpha") is None
    for place in ("package", "checkout", "home"):
        path = places[place] / "sub/alpha.pth"
        path.parent.mkdir()
        path.touch()
        assert assets.locate("alpha") == path == assets.find("alpha")
    explicit = tmp_path / "mine.pth"
    explicit.touch()
    assert assets.find("alpha", explicit) == explicit
    monkeypatch.delenv("FACELAB_HOME")
    assert assets.locate("alpha") == places["checkout"] / "sub/alpha.pth"
    assert assets.store() == places["checkout"]


def test_an_installed_package_without_checkout(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (places["checkout"] / "manifest.yaml").rename(places["package"] / "manifest.yaml")
    (places["checkout"].parent / "pyproject.toml").unlink()
    assert assets.store() == places["home"]
    monkeypatch.delenv("FACELAB_HOME")
    (places["package"] / "tiny.safetensors").touch()
    assert assets.find_bundled("tiny") == places["package"] / "tiny.safetensors"
    with pytest.raises(UserError, match="FACELAB_HOME"):
        assets.store()
    with pytest.raises(UserError, match=r"put it at \$FACELAB_HOME/sub/alpha\.pth"):
        assets.find("alpha")


def test_missing_files_say_what_where_from_and_where_to(places: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        assets.find("alpha")
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "sub/alpha.pth is missing",
        "the first model",
        "the project page",
        str(places["home"] / "sub/alpha.pth"),
    ):
        assert part in text
    with pytest.raises(UserError, match="Did you mean 'alpha'"):
        assets.find("alhpa")
    with pytest.raises(UserError, match="no file at"):
        assets.find("alpha", places["home"] / "nowhere.pth")
    with pytest.raises(UserError, match="install it again"):
        assets.find_bundled("tiny")
    assert assets.find_bundled("alpha") is None and assets.find_bundled("other") is None
    assert assets.commands_missing(assets.manifest().values()) == {"convert_checkpoint pigan": ["alpha"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("licence: MIT", "license: MIT"), "unknown key 'license'. Did you mean 'licence'"),
        (("kind: official", "kind: offical"), "Did you mean 'official'"),
        (("sub/alpha.pth", "../alpha.pth"), "expected a relative path"),
        (("    description: the first model\n", ""), "'description' is missing"),
        (("licence: MIT", "loader: pickle"), "loader is 'pickle'"),
        (("files:", "file:"), "expected an entry 'files'"),
        (("licence: MIT", "structure: {tensor: 3}"), "unknown key 'tensor'. Did you mean 'tensors'"),
    ],
)
def test_mistakes_in_a_manifest_are_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(_MANIFEST.replace(*change))
    with pytest.raises(UserError, match=re.escape(words)):
        assets.manifest(path)
