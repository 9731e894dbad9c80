from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soundmind import practice, preprocess
from soundmind.system import files
from soundmind.system.journal import Journal


def test_a_file_is_replaced_in_one_move_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]


def test_two_writers_never_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second, longer")
    assert path.read_text() in ("first", "second, longer")


def test_a_long_name_has_a_temporary_one_that_the_disk_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    files.write_text(path, "whole")
    assert path.read_text() == "whole"


def test_files_and_folders_have_the_modes_that_the_user_asks_for(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        files.write_text(tmp_path / "x", "x")
        files.replace_folder(tmp_path / "folder", lambda fresh: files.write_text(fresh / "y", "y"))
    finally:
        os.umask(old)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "x", tmp_path / "folder")}
    assert list(modes.values()) == [0o644, 0o755]


def test_a_second_holder_of_a_lock_is_told_of_the_first(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "lock", tmp_path),
        pytest.raises(files.BusyError, match="another run is writing"),
        files.locked(tmp_path / "lock"),
    ):
        pass
    with files.locked(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_ends_commands_in_words(
    code: int,
    tmp_path: Path,
    make_github: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    root = make_github({"test": 1})
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError) as caught:
        Journal(tmp_path / "journal")
    assert caught.value.filename == str(tmp_path / "journal")
    commands: list[tuple[Any, list[str]]] = [
        (preprocess.main, ["--mode", "audio", "--data-dir", str(root), "--splits", "test"]),
        (practice.main, ["--output", str(tmp_path / "practice"), "--workers", "1"]),
    ]
    for main, arguments in commands:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "lock" in said and os.strerror(code) in said and "Traceback" not in said


def test_a_folder_of_other_data_is_not_replaced_by_the_practice_set(
    make_github: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"train": 2})
    assert practice.main(["--output", str(root), "--train", "2", "--workers", "1"]) == 2
    assert "is no practice set" in capsys.readouterr().err
    assert len(list((root / "train").iterdir())) == 2
