"""The whole path on two FSDP ranks: mixed modes, a kill -9, resume, export, reload.

One launch is killed in the middle and the same command finishes the run; all is asserted on what
that run left behind. About six minutes on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment

from soundmind.model import checkpoints

torch = pytest.importorskip("torch")
pytest.importorskip("verl")
pytest.importorskip("vllm")

pytestmark = pytest.mark.e2e

STEPS = 4
LAUNCH_LIMIT = 600  # seconds; a worker that hangs must not hang the suite


@pytest.fixture(scope="module")
def command(spare_rows_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The training command: all three modes in one batch, two ranks, KL to a reference.

    The head of the model has rows without a token, as published ones have.
    """
    from soundmind import preprocess

    folder = tmp_path_factory.mktemp("end to end")
    for mode in ("audio", "text", "dual"):
        arguments = ["--mode", mode, "--task", "practice", "--workers", "1"]
        arguments += ["--data-dir", str(REPOSITORY / "data/sample")]
        arguments += [
            "--output-dir",
            str(folder / "parquet"),
            "--tokenizer",
            str(spare_rows_stand_in),
        ]
        assert preprocess.main(arguments) == 0

    def files(split: str) -> str:
        names = [f"'{folder}/parquet/{mode}/{split}.parquet'" for mode in ("audio", "text", "dual")]
        return "[" + ",".join(names) + "]"

    return [
        *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
        f"run.root='{folder / 'outputs'}'",
        f"data.train_files={files('train')}",
        f"data.val_files={files('test')}",
        f"actor_rollout_ref.model.path='{spare_rows_stand_in}'",
        "trainer.n_gpus_per_node=2",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.use_kl_loss=true",
        # From the first step on, so that every later step rolls out updated weights.
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=2",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
    ]


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=clean_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LAUNCH_LIMIT
    while not path.exists():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The finished run, after a kill -9 behind its second checkpoint."""
    logs = tmp_path_factory.mktemp("logs")
    outputs = Path(next(a for a in command if a.startswith("run.root="))[10:-1]) / "grpo_tiny_cpu"
    first = launch(command, logs / "first.log")
    deadline = time.monotonic() + LAUNCH_LIMIT
    while not list(outputs.glob("*/config.yaml")):
        assert first.poll() is None, (logs / "first.log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    folder = next(outputs.iterdir())
    wait_for(folder / "checkpoints/global_step_2/data.pt", first, logs / "first.log")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = checkpoints.newest(folder / "checkpoints") or 0
    second = launch(command, logs / "second.log")
    try:
        second.wait(LAUNCH_LIMIT)
    except subprocess.TimeoutExpired:
        second.kill()
        pytest.fail("the resumed run hangs:\n" + (logs / "second.log").read_text()[-4000:])
    output = (logs / "second.log").read_text()
    assert second.returncode == 0, output[-4000:]
    return {
        "folder": folder,
        "output": output,
        "killed_at": left,
        "metrics": [json.loads(line) for line in (folder / "metrics.jsonl").open()],
        "summary": json.loads((folder / "summary.json").read_text()),
    }


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, from its start to its end in one launch."""
    root, log = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("log") / "log"
    process = launch([*command, f"run.root='{root}'", "run.export=false"], log)
    try:
        process.wait(LAUNCH_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.returncode == 0, log.read_text()[-4000:]
    return next((root / "grpo_tiny_cpu").iterdir())


# What a clock, the machine or the number of requests beside one decides.
MOVES = ("timing", "perf/", "actor/perf/", "features/seconds", "training/rollout_", "rollout_corr/")


def test_a_killed_and_resumed_run_is_the_undisturbed_one(
    run: dict[str, Any], undisturbed: Path
) -> None:
    """Metrics, rollouts and final weights: one seed is one run, whatever happens in between."""
    from soundmind.model.export import find_checkpoint, load_sharded_state

    for line, other in zip(
        run["metrics"], map(json.loads, (undisturbed / "metrics.jsonl").open()), strict=True
    ):
        assert line.keys() == other.keys()
        moved = [k for k in line if line[k] != other[k] and not k.startswith(MOVES)]
        assert moved == [], f"step {line['step']}"
    for step in range(1, STEPS + 1):
        name = f"rollouts/{step}.jsonl"
        assert (run["folder"] / name).read_text() == (undisturbed / name).read_text()
    mine, theirs = (
        load_sharded_state(find_checkpoint(folder) / "actor")
        for folder in (run["folder"], undisturbed)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_second_launch_continues_in_the_same_folder(run: dict[str, Any]) -> None:
    assert list(run["folder"].parent.iterdir()) == [run["folder"]]
    assert f"continued from step {run['killed_at']}" in run["output"]
    assert run["output"].strip().splitlines()[-1] == f"run: {run['folder']}"


def test_a_resumed_run_has_every_step_exactly_once(run: dict[str, Any]) -> None:
    assert [line["step"] for line in run["metrics"]] == list(range(STEPS + 1))
    assert run["summary"]["steps"] == STEPS
    assert run["killed_at"] < STEPS


def test_every_step_logs_components_lengths_kl_agreement_and_timings(run: dict[str, Any]) -> None:
    from soundmind.task.reward_settings import COMPONENTS

    wanted = [f"reward/{name}/mean" for name in (*COMPONENTS, "accuracy", "parsed")]
    wanted += ["response_length/mean", "actor/kl_loss", "actor/grad_norm", "timing_s/step"]
    wanted += ["training/rollout_actor_probs_pearson_corr", "rollout/failed_sessions"]
    for line in run["metrics"][1:]:
        missing = [name for name in wanted if name not in line]
        assert not missing, f"step {line['step']}"
        assert line["rollout/failed_sessions"] == 0


def test_rollout_and_trainer_agree_at_every_step(run: dict[str, Any]) -> None:
    for line in run["metrics"][1:]:
        assert line["training/rollout_actor_probs_pearson_corr"] >= 0.999
        assert line["training/rollout_probs_diff_max"] < 1e-4
    assert run["summary"]["rollout_actor_corr_min"] >= 0.999


def test_no_audio_features_are_left_behind_a_step(run: dict[str, Any]) -> None:
    steps = [line for line in run["metrics"] if line["step"] > 0]
    assert [line["features/left"] for line in steps] == [0] * len(steps)
    # Prompts in text alone have none; those of audio and both have theirs stored once.
    for line in steps:
        assert (line["features/seconds"] > 0) == (line["features/prompts"] > 0)
    assert 0 < sum(line["features/prompts"] for line in steps) <= 4 * len(steps)


def test_the_weights_of_vllm_follow_the_updates(run: dict[str, Any]) -> None:
    # Agreement would prove nothing if the policy stood still.
    assert all(line["actor/grad_norm"] > 0 for line in run["metrics"][1:])
    kl = [line["actor/kl_loss"] for line in run["metrics"][2:]]
    assert min(kl) > 0


def test_all_three_modes_are_in_the_dumps_with_their_components(run: dict[str, Any]) -> None:
    rollouts = [
        json.loads(line)
        for path in sorted((run["folder"] / "rollouts").glob("*.jsonl"))
        for line in path.open()
    ]
    assert len(rollouts) == STEPS * 4 * 2
    lengths = {len(row["input"]) for row in rollouts}
    assert len(lengths) > 1, "text and audio prompts differ in length"
    for row in rollouts:
        assert {"id", "score", "text_format", "answer", "acc", "finish_reason"} <= row.keys()
        assert row["reference_tokens"] > 0
    validation = [json.loads(line) for line in (run["folder"] / "validation/0.jsonl").open()]
    assert len(validation) == 3 * 8


def test_a_dump_can_be_scored_again_with_the_same_result(run: dict[str, Any]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "soundmind.rewards", str(run["folder"] / "rollouts/1.jsonl")],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "text_length" in result.stdout


def test_the_run_folder_holds_what_it_promises(run: dict[str, Any]) -> None:
    folder = run["folder"]
    for name in ("config.yaml", "versions.json", "tensorboard", "export", "checkpoints"):
        assert (folder / name).exists(), name
    for name in ("reward", "accuracy", "length", "agreement", "timing", "overview"):
        assert (folder / f"plots/{name}.png").stat().st_size > 5_000
    assert len(list((folder / "checkpoints").glob("global_step_*"))) == 2
    wanted = {"steps", "val_score_first", "val_score_last", "val_acc_first", "val_acc_last"}
    wanted |= {"components_first", "components_last", "seconds_total", "seconds_per_step_median"}
    assert wanted <= run["summary"].keys()


def test_no_process_of_the_killed_launch_is_left(run: dict[str, Any]) -> None:
    ours = str(run["folder"].parent.parent)
    left = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().decode(errors="replace")
            name = (path.parent / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if ours in environment and "VLLM" in name:
            left.append(name)
    assert left == []


def test_the_export_loads_as_the_full_class_with_the_trained_thinker(run: dict[str, Any]) -> None:
    from transformers import Qwen2_5OmniForConditionalGeneration

    from soundmind.model.export import find_checkpoint, load_sharded_state

    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        run["folder"] / "export", dtype=torch.float32
    )
    assert model.has_talker
    trained = load_sharded_state(find_checkpoint(run["folder"]) / "actor")
    exported = model.thinker.state_dict()
    # Vision was not loaded; the export has the base's.
    untrained = exported.keys() - trained.keys()
    assert untrained
    assert all(name.startswith("visual.") for name in untrained)
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor), name


def test_the_export_differs_from_its_base_in_the_thinker_alone(
    run: dict[str, Any], spare_rows_stand_in: Path
) -> None:
    from safetensors.torch import load_file

    base = load_file(spare_rows_stand_in / "model.safetensors")
    exported = load_file(run["folder"] / "export/model.safetensors")
    assert base.keys() == exported.keys()
    changed = {n for n, tensor in base.items() if not torch.equal(tensor, exported[n])}
    assert changed
    assert all(
        name.startswith(("thinker.model", "thinker.lm", "thinker.audio")) for name in changed
    )


def test_vllm_serves_the_export_with_the_trainers_prompts_and_log_probabilities(
    run: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "vllm.json"
    result = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/vllm_check.py")),
            *("--model", str(run["folder"] / "export"), "--output", str(output)),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LAUNCH_LIMIT,
    )
    assert output.exists(), result.stderr[-4000:]
    rows = json.loads(output.read_text())
    assert [row["seconds"] for row in rows] == [0.5, 5.0, 30.0, 120.0]
    for row in rows:
        assert row["vllm_tokens"] == row["trainer_tokens"], row
        assert row["log_prob_gap"] < 1e-4, row
