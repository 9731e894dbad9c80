"""The command killed in each stage, and on a disk that is full."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own_data import arguments, contents
from own_triples import own_triples, write_triples
from processes import REPOSITORY, clean_environment
from scripted_server import ScriptedServer, teacher

from soundmind.make_data import main
from soundmind.making.stages import STAGE_NAMES

SPLITS = ["--split", "train=0.5", "dev=0.25", "test=0.25"]


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(teacher) as running:
        yield running


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def moments(output: Path, running: ScriptedServer) -> dict[str, Callable[[], bool]]:
    """When each stage is at work."""
    work = output / "work"
    return {
        "triples": lambda: (work / "lock").exists(),
        "words": lambda: (work / "triples.jsonl").exists(),
        "reasoning": lambda: lines_in(work / "teacher.jsonl") > 12,
        "speech": lambda: lines_in(work / "clips.jsonl") > 5,
        "check": lambda: lines_in(work / "heard.jsonl") > 3,
        "publish": lambda: (work / "publish.jsonl").exists(),
    }


EARS = """
import json, pathlib, sys
clip = pathlib.Path(sys.argv[1])
for line in (clip.parents[2] / "speech.jsonl").read_text().splitlines():
    row = json.loads(line)
    for part in ("question", "answer"):
        if row[f"{part}_clip"].endswith(clip.name):
            print(row[f"spoken_{part}"])
"""


def test_a_kill_in_each_stage_changes_nothing_and_nothing_answered_is_asked_again(
    tmp_path: Path,
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(16))
    (tmp_path / "ears.py").write_text(EARS)
    ears = f"{shlex.quote(sys.executable)} {tmp_path / 'ears.py'} {{audio}}"
    more = [*SPLITS, "--concurrency", "4", "--recogniser-command", ears]
    with ScriptedServer(teacher, seconds=0.05) as running:

        def start(output: Path) -> subprocess.Popen[bytes]:
            options = arguments(output, source, running.url, *more)
            return subprocess.Popen(
                [sys.executable, "-m", "soundmind.make_data", *options],
                cwd=REPOSITORY,
                env=clean_environment(),
                stdout=subprocess.DEVNULL,
            )

        assert start(tmp_path / "whole").wait() == 0
        asked_whole = len(running.bodies)
        running.bodies.clear()
        running.headers.clear()
        output = tmp_path / "killed"
        for stage, is_at_work in moments(output, running).items():
            process = start(output)
            while not is_at_work():
                assert process.poll() is None, f"ended before it was killed in {stage}"
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            if stage == "reasoning":
                kept = {
                    entry["key"]
                    for entry in map(json.loads, whole_lines(output / "work/teacher.jsonl"))
                    if entry["answer"]
                }
                time.sleep(0.2)  # what was under way has arrived
                asked = len(running.headers)
        assert start(output).wait() == 0
        again = [headers["Idempotency-Key"] for headers in running.headers[asked:]]
        assert kept and not kept & set(again)
        assert len(running.bodies) <= asked_whole + 4  # those under way when it was killed
    assert contents(output) == contents(tmp_path / "whole")
    report = json.loads((output / "report.json").read_text())
    asked_twice = len(running.bodies) - len({h["Idempotency-Key"] for h in running.headers})
    lost = report["stages"]["reasoning"]["spent"]["lost"]
    assert (
        asked_twice <= lost <= 4
    )  # noted before it is sent: nothing that may be paid is forgotten


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n")[:-1] if line]


def test_a_disk_that_is_full_ends_in_one_line_and_the_next_run_goes_on(
    server: ScriptedServer, tmp_path: Path
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(4))
    options = arguments(tmp_path / "set", source, server.url, "--questions-only")
    assert main([*options, "--stages", "triples", "words", "reasoning"]) == 0
    command = [sys.executable, "-m", "soundmind.make_data", *options, "--stages", *STAGE_NAMES[3:]]

    def no_file_above_100_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    keys: dict[str, Any] = {"cwd": REPOSITORY, "env": clean_environment(), "text": True}
    keys["capture_output"] = True
    result = subprocess.run(command, preexec_fn=no_file_above_100_kb, **keys)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "File too large" in result.stderr
    assert list((tmp_path / "set").rglob("*.wav")) == []
    assert subprocess.run(command, **keys).returncode == 0
