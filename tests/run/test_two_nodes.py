"""Two Ray nodes on one machine: train, lose one in the middle, see the run end, resume on a new one.

The cluster is started with `ray start`, as docs/several_machines.md says, and knows nothing of
SoundMind: what its processes need comes from the launcher. About two minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from processes import REPOSITORY, clean_environment

STEPS = 4
LAUNCH_LIMIT = 600  # seconds; a launch that hangs must not hang the suite
LOSS_LIMIT = 240  # seconds from the loss of a node to the end of the run


def compose(*overrides: str) -> Any:
    pytest.importorskip("verl")
    from soundmind.run.config import compose_config

    return compose_config("grpo_tiny_cpu", overrides)


def test_a_run_is_the_same_experiment_on_another_cluster() -> None:
    from soundmind.run.experiment import experiment

    addresses = ("10.0.0.1:6379", "10.0.0.2:6379")
    configs = [compose(f"ray_kwargs.ray_init.address='{address}'") for address in addresses]
    first, second = (experiment(config, contents=False) for config in configs)
    assert first == second != experiment(compose("trainer.nnodes=2"), contents=False)


def node(*, alive: bool, gpus: float = 8.0) -> dict[str, Any]:
    """What `ray.nodes()` says of a machine; a dead one has no resources."""
    return {"Alive": alive, "Resources": {"CPU": 64.0, "GPU": gpus} if alive else {}}


@pytest.mark.parametrize(
    ("nodes", "lost"),
    [
        ([node(alive=True), node(alive=True)], 0),
        ([node(alive=True), node(alive=False)], 1),
        ([node(alive=True), node(alive=True, gpus=4.0)], 1),
        # One that left earlier and was replaced.
        ([node(alive=True), node(alive=False), node(alive=True)], 0),
        ([node(alive=True)], 1),
    ],
)
def test_lost_nodes_are_those_the_cluster_lacks(
    nodes: list[dict[str, Any]], lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from soundmind.run.train import _lost_nodes

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    config = OmegaConf.create({"trainer": {"nnodes": 2, "n_gpus_per_node": 8}})
    assert _lost_nodes(config, patience=0.0) == lost
    config.trainer.nnodes = 1
    assert _lost_nodes(config, patience=0.0) == 0


def test_the_trainer_ends_when_a_node_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from soundmind.training.nodes import watch_nodes

    def nodes(*states: bool) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"id {n}", "NodeManagerAddress": f"10.0.0.{n}", "Alive": state}
            for n, state in enumerate(states)
        ]

    # At the start one machine is gone already; later another one joins, then one leaves.
    seen = iter([nodes(True, True, False), nodes(True, True, False, True), nodes(True, False)])
    monkeypatch.setattr(ray, "nodes", lambda: next(seen))
    lost: list[Any] = []
    watch_nodes(on_loss=lost.append, interval=0.0).join(timeout=30)
    assert lost == [{"id 1": "10.0.0.1"}]


def train_command(folder: Path, model: Path, address: str) -> list[str]:
    return [
        *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
        f"run.root='{folder / 'outputs'}'",
        "run.export=false",
        f"data.train_files='{folder}/parquet/audio/train.parquet'",
        f"data.val_files='{folder}/parquet/audio/test.parquet'",
        f"actor_rollout_ref.model.path='{model}'",
        f"ray_kwargs.ray_init.address='{address}'",
        # What the cluster has, `ray start` declared.
        "ray_kwargs.ray_init.num_cpus=null",
        "ray_kwargs.ray_init.num_gpus=null",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=1",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.logger=[console,file]",
    ]


def launch(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=clean_environment(**environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_of(process: subprocess.Popen[bytes], limit: float, log: Path) -> int:
    """Exit status, or a failed test if it takes longer than `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        pytest.fail(f"not done after {limit:.0f} s:\n{log.read_text()[-4000:]}")


def first_checkpoint(outputs: Path, process: subprocess.Popen[bytes], log: Path) -> Path:
    """The marker of a run's newest checkpoint, once there is one."""
    deadline = time.monotonic() + LAUNCH_LIMIT
    pattern = "grpo_tiny_cpu/*/checkpoints/latest_checkpointed_iteration.txt"
    # verl opens the marker before it writes the number.
    while not [path for path in outputs.glob(pattern) if path.read_text()]:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
    return next(outputs.glob(pattern))


@pytest.fixture(scope="module")
def run(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that lost one of its two nodes behind its first checkpoint, and was started again."""
    pytest.importorskip("vllm")
    from two_nodes import cluster

    from soundmind import preprocess

    folder = tmp_path_factory.mktemp("two nodes")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample")]
    arguments += ["--output-dir", str(folder / "parquet"), "--tokenizer", str(random_stand_in)]
    assert preprocess.main(arguments) == 0

    with cluster(folder) as ray:
        command = train_command(folder, random_stand_in, ray.address)
        worker = ray.add_worker()
        log = folder / "first.log"
        process = launch(command, log, **ray.environment)
        marker = first_checkpoint(folder / "outputs", process, log)
        ranks = {
            name: node.commands("WorkerDict")
            for name, node in (("head", ray.head), ("worker", worker))
        }
        worker.kill()
        found = {
            "ranks": ranks,
            "first_status": end_of(process, LOSS_LIMIT, log),
            "first_output": log.read_text(),
            "killed_at": int(marker.read_text()),
        }
        ray.add_worker()
        log = folder / "second.log"
        process = launch(command, log, **ray.environment)
        status = end_of(process, LAUNCH_LIMIT, log)
        assert status == 0, log.read_text()[-4000:]
    path = marker.parent.parent
    return {
        **found,
        "folder": path,
        "second_output": log.read_text(),
        "metrics": [json.loads(line) for line in (path / "metrics.jsonl").open()],
        "summary": json.loads((path / "summary.json").read_text()),
    }


@pytest.mark.e2e
def test_each_node_held_one_rank(run: dict[str, Any]) -> None:
    assert {node: len(found) for node, found in run["ranks"].items()} == {"head": 1, "worker": 1}


@pytest.mark.e2e
def test_the_loss_of_a_node_ends_the_run_with_a_clear_error(run: dict[str, Any]) -> None:
    assert run["first_status"] == 1
    last = run["first_output"].strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"the same command continues from step {run['killed_at']}" in last
    assert "1 of 2 nodes left the cluster" in last


@pytest.mark.e2e
def test_the_same_command_continues_on_the_new_node(run: dict[str, Any]) -> None:
    assert f"continued from step {run['killed_at']}" in run["second_output"]
    assert list(run["folder"].parent.iterdir()) == [run["folder"]]
    assert 1 <= run["killed_at"] < STEPS


@pytest.mark.e2e
def test_every_step_is_there_once(run: dict[str, Any]) -> None:
    assert [line["step"] for line in run["metrics"]] == list(range(1, STEPS + 1))
    assert run["summary"]["steps"] == STEPS


@pytest.mark.e2e
def test_rollout_and_trainer_agree_before_and_after(run: dict[str, Any]) -> None:
    for line in run["metrics"]:
        assert line["training/rollout_actor_probs_pearson_corr"] >= 0.999
        assert line["rollout/failed_sessions"] == 0


@pytest.mark.e2e
def test_the_last_checkpoints_have_the_shards_of_both_ranks(run: dict[str, Any]) -> None:
    folders = sorted((run["folder"] / "checkpoints").glob("global_step_*"))
    assert [folder.name for folder in folders] == [f"global_step_{s}" for s in (STEPS - 1, STEPS)]
    for folder in folders:
        for kind in ("model", "optim", "extra_state"):
            shards = {path.name for path in (folder / "actor").glob(f"{kind}_*.pt")}
            assert shards == {f"{kind}_world_size_2_rank_{rank}.pt" for rank in (0, 1)}
