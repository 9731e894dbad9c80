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
from soundmind.run.experiment import differences, experiment
from soundmind.run.folder import RunFolder, RunFolderError, choose_run
from soundmind.system.files import write_json
from soundmind.system.machine import git_commit, versions

SAME, OTHER = {"run.seed": 0}, {"run.seed": 1}


def test_a_first_launch_gets_a_new_folder(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", SAME)
    assert folder.path.parent == tmp_path / "tiny"
    assert not folder.resumed


def test_an_unfinished_run_of_the_same_configuration_is_continued(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    first._lock.close()  # the process that held it is gone
    again = RunFolder.open(tmp_path, "tiny", SAME)
    assert again.path == first.path
    assert again.resumed


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    first._lock.close()
    write_json(first.path / "summary.json", {})
    assert RunFolder.open(tmp_path, "tiny", SAME).path != first.path


def test_another_configuration_starts_its_own_run(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    first._lock.close()
    assert RunFolder.open(tmp_path, "tiny", OTHER).path != first.path


def test_a_run_that_is_still_going_is_not_joined(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    assert RunFolder.open(tmp_path, "tiny", SAME).path != first.path


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from soundmind.run.folder import RunFolder; "
        "f = RunFolder.open(Path(sys.argv[1]), 'tiny', {'run.seed': 0}); print(f.path, flush=True); "
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
    assert RunFolder.open(tmp_path, "tiny", SAME).path == path


def test_resuming_a_named_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    first._lock.close()
    with pytest.raises(RunFolderError, match="belongs to another configuration"):
        RunFolder.open(tmp_path, "tiny", OTHER, str(first.path))
    with pytest.raises(RunFolderError, match="no such run folder"):
        RunFolder.open(tmp_path, "tiny", SAME, str(tmp_path / "nowhere"))


def test_new_never_continues(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "tiny", SAME)
    first._lock.close()
    assert RunFolder.open(tmp_path, "tiny", SAME, "new").path != first.path


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint of one rank, published as the trainer does it."""
    actor = root / checkpoints.WRITING / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"weights")
    return checkpoints.publish(root, step, base=None)


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", SAME)
    root = folder.path / "checkpoints"
    assert folder.last_checkpoint() is None
    (root / "global_step_10" / "actor").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    assert folder.last_checkpoint() is None
    write_checkpoint(root, 10)
    assert folder.last_checkpoint() == 10


def test_pruning_keeps_the_newest_complete_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", SAME)
    root = folder.path / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    (root / "global_step_4" / "actor").mkdir(parents=True)  # copied in part
    folder.prune_checkpoints(1)
    left = sorted(path.name for path in root.glob("global_step_*"))
    assert left == ["global_step_3", "global_step_4"]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_seconds_of_a_killed_attempt_end_at_its_last_metrics(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "tiny", SAME)
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
    found = [experiment(OmegaConf.create(c), contents=False) for c in (base, moved, other)]
    assert found[0] == found[1] != found[2]
    assert differences(found[0], found[2]) == "run.seed 0 -> 1"


@pytest.mark.parametrize(
    ("setting", "free"),
    [
        ("trainer.total_training_steps=100", True),
        ("trainer.test_freq=7", True),
        ("trainer.save_freq=7", True),
        ("trainer.logger=[console]", True),
        ("trainer.max_actor_ckpt_to_keep=9", True),
        ("run.export=false", True),
        ("actor_rollout_ref.rollout.n=4", False),
        ("actor_rollout_ref.actor.optim.lr=1e-6", False),
        ("trainer.n_gpus_per_node=2", False),
        ("data.max_response_length=16", False),
    ],
)
def test_steps_frequencies_loggers_and_keep_counts_may_change(setting: str, free: bool) -> None:
    pytest.importorskip("verl")
    from soundmind.run.config import compose_config

    before, after = compose_config("grpo_tiny_cpu"), compose_config("grpo_tiny_cpu", [setting])
    found = [experiment(config, contents=False) for config in (before, after)]
    assert (found[0] == found[1]) == free
    key = setting.partition("=")[0]
    assert (key in differences(*found)) == (not free)


def test_a_schedule_over_all_steps_binds_their_number() -> None:
    optim = {"lr_scheduler_type": "cosine", "lr_warmup_steps": 5, "lr_warmup_steps_ratio": 0.0}
    config = {
        "trainer": {"total_training_steps": 50},
        "actor_rollout_ref": {"actor": {"optim": optim}},
    }

    def bound(**changed: object) -> bool:
        optim.update(changed)
        found = experiment(OmegaConf.create(config), contents=False)
        return "trainer.total_training_steps" in found

    assert bound()
    assert not bound(lr_scheduler_type="constant")
    assert bound(lr_warmup_steps=-1, lr_warmup_steps_ratio=0.1)
    assert not bound(lr_warmup_steps_ratio=0.0)


def abandoned(root: Path, experiment: dict[str, object], step: int | None = None) -> Path:
    """The folder of a run whose process is gone, with a checkpoint at `step`."""
    folder = RunFolder.open(root, "tiny", experiment)
    folder._lock.close()
    if step is not None:
        write_checkpoint(folder.path / "checkpoints", step)
    return folder.path


def test_a_run_that_is_not_continued_says_which_keys_differ(tmp_path: Path) -> None:
    path = abandoned(tmp_path, {"seed": 0, "n": 8, "gone": 1}, step=30)
    wanted = {"seed": 1, "n": 8, "new": "x"}
    (note,) = choose_run(tmp_path, "tiny", wanted).notes
    assert note == (
        f"{path} is unfinished (step 30) and is not continued: gone 1 -> absent, new absent -> "
        '"x", seed 0 -> 1'
    )
    assert RunFolder.open(tmp_path, "tiny", wanted).notes == [note]
    assert choose_run(tmp_path, "tiny", wanted, "new").notes == []


def test_a_run_of_an_earlier_layout_says_that_its_classes_have_moved(tmp_path: Path) -> None:
    """Earlier versions left a configuration and no experiment.json."""
    old = tmp_path / "tiny/2026-11-20_10-00-00"
    old.mkdir(parents=True)
    model = {"_target_": "soundmind.verl_ext.model.OmniModelConfig", "lora_rank": 0}
    OmegaConf.save(OmegaConf.create({"model": model}), old / "config.yaml")
    now = {
        "model._target_": "soundmind.training.model_config.OmniModelConfig",
        "model.lora_rank": 0,
    }
    (note,) = choose_run(tmp_path, "tiny", now).notes
    assert "\n" not in note
    assert "class paths are part of its fingerprint" in note
    assert "soundmind.verl_ext.model.OmniModelConfig" in note and "versions.json" in note
    with pytest.raises(RunFolderError, match="class paths are part of its fingerprint"):
        choose_run(tmp_path, "tiny", now, str(old))


def test_other_weights_or_rows_under_the_same_path_are_another_experiment(tmp_path: Path) -> None:
    path = abandoned(tmp_path, {"rows of train.parquet": "aa", "seed": 0}, step=3)
    wanted = {"rows of train.parquet": "bb", "seed": 0}
    chosen = choose_run(tmp_path, "tiny", wanted)
    assert chosen.paths == []
    assert "rows of train.parquet" in chosen.notes[0]
    with pytest.raises(RunFolderError, match=r"rows of train\.parquet"):
        choose_run(tmp_path, "tiny", wanted, str(path))


def test_a_finished_run_is_extended_beyond_its_last_step(tmp_path: Path) -> None:
    path = abandoned(tmp_path, SAME, step=50)
    write_json(path / "summary.json", {"steps": 50})
    for steps in (None, 60):
        assert choose_run(tmp_path, "tiny", SAME, str(path), steps).paths == [path]
    with pytest.raises(RunFolderError, match=r"set trainer\.total_training_steps above 50"):
        choose_run(tmp_path, "tiny", SAME, str(path), 50)
    (note,) = choose_run(tmp_path, "tiny", SAME, steps=100).notes
    assert f"run.resume={path} extends it" in note
    folder = RunFolder.open(tmp_path, "tiny", SAME, str(path), 100)
    folder._lock.close()
    # A kill from here on leaves an unfinished run, which the same command goes on with.
    assert choose_run(tmp_path, "tiny", SAME, steps=100).paths == [path]
    assert json.loads((path / "summary-step-50.json").read_text()) == {"steps": 50}


def test_a_finished_run_without_checkpoints_cannot_be_extended(tmp_path: Path) -> None:
    path = abandoned(tmp_path, SAME)
    write_json(path / "summary.json", {})
    with pytest.raises(RunFolderError, match="kept no checkpoint"):
        choose_run(tmp_path, "tiny", SAME, str(path), 100)


def test_versions_name_what_can_move_a_number() -> None:
    found = versions(3, REPOSITORY)
    assert found["seed"] == 3
    assert {"soundmind", "numpy", "pyarrow"} <= found["packages"].keys()
    assert found["hardware"]["cores"] >= 1
    json.dumps(found)


def test_no_commit_outside_a_git_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
