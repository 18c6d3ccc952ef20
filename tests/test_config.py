# SPDX-License-Identifier: Apache-2.0
"""Typed configurations: order, stages, saving, and one clear line for each thing a user can get wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facelab import config as cfg
from facelab.errors import UserError
from facelab.methods import METHODS, load_config_type
from facelab.yaml_files import dump_yaml, parse_yaml


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True, kw_only=True)
class Render:
    near: float = 0.88
    samples: int = 24
    fov: tuple[float, float] = (10.0, 14.0)
    grid: Literal["corners", "off"] = "corners"
    clip: float | None = None
    fill: float | str = "black"

    def __post_init__(self) -> None:
        if self.near <= 0:
            raise ValueError(f"near must be positive, got {self.near}")


@dataclass(frozen=True, kw_only=True)
class Train:
    batch_size: int = 4
    lr: float = 2e-4
    fp16: bool = False
    name: str = "run"
    folder: Path = Path("runs")
    sizes: list[int] = field(default_factory=lambda: [32, 64])
    weights: dict[str, float] = field(default_factory=dict)
    colour: Colour = Colour.RED


@dataclass(frozen=True, kw_only=True)
class Settings:
    render: Render = field(default_factory=Render)
    train: Train = field(default_factory=Train)
    refine: Optional[Render] = None  # noqa: UP045 (both spellings must work)
    extra: list[Render] = field(default_factory=list)
    seed: int = 0


@dataclass(frozen=True)
class Required:
    path: str
    seed: int = 0


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


STAGES = """
train: {lr: 6e-5}
stages:
  - {from_step: 0, render.samples: 12, train: {batch_size: 24}}
  - {from_step: 20000, train.batch_size: 48, render: {near: 0.9}, train.weights.r1: 2}
  - {from_step: 50000, refine.near: 0.5, train.sizes: [128]}
"""


def test_order_is_defaults_base_file_set(write) -> None:
    write("render: {near: 0.5, samples: 5}\ntrain: {lr: 1e-3}\nseed: 1", "low.yaml")
    write("base: ../low.yaml\nrender: {near: 0.6, samples: 6}", "sub/middle.yaml")
    top = write("base: sub/middle.yaml\nrender: {near: 0.7}", "top.yaml")
    config = cfg.load_config(Settings, [top], ["train.name=mine"])
    assert (config.render.near, config.render.samples, config.train.lr, config.seed) == (0.7, 6, 1e-3, 1)
    assert (config.train.name, config.train.batch_size) == ("mine", 4)
    second = write("render.near: 0.8", "second.yaml")
    assert cfg.load_config(Settings, [top, second]).render == Render(near=0.8, samples=6)


def test_result_is_the_frozen_dataclass(write) -> None:
    config = cfg.load_config(Settings, [write("")])
    assert config == Settings()
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=6e-5", "lr", 6e-5),
        ("train.lr=1", "lr", 1.0),
        ("train.batch_size=2e5", "batch_size", 200_000),
        ("train.batch_size=0017", "batch_size", 17),
        ("train.fp16=yes", "fp16", True),
        ("train.fp16=false", "fp16", False),
        ("train.name=6e-5", "name", "6e-5"),
        ("train.name=2024-01-01", "name", "2024-01-01"),
        ("train.name='a: b'", "name", "a: b"),
        ("train.name=a=b", "name", "a=b"),
        ("train.folder=/data/x: [y", "folder", Path("/data/x: [y")),
        ("train.sizes=[1, 2, 3]", "sizes", [1, 2, 3]),
        ("train.weights.r1=1e1", "weights", {"r1": 10.0}),
        ("train.colour=BLUE", "colour", Colour.BLUE),
    ],
)
def test_set_reads_values_by_their_declared_type(override: str, key: str, value: object) -> None:
    got = getattr(cfg.load_config(Settings, overrides=[override]).train, key)
    assert got == value and type(got) is type(value)


def test_unions_literals_tuples_and_optional_groups() -> None:
    config = cfg.load_config(
        Settings,
        overrides=["render.grid=off", "render.fov=[1, 2.5]", "render.clip=3", "render.fill=1", "refine.near=0.5"],
    )
    assert config.render == Render(grid="off", fov=(1.0, 2.5), clip=3.0, fill=1.0)
    assert config.refine == Render(near=0.5)
    assert cfg.load_config(Settings, overrides=["refine.near=0.5", "refine=null"]).refine is None
    assert cfg.load_config(Settings, overrides=["extra=[{near: 0.1}]"]).extra == [Render(near=0.1)]


def test_dicts_merge_and_lists_replace(write) -> None:
    file = write("train: {weights: {r1: 10, pose: 15}, sizes: [8]}")
    config = cfg.load_config(Settings, [file], ["train.weights.pose=1"])
    assert config.train.weights == {"r1": 10.0, "pose": 1.0} and config.train.sizes == [8]


BAD_SETS = [
    ("rendr.near=1", "--set rendr.near=1: unknown setting 'rendr'. Did you mean 'render'?"),
    ("render.nea=1", "--set render.nea=1: unknown setting 'render.nea'. Did you mean 'near'?"),
    ("near=1", "--set near=1: unknown setting 'near'. Did you mean 'render.near'?"),
    ("zzz=1", "unknown setting 'zzz'. Known here: render, train, refine, extra, seed"),
    ("train.lr=fast", "train.lr expects float, got 'fast' (str)"),
    ("train.lr=true", "train.lr expects float, got True (bool)"),
    ("train.lr=nan", "train.lr expects float, got 'nan' (str)"),
    ("train.lr=.nan", "train.lr expects float, got nan (float)"),
    ("train.lr=null", "train.lr expects float, got None (NoneType)"),
    ("train.lr=", "train.lr expects float, got '' (str)"),
    ("train.lr=???", "train.lr expects float, got '???' (str)"),
    ("train.batch_size=1.5", "train.batch_size expects int, got 1.5 (float)"),
    ("train.batch_size=[1]", "train.batch_size expects int, got [1] (list)"),
    ("train.fp16=maybe", "train.fp16 expects bool, got 'maybe' (str)"),
    ("train.sizes=[a]", "train.sizes expects list[int], got ['a'] (list)"),
    ("train.sizes=3", "train.sizes expects list[int], got 3 (int)"),
    ("train.weights.r1=big", "train.weights expects dict[str, float], got {'r1': 'big'} (dict)"),
    ("train.colour=GREEN", "train.colour expects one of RED, BLUE, got 'GREEN' (str)"),
    ("render.fov=[1,2,3]", "render.fov expects tuple[float, float], got [1, 2, 3] (list)"),
    ("render.grid=centre", "render.grid expects one of 'corners', 'off', got 'centre' (str)"),
    ("render.clip=x", "render.clip expects float or null, got 'x' (str)"),
    ("render=3", "render expects a mapping of near, samples"),
    ("render.near.far=3", "'render.near' is one value, it has no part 'far'"),
    ("render.near=-1", "near must be positive, got -1.0"),
    ("extra=[{near: 1}, {nere: 1}]", "unknown setting 'extra.1.nere'. Did you mean 'near'?"),
    ("train.name=${oc.env:HOME}", "'${...}' at 'train.name' is refused, it can read environment variables"),
    ("${x}=1", "'${...}' is refused"),
    ("render.near", "expected key=value"),
    ("=1", "expected key=value"),
    ("stages=[]", "stages belongs into a configuration file"),
    ("base=x.yaml", "base belongs into a configuration file"),
]


@pytest.mark.parametrize(("override", "message"), BAD_SETS)
def test_bad_set_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cfg.load_config(Settings, overrides=[override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--set {override}: ")


BAD_FILES = [
    ("rendr: {near: 1}", "unknown setting 'rendr'. Did you mean 'render'?"),
    ("render: {near: 1, nere: 2}", "unknown setting 'render.nere'. Did you mean 'near'?"),
    ("render.near: 1\nrender: {near: 2}", "render.near is set twice"),
    ("seed: 1\nseed: 2", "duplicate key 'seed' (line 2, column 1)"),
    ("render: {near: 1, near: 2}", "duplicate key 'near' (line 1, column 19)"),
    ("train: {name: 3}", "train.name expects str, got 3 (int); put it in quotes"),
    ("train: {folder: null}", "train.folder expects Path, got None (NoneType)"),
    ("render:", "render expects a mapping of near, samples"),
    ("- 1", "expected a mapping of settings, got list"),
    ("just words", "expected a mapping of settings, got str"),
    ("render: {near: 1", "not valid YAML: "),
    ("a: *b", "not valid YAML: aliases (*name) are not supported (line 1, column 4)"),
    ("? [a]\n: 1", "not valid YAML: a key is not a plain name"),
    ("a: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
    ("a: " + "[" * 20_000, "not valid YAML: "),
    ("train: {name: '${oc.env:HOME}'}", "'${...}' at 'train.name' is refused"),
    ("extra: [{near: '${x}'}]", "'${...}' at 'extra.0.near' is refused"),
    ("base: '${x}'", "'${...}' at 'base' is refused"),
    ("stages: [{from_step: 0, train.name: '${x}'}]", "'${...}' at 'stages.0.train.name' is refused"),
    ("base: none.yaml", "base none.yaml does not exist beside it"),
    ("base: [a, b]", "base expects the path of one YAML file, got ['a', 'b']"),
    ("base: run.yaml", "'base' goes round in a circle (run.yaml -> run.yaml)"),
    ("stages: 3", "stages expects a list of mappings"),
    ("stages: [3]", "stages expects a list of mappings"),
    ("stages: [{from_step: 5}]", "from_step in stages must start at 0 and increase from row to row, got [5]"),
    ("stages: [{from_step: 0}, {from_step: 0}]", "must start at 0 and increase from row to row, got [0, 0]"),
    ("stages: [{from_step: 0}, {from_step: 9}, {from_step: 5}]", "increase from row to row, got [0, 9, 5]"),
    ("stages: [{from_step: 0}, {from_kimg: 1}]", "needs from_step, or every row from_kimg, not a mixture"),
    ("stages: [{from_step: 0, from_kimg: 0}]", "not a mixture"),
    ("stages: [{from_step: 0}, {seed: 3}]", "every row of stages needs from_step"),
    ("stages: [{from_step: zero}]", "from_step in stages expects a number, got ['zero']"),
    ("stages: [{from_step: true}]", "from_step in stages expects a number"),
    ("stages: [{from_step: 0}, {from_step: 1.5}]", "from_step in stages expects whole numbers"),
    (
        "stages: [{from_step: 0}, {from_step: 5, train.lrr: 1}]",
        "stages[1]: unknown setting 'train.lrr'. Did you mean 'lr'?",
    ),
    ("stages: [{from_step: 0}, {from_step: 5, train: {lrr: 1}}]", "stages[1]: unknown setting 'train.lrr'."),
    ("stages: [{from_step: 0, train.lr: fast}]", "stages[0]: train.lr expects float, got 'fast' (str)"),
    ("stages: [{from_step: 0, base: x}]", "stages[0]: unknown setting 'base'."),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_file_is_one_line_that_names_it(write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(UserError) as caught:
        cfg.load_staged(Settings, [path])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml does not exist"):
        cfg.load_config(Settings, [tmp_path / "none.yaml"])
    with pytest.raises(UserError, match="cannot read the configuration file .*directory"):
        cfg.load_config(Settings, [tmp_path])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        cfg.load_config(Settings, [tmp_path / "bytes.yaml"])
    write("base: b.yaml", "a.yaml")
    write("base: a.yaml", "b.yaml")
    with pytest.raises(UserError, match=r"circle \(a.yaml -> b.yaml -> a.yaml\)"):
        cfg.load_config(Settings, [tmp_path / "a.yaml"])


def test_required_setting() -> None:
    assert cfg.load_config(Required, overrides=["path=x"]) == Required("x")
    with pytest.raises(UserError, match="path has no default; set it in the file or with --set path=VALUE"):
        cfg.load_config(Required, overrides=["seed=1"])


def test_stages(write) -> None:
    staged = cfg.load_staged(Settings, [write(STAGES)])
    assert staged.boundaries == (0, 20000, 50000) and staged.unit == "from_step"
    assert [staged.stage_index(s) for s in (0, 19999, 20000, 49999, 50000, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert staged.at(3) is staged.at(19999) and staged.at(0) is not staged.at(20000)
    assert [staged.at(s).train.batch_size for s in staged.boundaries] == [24, 48, 48]
    assert [staged.at(s).render.samples for s in staged.boundaries] == [12, 12, 12]
    assert [staged.at(s).render.near for s in staged.boundaries] == [0.88, 0.9, 0.9]
    assert {staged.at(s).train.lr for s in staged.boundaries} == {6e-5}
    assert staged.at(0).train.weights == {} and staged.at(50000).train.weights == {"r1": 2.0}
    assert staged.at(20000).refine is None and staged.at(50000).refine == Render(near=0.5)


def test_stages_by_images(write) -> None:
    staged = cfg.load_staged(Settings, [write("stages: [{from_kimg: 0}, {from_kimg: 2.5, seed: 1}]")])
    assert staged.boundaries == (0, 2500)
    assert [staged.at(10**6, images).seed for images in (0, 2499, 2500)] == [0, 0, 1]


def test_set_and_files_above_win_over_stage_rows(write) -> None:
    low = write(STAGES, "low.yaml")
    staged = cfg.load_staged(Settings, [low], ["train.batch_size=2"])
    assert [stage.train.batch_size for stage in staged.stages] == [2, 2, 2]
    above = cfg.load_staged(Settings, [write("base: low.yaml\ntrain.batch_size: 3")])
    assert [stage.train.batch_size for stage in above.stages] == [3, 3, 3] and above.boundaries == staged.boundaries
    dropped = cfg.load_staged(Settings, [write("base: low.yaml\nstages: []")])
    assert dropped.boundaries == (0,) and dropped.at(60000).train == Train(lr=6e-5)
    replaced = cfg.load_staged(Settings, [write("base: low.yaml\nstages: [{from_step: 0}, {from_step: 7, seed: 2}]")])
    assert replaced.boundaries == (0, 7) and replaced.at(7).train.batch_size == 4


def test_every_text_file_of_extra_keys_is_accepted(write) -> None:
    assert cfg.load_config(Settings, [write("description: a text\naliases: [CelebA]\nseed: 1")]).seed == 1


def test_save_resolved_loads_back_equal(write, tmp_path: Path) -> None:
    overrides = [
        "train.name=off",
        "train.folder=/tmp/x y",
        "train.colour=BLUE",
        "extra=[{near: 0.1}]",
        "render.clip=1e-9",
    ]
    for staged in (cfg.load_staged(Settings, [write(STAGES)], overrides), cfg.load_staged(Settings)):
        cfg.save_resolved(staged, tmp_path / "out" / "config.yaml")
        again = cfg.load_staged(Settings, [tmp_path / "out" / "config.yaml"])
        assert again == staged and cfg.diff(staged, again) == []
        assert cfg.from_dict(Settings, cfg.to_dict(staged)) == staged
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.yaml"]
    cfg.save_resolved(Settings(seed=5), tmp_path / "plain.yaml")
    assert cfg.load_config(Settings, [tmp_path / "plain.yaml"]) == Settings(seed=5)


def test_save_resolved_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        cfg.save_resolved(Settings(), tmp_path / "file" / "config.yaml")


def test_diff_names_keys_and_stages(write) -> None:
    assert cfg.diff(Settings(), Settings(render=Render(near=0.5), seed=2)) == [
        ("render.near", 0.88, 0.5),
        ("seed", 0, 2),
    ]
    one = cfg.load_staged(Settings, [write(STAGES)])
    two = cfg.load_staged(Settings, [write(STAGES)], ["train.name=other"])
    assert cfg.diff(one, two) == [("train.name", "run", "other")]
    three = cfg.load_staged(Settings, [write(STAGES.replace("48", "40"))])
    assert ("stages[1].train.batch_size", 48, 40) in cfg.diff(one, three)
    moved = cfg.load_staged(Settings, [write(STAGES.replace("20000", "30000"))])
    assert cfg.diff(one, moved) == [("stages", *([{"from_step": s} for s in x.boundaries] for x in (one, moved)))]


def test_curricula(monkeypatch: pytest.MonkeyPatch, write, tmp_path: Path) -> None:
    monkeypatch.setattr(cfg, "configs_folder", lambda: tmp_path)
    big = write("description: 128 px\naliases: [CelebA_double_semantic]\nseed: 1", "fenerf/celebamask_hq_128.yaml")
    small = write("base: celebamask_hq_128.yaml", "fenerf/debug.yaml")
    write("seed: 2", "fenerf/_part.yaml")
    assert cfg.find_curricula("fenerf") == {"celebamask_hq_128": big, "debug": small}
    assert cfg.list_curricula("fenerf")[0] == cfg.Curriculum(
        "celebamask_hq_128", big, "128 px", ("CelebA_double_semantic",)
    )
    for name in ("celebamask_hq_128", "CelebA_double_semantic", str(big), big):
        assert cfg.resolve_curriculum("fenerf", name) == big
    with pytest.raises(UserError, match="no curriculum 'celebmask_128'. Did you mean 'celebamask_hq_128'"):
        cfg.resolve_curriculum("fenerf", "celebmask_128")
    with pytest.raises(UserError, match="curriculum file x/y.yaml does not exist"):
        cfg.resolve_curriculum("fenerf", "x/y.yaml")
    assert cfg.find_curricula("nothing") == {}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_shipped_curricula_load_and_round_trip(method: str, checkout: Path, tmp_path: Path) -> None:
    assert cfg.configs_folder() == checkout / "configs"
    curricula = cfg.list_curricula(method)
    names = [name for c in curricula for name in (c.name, *c.aliases)]
    assert len(names) == len(set(names)), "a name stands for two curricula"
    assert "debug" in names and all(c.description for c in curricula)
    for curriculum in curricula:
        staged = cfg.load_staged(load_config_type(method), [curriculum.path])
        cfg.save_resolved(staged, tmp_path / "config.yaml")
        assert cfg.load_staged(load_config_type(method), [tmp_path / "config.yaml"]) == staged


def test_import_is_light() -> None:
    code = "import sys, facelab.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False),
    st.text(max_size=8), st.sampled_from(["off", "yes", "1e5", "1_0", "0o7", "~", "", "null", "2024-01-01", "1:30", "<<", "="]),
)  # fmt: skip
KEYS = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@example(["\x85", "a\u2028b", "\u2029", {"x": "\x85 y"}])
@given(st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3), max_leaves=8))
def test_yaml_reads_back_what_it_wrote(data: object) -> None:
    again = parse_yaml(dump_yaml(data))
    assert again == data and type(again) is type(data)
