"""What is written appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinoatten3d.files import sha256, whole_folder, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(TypeError):
        write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_holds_null_where_there_was_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), (float("inf"), 1.5)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [None, 1.5]]}


def test_a_folder_appears_when_it_is_finished_and_not_before(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "a").read_text() == "1"

    def interrupted() -> None:
        with whole_folder(tmp_path / "other") as folder:
            (folder / "a").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_of_two_at_once_the_first_stays(tmp_path: Path) -> None:
    def finish(text: str, *, keep_existing: bool) -> None:
        with whole_folder(tmp_path / "run", keep_existing=keep_existing) as folder:
            (folder / "a").write_text(text)

    finish("first", keep_existing=False)
    with pytest.raises(OSError, match="run"):
        finish("second", keep_existing=False)
    finish("third", keep_existing=True)
    assert (tmp_path / "run" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_has_the_hash_of_all_that_is_in_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "1.dcm").write_bytes(b"one")
        (tmp_path / name / "2.dcm").write_bytes(b"two")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    (tmp_path / "b" / "2.dcm").write_bytes(b"three")
    assert sha256(tmp_path / "a") != sha256(tmp_path / "b")


def test_a_folder_that_another_process_made_meanwhile_stays_and_is_named(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "run") as folder:
            (folder / "mine").touch()
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "theirs").touch()

    with pytest.raises(FileExistsError, match="another process made this folder meanwhile"):
        write()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "theirs"]
