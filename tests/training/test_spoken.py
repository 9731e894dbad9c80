"""Which rollouts are spoken, and what a failed one costs its group."""

from __future__ import annotations

import pytest

from soundmind.task.reward import compute_score
from soundmind.training.spoken import (
    Patience,
    SpeechFailed,
    Spoken,
    answer_seed,
    chosen_groups,
    group_ids,
    pearson,
)

KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]


def row(tokens: int = 100, **more: object) -> dict[str, object]:
    return {
        "speech_tokens": tokens,
        "speech_seconds": tokens / 50,
        "speech_ended": True,
        "speech_transcript": "so answer entailed",
        **more,
    }


def test_one_row_that_failed_takes_the_terms_from_its_whole_group_and_no_other() -> None:
    rows = {key: row() for key in KEYS} | {"b_0_0": {"speech_error": "vocoder: no memory"}}
    spoken = Spoken(rows, group_ids(KEYS))
    assert spoken.failed_groups == {"b"}
    assert [bool(spoken.terms(key)) for key in KEYS] == [True, True, False, False]
    assert spoken.record("b_0_0")["speech_error"] == "vocoder: no memory"
    assert spoken.record("b_1_0") == {"speech_ended": True}
    metrics = spoken.metrics(dict.fromkeys(KEYS, 10), dict.fromkeys(KEYS, 8))
    assert (metrics["speech/failed"], metrics["speech/failed_groups"]) == (1, 1)


def test_silence_is_a_result_and_no_failure() -> None:
    spoken = Spoken({"a_0_0": row(0, speech_transcript="")}, group_ids(KEYS))
    terms = spoken.terms("a_0_0")
    truth = {"reference_seconds": 2.0, "reference_tokens": 4, "response_tokens": 4}
    result = compute_score("s", "Answer: entailed", "entailed", {**truth, **terms})
    assert not spoken.failed_groups
    assert (result["audio_format"], result["audio_length"]) == (0.0, 0.0)


def test_a_rollout_that_was_not_asked_to_speak_has_no_terms() -> None:
    assert Spoken({}, group_ids(KEYS)).terms("a_0_0") == {}


def test_length_is_measured_in_codec_tokens_of_a_fiftieth_of_a_second() -> None:
    terms = Spoken({"a_0_0": row(50)}, group_ids(KEYS)).terms("a_0_0")
    result = compute_score("s", "x", "entailed", {"reference_seconds": 2.0, **terms})
    assert result["audio_length"] == pytest.approx(0.5)


def test_a_share_of_groups_is_drawn_by_row_and_step() -> None:
    groups = {f"uid{i}": f"row{i}" for i in range(40)}
    chosen = chosen_groups(groups, 0.25, 7, 3)
    assert len(chosen) == 10 and chosen <= groups.keys()
    renamed = {f"other{i}": f"row{i}" for i in range(40)}
    assert {renamed[g] for g in chosen_groups(renamed, 0.25, 7, 3)} == {groups[g] for g in chosen}
    assert chosen_groups(groups, 0.25, 7, 4) != chosen
    assert len(chosen_groups(groups, 1e-6, 7, 3)) == 1


def test_seeds_follow_run_step_row_and_session() -> None:
    seeds = {answer_seed(s, t, "r", n) for s in (0, 1) for t in (1, 2) for n in range(8)}
    assert len(seeds) == 32 and all(0 <= seed < 2**62 for seed in seeds)
    assert answer_seed(0, 1, "r", 3) == answer_seed(0, 1, "r", 3)


def test_a_run_stops_when_more_than_a_tenth_fails_twice_running() -> None:
    def step(failed: int) -> Spoken:
        rows = {f"u{i}_0_0": row() for i in range(20 - failed)}
        rows |= {f"v{i}_0_0": {"speech_error": f"cause {i}"} for i in range(failed)}
        return Spoken(rows, group_ids(rows))

    patience = Patience()
    for failed in (3, 2, 3):  # 2 of 20 is a tenth, not more
        patience.see(step(failed))
    with pytest.raises(SpeechFailed, match="cause 0"):
        patience.see(step(3))


def test_the_correlation_tells_a_length_that_says_nothing_new() -> None:
    assert pearson([10, 20, 30], [1, 2, 3]) == pytest.approx(1.0)
    assert pearson([10, 10], [1, 2]) is None
