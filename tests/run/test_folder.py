"""Run folders: which one a launch gets, and what is remembered over a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from processes import REPOSITORY

from soundmind.model import checkpoints
from soundmind.run.folder import RunFolder, RunFolderError, config_fingerprint
from soundmind.system.files import write_json
from soundmind.system.machine import git_commit, versions


def test_a_first_launch_gets_a_new_folder(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", "abc")
    assert folder.path.parent == tmp_path / "tiny"
    assert not folder.resumed


def test_an_unfinished_run_of_the_same_configuration_is_continued(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    first._lock.close()  # the process that held it is gone
    again = RunFolder.open(tmp_path, "tiny", "abc")
    assert again.path == first.path
    assert again.resumed


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    first._lock.close()
    write_json(first.path / "summary.json", {})
    assert RunFolder.open(tmp_path, "tiny", "abc").path != first.path


def test_another_configuration_starts_its_own_run(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    first._lock.close()
    assert RunFolder.open(tmp_path, "tiny", "xyz").path != first.path


def test_a_run_that_is_still_going_is_not_joined(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    assert RunFolder.open(tmp_path, "tiny", "abc").path != first.path


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from soundmind.run.folder import RunFolder; "
        "f = RunFolder.open(Path(sys.argv[1]), 'tiny', 'abc'); print(f.path, flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    assert RunFolder.open(tmp_path, "tiny", "abc").path == path


def test_resuming_a_named_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    first._lock.close()
    with pytest.raises(RunFolderError, match="belongs to another configuration"):
        RunFolder.open(tmp_path, "tiny", "xyz", str(first.path))
    with pytest.raises(RunFolderError, match="no such run folder"):
        RunFolder.open(tmp_path, "tiny", "abc", str(tmp_path / "nowhere"))


def test_new_never_continues(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", "abc")
    first._lock.close()
    assert RunFolder.open(tmp_path, "tiny", "abc", "new").path != first.path


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint of one rank, published as the trainer does it."""
    actor = root / checkpoints.WRITING / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"weights")
    return checkpoints.publish(root, step, base=None)


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", "abc")
    root = folder.path / "checkpoints"
    assert folder.last_checkpoint() is None
    (root / "global_step_10" / "actor").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    assert folder.last_checkpoint() is None
    write_checkpoint(root, 10)
    assert folder.last_checkpoint() == 10


def test_pruning_keeps_the_newest_complete_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", "abc")
    root = folder.path / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    (root / "global_step_4" / "actor").mkdir(parents=True)  # copied in part
    folder.prune_checkpoints(1)
    left = sorted(path.name for path in root.glob("global_step_*"))
    assert left == ["global_step_3", "global_step_4"]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_seconds_of_a_killed_attempt_end_at_its_last_metrics(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", "abc")
    assert folder.begin_attempt() == 0
    (folder.path / "metrics.jsonl").write_text("{}\n")
    time.sleep(0.05)
    assert folder.begin_attempt() == 1
    killed = folder.attempts()[0]
    assert killed["ended"] == pytest.approx(killed["started"], abs=0.04)
    assert folder.end_attempt() < 5


def test_the_fingerprint_ignores_where_a_run_lies_but_not_what_it_does() -> None:
    base = {"run": {"resume": "auto", "dir": None, "seed": 0}, "lr": 1e-4}
    moved = {"run": {"resume": "new", "dir": "/elsewhere", "seed": 0}, "lr": 1e-4}
    other = {"run": {"resume": "auto", "dir": None, "seed": 1}, "lr": 1e-4}
    digests = [config_fingerprint(OmegaConf.create(c)) for c in (base, moved, other)]
    assert digests[0] == digests[1] != digests[2]


def test_versions_name_what_can_move_a_number() -> None:
    found = versions(3, REPOSITORY)
    assert found["seed"] == 3
    assert {"soundmind", "numpy", "pyarrow"} <= found["packages"].keys()
    assert found["hardware"]["cores"] >= 1
    json.dumps(found)


def test_no_commit_outside_a_git_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
