"""One wrapper for every command: what a person can mend ends in two lines, the rest in a traceback."""

from __future__ import annotations

import ast
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import REPOSITORY

from soundmind.system.errors import UserError, command


class Mended(UserError):
    """An error with an exit status of its own."""

    status = 1


def raising(error: BaseException) -> int:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main([])


def test_a_user_s_error_is_one_line_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("row 3 of x.parquet has no clip; make it again")) == 2
    assert raising(Mended("a node left; start another")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: row 3 of x.parquet has no clip; make it again",
        "error: a node left; start another",
    ]


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.ENOSPC, errno.ENOLCK, errno.ENAMETOOLONG, errno.EROFS]
)
def test_an_error_of_the_file_system_names_the_file_and_what_to_do(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(OSError(number, os.strerror(number), "/data/x.json")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: /data/x.json: {os.strerror(number)}"
    assert "look at this path" not in second


def test_a_file_that_is_not_there_ends_in_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        (tmp_path / "nowhere").read_text()
        return 0

    assert main() == 2
    assert "Traceback" not in (printed := capsys.readouterr().err)
    assert str(tmp_path / "nowhere") in printed and len(printed.splitlines()) == 2


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())
    with pytest.raises(OSError, match="no file"):
        raising(OSError("no file belongs to this one"))


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_keeps_its_status_and_its_name() -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        """What it does."""
        return len(argv or ())

    assert main(["a", "b", "c"]) == 3
    assert main.__doc__ == "What it does."


def test_every_command_is_wrapped() -> None:
    """A door is a module of the package's root that has a `main`."""
    bare = []
    doors = sorted((REPOSITORY / "soundmind").glob("*.py"))
    for path in doors:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                names = [getattr(item, "id", "") for item in node.decorator_list]
                bare += [] if "command" in names else [path.name]
    assert bare == []
    assert sum("@command" in path.read_text(encoding="utf-8") for path in doors) >= 12
