"""A step's rollouts graded on their speech: what goes into TransferQueue's columns and comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from soundmind.training import speaking_step
from soundmind.training.agent_loop import ROW
from soundmind.training.speaking_step import SpeakingStep
from soundmind.training.speech import AUDIT, SEED, SETTINGS, SPEECH
from soundmind.training.spoken import SpeechFailed

KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "padx_0_0"]
TEXTS = ["<think>wug</think>\nAnswer: entailed", "Answer: entailed", "so", "wug", ""]
BEFORE = 1.25


class Queue:
    """Columns by key, as TransferQueue keeps them: a row at a time."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {key: {} for key in KEYS}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> None:
        assert partition_id == "train"
        for name in fields.keys():  # noqa: SIM118 - a TensorDict iterates over rows
            values = fields[name]
            values = values.unbind() if isinstance(values, torch.Tensor) else list(values)
            for key, value in zip(keys, values, strict=True):
                self.rows[key][name] = getattr(value, "data", value)

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        found: dict[str, Any] = {}
        for name in select_fields:
            values = [self.rows[key][name] for key in keys]
            if isinstance(values[0], torch.Tensor) and values[0].dim():
                values = torch.nested.as_nested_tensor(values, layout=torch.jagged)
            found[name] = values
        return tu.get_tensordict(found)


class Tokenizer:
    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return TEXTS[int(ids[0])]


class Workers:
    """Speak 100 codes a row; `failing` rows do not."""

    def __init__(self, queue: Queue, failing: tuple[str, ...] = ()) -> None:
        self.queue, self.failing, self.asked = queue, failing, {}

    def speak(self, batch: KVBatchMeta) -> None:
        self.settings = json.loads(batch.extra_info[SETTINGS])
        said = []
        for key in batch.keys:
            row = self.queue.rows[key]
            self.asked[key] = (int(row[SEED]), bool(row[AUDIT]))
            found: dict[str, Any] = {
                "speech_tokens": 100,
                "speech_seconds": 2.0,
                "speech_ended": True,
                "speech_transcript": "wug answer entailed" if key == "a_0_0" else "wug",
            }
            if key in self.failing:
                found = {"speech_error": "vocoder: broken"}
            said.append(json.dumps(found) if int(row[SEED]) >= 0 else "")
        self.queue.kv_batch_put(batch.keys, "train", tu.get_tensordict({SPEECH: said}))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(speaking_step, "tq", queue)
    for number, key in enumerate(KEYS):
        queue.rows[key] = {
            "responses": torch.tensor([number, 8, 9]),
            "extra_info": {"reference_seconds": 4.0, "reference_tokens": 3, "reference_words": 2},
            "reward_model": {"ground_truth": "entailed"},
            "data_source": "soundmind/practice",
            "rm_scores": torch.tensor([0.0, 0.0, BEFORE]),
            "extra_fields": {
                "reward_extra_info": {
                    "id": f"row {key[0]}",
                    "score": BEFORE,
                    "audio_length": 0.0,
                    "response_tokens": 3,
                    ROW: json.dumps({"data_source": "soundmind/practice"}),
                }
            },
        }
    return queue


def step(**speech: Any) -> SpeakingStep:
    settings = {"every": 1, "groups": 1.0, "audit": {"every": 0, "rows": 1}, **speech}
    return SpeakingStep(
        OmegaConf.create(
            {
                "speech": settings,
                "run": {"seed": 3},
                "reward": {"custom_reward_function": {"reward_kwargs": {"preset": "paper"}}},
            }
        )
    )


def batch() -> KVBatchMeta:
    tags = [{"is_padding": key.startswith("pad")} for key in KEYS]
    return KVBatchMeta(partition_id="train", keys=KEYS, tags=tags, extra_info={"temperature": 1.0})


def test_speech_is_added_to_the_score_on_the_last_token(queue: Queue) -> None:
    workers, meta = Workers(queue), batch()
    metrics = step().run(meta, workers, Tokenizer(), 1)
    first = queue.rows["a_0_0"]
    # 1 format, 2 answer, 1 text length, 0.5 audio format, 0.75 of half the reference's 4 s
    assert first["rm_scores"].tolist() == [0.0, 0.0, pytest.approx(4.875)]
    info = first["extra_fields"]["reward_extra_info"]
    assert (info["audio_format"], info["audio_length"], info["id"]) == (1.0, 0.5, "row a")
    assert json.loads(info[ROW])["speech_tokens"] == 100
    assert queue.rows["b_0_0"]["rm_scores"][-1] == pytest.approx(1.0 + 0.375)  # lengths alone
    assert metrics["speech/rows"] == 4 and metrics["speech/codes_per_token"] == pytest.approx(
        100 / 3
    )
    assert SETTINGS not in meta.extra_info


def test_padding_is_neither_spoken_nor_graded(queue: Queue) -> None:
    workers = Workers(queue)
    step().run(batch(), workers, Tokenizer(), 1)
    assert workers.asked["padx_0_0"] == (-1, False)
    assert queue.rows["padx_0_0"]["rm_scores"][-1] == BEFORE


def test_a_failed_row_leaves_its_group_graded_as_it_was(queue: Queue) -> None:
    metrics = step().run(batch(), Workers(queue, ("b_1_0",)), Tokenizer(), 1)
    assert [float(queue.rows[key]["rm_scores"][-1]) for key in ("b_0_0", "b_1_0")] == [BEFORE] * 2
    assert queue.rows["a_0_0"]["rm_scores"][-1] == pytest.approx(4.875)
    row = json.loads(queue.rows["b_1_0"]["extra_fields"]["reward_extra_info"][ROW])
    assert row["speech_error"] == "vocoder: broken" and "speech_tokens" not in row
    assert (metrics["speech/failed"], metrics["speech/failed_groups"]) == (1, 1)


def test_two_steps_of_failures_stop_the_run(queue: Queue) -> None:
    speaking = step()
    speaking.run(batch(), Workers(queue, ("b_1_0",)), Tokenizer(), 1)
    with pytest.raises(SpeechFailed, match="vocoder: broken"):
        speaking.run(batch(), Workers(queue, ("b_1_0",)), Tokenizer(), 2)


def test_half_of_the_groups_is_half_of_the_groups(queue: Queue) -> None:
    workers = Workers(queue)
    step(groups=0.5).run(batch(), workers, Tokenizer(), 1)
    spoken = {key[0] for key, (seed, _) in workers.asked.items() if seed >= 0}
    assert len(spoken) == 1
    (other,) = {"a", "b"} - spoken
    assert queue.rows[f"{other}_0_0"]["rm_scores"][-1] == BEFORE


def test_seeds_are_the_runs_steps_and_rows(queue: Queue) -> None:
    asked = []
    for number in (1, 1, 2):
        workers = Workers(queue)
        step(audit={"every": 2, "rows": 1}).run(batch(), workers, Tokenizer(), number)
        asked.append(workers.asked)
    assert asked[0] == asked[1] != asked[2]
    assert len({seed for seed, _ in asked[0].values()}) == 5
    assert [sum(audited for _, audited in step.values()) for step in asked] == [0, 0, 1]


def test_steps_between_are_not_spoken() -> None:
    assert [step(every=3).due(number) for number in range(1, 7)] == [False, False, True] * 2
