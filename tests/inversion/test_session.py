# SPDX-License-Identifier: Apache-2.0
"""Folders of inverted photos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facelab.errors import UserError
from facelab.inversion.session import SETTINGS, STATE, Session, digest

STATE_OF = {"step": torch.tensor([3]), "value/code/z": torch.randn(1, 4), "best_loss": torch.tensor([torch.inf])}


def test_settings_and_state_come_back(tmp_path: Path) -> None:
    session = Session(tmp_path / "deep" / "me")
    assert not session.begun and session.read_state() is None
    settings = {"photo": "me.jpg", "options": {"steps": 5, "lr": 0.05, "tune_parts": "", "noise": False}}
    session.begin(settings)
    assert session.begun and session.settings() == settings
    session.save_state(STATE_OF)
    again = session.read_state()
    assert again is not None and all(torch.equal(value, again[name]) for name, value in STATE_OF.items())
    session.save_losses([{"step": 0, "total": 1.5}, {"step": 10, "total": 0.5}])
    (session / "losses.jsonl").open("a").write('{"step": 2')  # cut by a crash of somebody else's editor
    assert session.losses(10) == [{"step": 0, "total": 1.5}] and len(session.losses(11)) == 2
    assert [p.name for p in session.folder.iterdir() if p.name.startswith(".")] == []


def test_other_options_are_refused(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin({"photo": "a.jpg", "options": {"steps": 5, "mask_loss": "mse"}})
    session.expect({"photo": "a.jpg", "options": {"steps": 5, "mask_loss": "mse"}}, ("photo", "options"))
    with pytest.raises(UserError, match="begun with another mask-loss: expected mse, got cross_entropy; give the same"):
        session.expect({"photo": "a.jpg", "options": {"steps": 5, "mask_loss": "cross_entropy"}}, ("photo", "options"))
    with pytest.raises(UserError, match="begun with another photo: expected a.jpg, got b.jpg"):
        session.expect({"photo": "b.jpg", "options": {}}, ("photo", "options"))


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin({"photo": "a.jpg"})
    session.save_state(STATE_OF)
    whole = (session / STATE).read_bytes()
    for broken in (whole[:40], b"", b"\x00" * 200):
        (session / STATE).write_bytes(broken)
        with pytest.raises(
            UserError, match="state.safetensors is damaged .*; remove it to begin the photo anew"
        ) as info:
            session.read_state()
        assert "\n" not in str(info.value)
    session.save_state({"value/code/z": torch.zeros(1)})
    with pytest.raises(UserError, match="is not the state of an inversion"):
        session.read_state()
    for text in ("format: other\n", "[1, 2]\n", "a: b: c\n"):
        (session / SETTINGS).write_text(text)
        with pytest.raises(UserError, match=SETTINGS):
            session.settings()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "me").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        Session(tmp_path / "me" / "deeper").begin({})


def test_digests() -> None:
    state = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64)}
    assert digest(state) == digest(dict(reversed(state.items())))
    others = [
        {**state, "b": torch.ones(2) * 2},
        {**state, "b": torch.ones(2).half()},
        {"c": state["b"], "a": state["a"]},
    ]
    assert len({digest(state), *map(digest, others)}) == 4
