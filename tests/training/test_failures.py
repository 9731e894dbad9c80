"""Failed responses: what is noted, what leaves the batch, and when a run stops."""

from __future__ import annotations

import asyncio
import types
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("verl")

from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from soundmind.task.reward import compute_score
from soundmind.training import failures, trainer
from soundmind.training.agent_loop import VALIDATE, AudioAgentLoopWorker, stream_seed
from soundmind.training.failures import (
    FailedResponsesError,
    Failures,
    ScoreError,
    broken_groups,
    require_few,
)


class Queue:
    """TransferQueue's tags in this process."""

    def __init__(self) -> None:
        self.partitions: dict[str, dict[str, Any]] = {}

    async def async_kv_put(self, key: str, partition_id: str, tag: Any) -> None:
        self.partitions.setdefault(partition_id, {})[key] = tag

    def kv_list(self, partition_id: str) -> dict[str, Any]:
        return {partition_id: dict(self.partitions.get(partition_id, {}))}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            self.partitions.get(partition_id, {}).pop(key, None)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(failures, "tq", queue)
    monkeypatch.setattr(trainer, "tq", queue)
    return queue


def note(*errors: Exception) -> None:
    for session, error in enumerate(errors):
        asyncio.run(failures.note("prompt", session, error))


def test_notes_are_taken_once_with_their_causes(queue: Queue) -> None:
    note(ValueError("a\nb"), ScoreError("c"), ValueError("a\nb"))
    taken = failures.take()
    assert taken == Failures(Counter({"ValueError: a b": 2, "ScoreError: c": 1}), scores=1)
    assert failures.take().count == 0


def test_a_group_of_one_survivor_is_broken_and_a_whole_one_is_not() -> None:
    keys = ["a_0_0", "a_1_0", "b_1_0", "c_0_0", "c_0_1"]
    assert broken_groups(keys, 2) == ["b_1_0", "c_0_0", "c_0_1"]
    assert broken_groups(keys, 1) == []


@pytest.mark.parametrize(
    ("failed", "share", "stops"),
    [(1, 0.01, False), (2, 0.01, True), (1, 0.0, True), (0, 0.0, False)],
)
def test_a_run_stops_above_the_share_and_names_the_most_frequent_cause(
    failed: int, share: float, stops: bool
) -> None:
    found = Failures(Counter({"KeyError: 'premise'": failed} if failed else {}))
    if not stops:
        require_few(found, 100, share, "step 3")
        return
    with pytest.raises(
        FailedResponsesError, match=r"step 3.*KeyError: 'premise'.*max_failed_share"
    ):
        require_few(found, 100, share, "step 3")


def balanced(keys: list[str], share: float, estimator: str = "grpo") -> tuple[list[str], Any]:
    """Keys that the trainer hands on to verl's balancing, and its metrics."""
    config = {
        "actor_rollout_ref": {"rollout": {"n": 2}},
        "data": {"train_batch_size": 4},
        "train": {"max_failed_share": share},
        "algorithm": {"adv_estimator": estimator},
    }
    metrics: dict[str, Any] = {}
    ours = types.SimpleNamespace(config=OmegaConf.create(config), global_steps=7)
    batch = KVBatchMeta(
        partition_id="train", keys=keys, tags=[{"seq_len": n} for n in range(len(keys))]
    )
    found = trainer.SoundMindTrainer._whole_groups(ours, batch, metrics)
    assert [tag["seq_len"] for tag in found.tags] == [keys.index(key) for key in found.keys]
    return list(found.keys), metrics


def test_a_lone_survivor_leaves_the_batch_and_is_counted(queue: Queue) -> None:
    note(RuntimeError("vLLM"))
    keys = ["a_0_0", "a_1_0", "b_1_0", "c_0_0", "c_1_0", "d_0_0", "d_1_0"]
    kept, metrics = balanced(keys, share=0.5)
    assert kept == [key for key in keys if key != "b_1_0"]
    assert metrics["rollout/failed_sessions"] == 1
    assert metrics["rollout/dropped_responses"] == 1


def test_a_lone_survivor_stays_where_responses_are_not_compared_in_groups(queue: Queue) -> None:
    note(RuntimeError("vLLM"))
    kept, metrics = balanced(["a_0_0", "a_1_0", "b_1_0"], 0.5, "reinforce_plus_plus")
    assert (kept, metrics["rollout/dropped_responses"]) == (["a_0_0", "a_1_0", "b_1_0"], 0)


def test_a_step_without_a_group_to_compare_stops_with_the_cause(queue: Queue) -> None:
    note(*[RuntimeError("vLLM")] * 4)
    with pytest.raises(FailedResponsesError, match=r"no group is left.*RuntimeError: vLLM"):
        balanced(["a_0_0", "b_0_0", "c_0_0", "d_1_0"], share=1.0)


def broken_component(response: str, row: dict[str, Any]) -> float:
    raise KeyError("premise")


@pytest.mark.parametrize("validate", [False, True])
def test_a_failed_score_ends_its_session_in_training_and_is_noted_in_validation(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, validate: bool
) -> None:
    components = [{"name": "mine", "path": broken_component, "weight": 1.0}]
    score = compute_score("alr", "Answer: entailed", "entailed", {}, components=components)

    async def verls(self: Any, outputs: list[Any], kwargs: Any) -> None:
        outputs[-1].extra_fields["reward_extra_info"] = dict(score)

    parent = AudioAgentLoopWorker.__mro__[1]
    monkeypatch.setattr(parent, "_compute_score", verls)
    output = types.SimpleNamespace(extra_fields={VALIDATE: validate, "finish_reason": "stop"})
    worker = AudioAgentLoopWorker.__new__(AudioAgentLoopWorker)
    scoring = worker._compute_score([output], {"uid": "a", "session_id": 0})
    if validate:
        asyncio.run(scoring)
        assert failures.take().scores == 1
    else:
        with pytest.raises(ScoreError, match="component 'mine' raised KeyError"):
            asyncio.run(scoring)


def test_every_response_of_a_run_has_a_stream_of_its_own() -> None:
    seeds = {
        stream_seed(seed, f"{step:06d}x{prompt:06d}", session)
        for seed in range(3)
        for step in range(20)
        for prompt in range(20)
        for session in range(8)
    }
    assert len(seeds) == 3 * 20 * 20 * 8
    assert all(0 <= value < 2**63 for value in seeds)
    assert stream_seed(0, "000001x000000", 3) == stream_seed(0, "000001x000000", 3)
