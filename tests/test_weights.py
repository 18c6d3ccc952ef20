# SPDX-License-Identifier: Apache-2.0
"""The weights command: recognise, import, verify and fetch, all on files made here and a server on loopback."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import io
import os
import re
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from facelab import assets, weights
from facelab.checkpoints import recognise
from facelab.checkpoints.format import export_model
from facelab.cli.weights import weights as command
from facelab.errors import UserError


def _pigan_shapes() -> dict[str, tuple[int, ...]]:
    """The 30 tensors of the released pi-GAN generators, in order (8 FiLM layers of 256, latent of 256)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inner), (out,)

    for i in range(8):
        linear(f"siren.network.{i}.layer", 256, 256 if i else 3)
    linear("siren.final_layer", 1, 256)
    linear("siren.color_layer_sine.layer", 256, 259)
    linear("siren.color_layer_linear.0", 3, 256)
    for i in (0, 2, 4):
        linear(f"siren.mapping_network.network.{i}", 256, 256)
    linear("siren.mapping_network.network.6", 2 * 256 * 9, 256)
    return shapes


def _small(shape: tuple[int, ...]) -> Tensor:
    """A tensor of any size that takes four bytes in a file."""
    return torch.zeros(1).expand(shape)


def _module(shapes: dict[str, tuple[int, ...]], field_class: str) -> nn.Module:
    """A pickled module whose classes claim to be the original's."""
    root = type("ImplicitGenerator3d", (nn.Module,), {"__module__": "generators.generators"})()
    field = type(field_class, (nn.Module,), {"__module__": "siren.siren"})()
    for module in (type(root), type(field)):
        sys.modules[module.__module__].__dict__[module.__name__] = module
    for name, shape in shapes.items():
        owner = field
        *path, last = name.removeprefix("siren.").split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(last, nn.Parameter(_small(shape)))
    root.siren, root.step = field, 200000
    return root


@pytest.fixture
def original_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("generators", "generators.generators", "siren", "siren.siren"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.usefixtures("original_classes")
def test_released_generators_are_known_by_their_tensors(tmp_path: Path) -> None:
    """Exact shapes and the class tell the data set where the class does; averages by shapes and decay."""
    path = tmp_path / "some name.bin"
    torch.save(_module(_pigan_shapes(), "TALLSIREN"), path)
    found = recognise.describe(path)
    assert [(m.asset.name, m.certainty) for m in found.best] == [("pigan_carla_generator", "structure")]
    assert found.methods == ("pigan",) and "30 tensors" in found.text and "known by its tensors" in found.text
    torch.save(_module(_pigan_shapes(), "SPATIALSIRENBASELINE"), path)
    assert {m.asset.name for m in recognise.describe(path).best} == {"pigan_celeba_generator", "pigan_cats_generator"}
    wider = {k: tuple(2 * n if n == 256 else n for n in s) for k, s in _pigan_shapes().items()}
    torch.save(_module(wider, "SPATIALSIRENBASELINE"), path)
    assert {m.certainty for m in recognise.describe(path).best} == {"kind"}
    shadow = [_small(shape) for shape in _pigan_shapes().values()]
    torch.save({"decay": 0.9999, "num_updates": 5, "shadow_params": shadow, "collected_params": None}, path)
    assert {m.asset.file.split("/")[-1] for m in recognise.describe(path).best} == {"ema2.pth"}
    torch.save({"decay": 0.999, "num_updates": 5, "shadow_params": shadow[:-1]}, path)
    assert recognise.describe(path).matches == () and "not a file of the manifest" in recognise.describe(path).text


@pytest.mark.usefixtures("original_classes")
def test_import_recognises_copies_and_records(tmp_path: Path, home: Path) -> None:
    downloads = tmp_path / "downloads"
    (downloads / "Cats").mkdir(parents=True)
    torch.save(_module(_pigan_shapes(), "TALLSIREN"), downloads / "model (1).pth")
    torch.save(_module(_pigan_shapes(), "SPATIALSIRENBASELINE"), downloads / "Cats" / "generator.pth")
    torch.save(_module(_pigan_shapes(), "SPATIALSIRENBASELINE"), downloads / "which.pth")
    torch.save({"w": torch.ones(2)}, downloads / "other.pt")
    (downloads / "evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    (downloads / "notes.txt").write_text("not a checkpoint")
    results = {r.source.name: r for r in weights.import_folder(downloads)}
    assert set(results) == {"model (1).pth", "generator.pth", "which.pth", "other.pt", "evil.pkl"}
    assert results["model (1).pth"].target == home / "pigan/carla/generator.pth"
    assert results["generator.pth"].target == home / "pigan/cats/generator.pth"
    assert results["which.pth"].target is None and "pigan_celeba_generator ('celeba')" in results["which.pth"].detail
    assert results["other.pt"].target is None and "'os.system'" in results["evil.pkl"].detail
    assert (home / "pigan/carla/generator.pth").read_bytes() == (downloads / "model (1).pth").read_bytes()
    checks = {c.asset.name: c for c in weights.verify() if c.asset.kind != "bundled"}
    assert set(checks) == {"pigan_carla_generator", "pigan_cats_generator"} and all(c.ok for c in checks.values())
    again = {r.source.name: r.detail for r in weights.import_folder(downloads)}
    assert "already there" in again["model (1).pth"]
    data = bytearray((home / "pigan/carla/generator.pth").read_bytes())
    data[-30] ^= 1
    (home / "pigan/carla/generator.pth").write_bytes(bytes(data))
    (check,) = weights.verify(["pigan_carla_generator"])
    assert check.ok is False and "import record" in check.detail
    assert "another file is at" in {r.source.name: r.detail for r in weights.import_folder(downloads)}["model (1).pth"]


@pytest.mark.usefixtures("original_classes", "home")
def test_import_can_link(tmp_path: Path) -> None:
    torch.save(_module(_pigan_shapes(), "TALLSIREN"), tmp_path / "a.pth")
    (result,) = weights.import_folder(tmp_path / "a.pth", link=True)
    assert result.target is not None and result.target.is_symlink() and result.target.resolve() == tmp_path / "a.pth"


def test_places_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no folder at"):
        weights.import_folder(tmp_path / "nowhere")
    entry = assets.Asset("x", "official", "x.pth", "a model", structure=assets.Structure(has={"w": (2,)}))
    monkeypatch.setattr(assets, "manifest", lambda path=None: {"x": entry})
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        weights.import_folder(tmp_path / "a.pth")
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "home"))

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.shutil, "copyfile", full)
    with pytest.raises(UserError, match="the disk is full"):
        weights.import_folder(tmp_path / "a.pth")
    assert list((tmp_path / "home").iterdir()) == []


def test_persistent_attributes_and_checksums_decide(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of equal tensors are told apart by attributes; a known checksum outweighs structure."""
    stream = io.BytesIO()
    torch.save({"g_ema": {"w": torch.ones(2, 3), "noise": torch.ones(1)}}, stream)
    (tmp_path / "model.pt").write_bytes(stream.getvalue())
    shapes = {"w": (2, 3), "noise": (1,)}
    structure = assets.Structure(
        group="g_ema", digest=recognise.digest_of(shapes, ["noise"]), optional=("noise",), has={"w": (2, "*")}
    )
    first = assets.Asset("first", "official", "1.pt", "one", sha256="0" * 64, structure=structure)
    second = assets.Asset(
        "second", "official", "2.pt", "two", md5=hashlib.md5(stream.getvalue()).hexdigest(), structure=structure
    )
    found = recognise.describe(tmp_path / "model.pt", [first, second])
    assert [(m.asset.name, m.certainty) for m in found.matches] == [("second", "checksum")]
    found = recognise.describe(tmp_path / "model.pt", [first])
    assert [m.certainty for m in found.matches] == ["structure"]
    monkeypatch.setattr(assets, "manifest", lambda path=None: {"first": first})
    (result,) = weights.import_folder(tmp_path / "model.pt")
    assert result.target is None and "checksum is not that of the official file" in result.detail
    home.mkdir(exist_ok=True)
    (home / "1.pt").write_bytes(stream.getvalue())
    (check,) = weights.verify()
    assert check.ok is False and "expected sha256 000" in check.detail
    record = recognise.Contents(
        "pickle",
        {"": shapes},
        records={
            "": recognise.LegacyObject(
                "a.B", {"_modules": {}, "_parameters": {}, "res": 64, "kw": {"pivot": [0, 0, 0.2]}}
            )
        },
    )
    plain = assets.Structure(
        digest=recognise.digest_of(shapes), attributes={"res": 64, "kw.pivot": (0, 0, 0.2), "unknown": 1}
    )
    other = assets.Structure(digest=recognise.digest_of(shapes), attributes={"res": 128})
    assert recognise._match(assets.Asset("a", "official", "a", "", structure=plain), record).confirmed == 2
    assert recognise._match(assets.Asset("b", "official", "b", "", structure=other), record) is None


def test_our_own_files_are_described(tmp_path: Path) -> None:
    path = export_model(tmp_path / "m.safetensors", {"ema": {"w": torch.ones(2)}}, {"method": "fenerf", "step": 7})
    found = recognise.describe(path)
    assert found.methods == ("fenerf",) and found.matches == () and "step 7" in found.text
    with pytest.raises(UserError, match="no checkpoint at"):
        recognise.describe(tmp_path / "nothing")


def test_matlab_files_are_known_by_their_variables(tmp_path: Path) -> None:
    from scipy.io import savemat

    savemat(tmp_path / "a.mat", {"lm": torch.zeros(68, 3).numpy()})
    assert [m.asset.name for m in recognise.describe(tmp_path / "a.mat").best] == ["lm3d_standard"]
    (tmp_path / "b.mat").write_bytes((tmp_path / "a.mat").read_bytes()[:150])
    with pytest.raises(UserError, match=r"b\.mat"):
        recognise.describe(tmp_path / "b.mat")


# Fetching

DATA = bytes(range(256)) * 4096  # 1 MiB


class _Server(http.server.ThreadingHTTPServer):
    """Serves DATA under several kinds of behaviour, by path, and notes the Range headers it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges: list[str | None] = []
        self.tag, self.drops = '"one"', 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        server, start = self.server, 0
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if self.path == "/gone":
            self.send_error(404)
            return
        usable = asked and self.path != "/norange" and self.headers.get("If-Range", server.tag) == server.tag
        if usable:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(DATA):
                self.send_error(416)
                return
        self.send_response(206 if usable else 200)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(DATA) - start))
        self.send_header("ETag", server.tag)
        if usable:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        body = bytes(len(DATA)) if self.path == "/wrong" else DATA[start:]
        if server.drops > 0:
            server.drops -= 1
            body = body[:300_000]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> OrderedDict[str, assets.Asset]:
    entries: OrderedDict[str, assets.Asset] = OrderedDict()
    monkeypatch.setattr(assets, "manifest", lambda path=None: entries)
    return entries


def _asset(*urls: str, sha256: str | None = None) -> assets.Asset:
    known = sha256 or hashlib.sha256(DATA).hexdigest()
    return assets.Asset(
        "net", "auxiliary", "sub/net.pth", "a net", urls=urls, sha256=known, size=len(DATA), where="a page"
    )


def test_fetch_whole(home: Path, server: _Server, entry: dict[str, assets.Asset]) -> None:
    entry["net"] = _asset(server.url("net"))
    path = weights.fetch("net", progress=False)
    assert path == home / "sub/net.pth" and path.read_bytes() == DATA
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.pth"] and server.ranges == [None]
    assert weights.verify()[0].ok
    with pytest.raises(UserError, match="already there"):
        weights.fetch("net", progress=False)


def test_fetch_goes_on_where_it_broke_off(home: Path, server: _Server, entry: dict[str, assets.Asset]) -> None:
    entry["net"] = _asset(server.url("net"))
    server.drops = 2
    assert weights.fetch("net", progress=False).read_bytes() == DATA
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_fetch_goes_on_in_a_later_call_and_not_with_a_changed_file(
    home: Path, server: _Server, entry: dict[str, assets.Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry["net"] = _asset(server.url("net"))
    server.drops = 1
    monkeypatch.setattr(weights, "_ATTEMPTS", 0)  # gives up at once: as if the machine went away

    def once(*arguments: object) -> None:
        weights._transfer(*arguments)
        raise weights._TransferError("switched off")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_download", once)
        with pytest.raises(UserError, match="300000 bytes are kept"):
            weights.fetch("net", progress=False)
    monkeypatch.setattr(weights, "_ATTEMPTS", 5)
    server.tag = '"two"'  # the server's file changed meanwhile: starting anew is the only right thing
    assert weights.fetch("net", progress=False).read_bytes() == DATA
    assert server.ranges == [None, "bytes=300000-"]


def test_fetch_from_a_server_without_ranges(home: Path, server: _Server, entry: dict[str, assets.Asset]) -> None:
    entry["net"] = _asset(server.url("norange"))
    server.drops = 1
    assert weights.fetch("net", progress=False).read_bytes() == DATA


def test_mirrors_and_what_went_wrong_with_each(home: Path, server: _Server, entry: dict[str, assets.Asset]) -> None:
    bad = [server.url("gone"), server.url("page"), server.url("wrong"), "file:///etc/hostname", "http://127.0.0.1:9/x"]
    entry["net"] = _asset(*bad, server.url("net"))
    assert weights.fetch("net", progress=False).read_bytes() == DATA
    (home / "sub/net.pth").unlink()
    entry["net"] = _asset(*bad)
    with pytest.raises(UserError) as caught:
        weights.fetch("net", progress=False)
    text = str(caught.value)
    for words in ("says 404", "a web page", "expected sha256", "not an http", "refused"):
        assert words in text
    assert "\n" not in text and list((home / "sub").iterdir()) == []


def test_fetch_without_an_address_and_full_disk(
    home: Path, server: _Server, entry: dict[str, assets.Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry["net"] = _asset()
    with pytest.raises(UserError, match=r"no download address is known; get it \(a page\)"):
        weights.fetch("net")
    assert weights.fetch("net", url=server.url("net"), progress=False).read_bytes() == DATA
    (home / "sub/net.pth").unlink()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_remember_tag", full)
    with pytest.raises(UserError, match=r"sub/net\.pth: the disk is full"):
        weights.fetch("net", url=server.url("net"), progress=False)
    assert not (home / "sub/net.pth").exists()


def test_the_command(home: Path, server: _Server, entry: dict[str, assets.Asset]) -> None:
    entry["net"] = _asset(server.url("net"))
    run = CliRunner().invoke
    assert "no" in run(command, ["list", "--missing"]).output.splitlines()[2]
    assert "sha256    " + hashlib.sha256(DATA).hexdigest() in run(command, ["list", "net"]).output
    fetched = run(command, ["fetch", "net"])
    assert fetched.exit_code == 0 and str(home / "sub/net.pth") in fetched.output
    assert run(command, ["verify"]).exit_code == 0
    (home / "sub/net.pth").write_bytes(b"cut")
    broken = run(command, ["verify"])
    assert broken.exit_code == 1 and "expected 1048576 bytes, got 3" in broken.output
    assert run(command, ["list", "nte"]).exit_code == 2
    assert "0 of 0 files" in run(command, ["import", str(home)]).output


@pytest.mark.skipif(
    "FACELAB_REAL_DATA" not in os.environ, reason="FACELAB_REAL_DATA is not set: no released file to try"
)
def test_a_released_file_is_known_by_checksum_and_by_structure(tmp_path: Path, home: Path) -> None:
    """The DPR network: the checksum of the manifest is its own, and so is the digest of its tensors."""
    source = Path(os.environ["FACELAB_REAL_DATA"]) / "weights" / "dpr_trained_model_03.t7"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    assert [(m.asset.name, m.certainty) for m in recognise.describe(source).best] == [("dpr", "checksum")]
    found = recognise.describe(source, [dataclasses.replace(assets.get("dpr"), sha256=None)])
    assert [(m.asset.name, m.certainty) for m in found.best] == [("dpr", "structure")]
    (result,) = weights.import_folder(source)
    assert result.target == home / "trained_model_03.t7" and weights.verify(["dpr"])[0].ok
