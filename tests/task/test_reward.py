"""Claims about what a response earns; the degenerate ones are the tables of docs/rewards.md."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from graded import KEYS, RIGHT, ROW, ROWS, SPEECH, TEXTS, grade
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from soundmind.task import reward_settings
from soundmind.task.labels import ENTAILED, NOT_ENTAILED, VERDICTS, LabelSet, answer_line
from soundmind.task.reward import compute_score
from soundmind.task.reward_settings import COMPONENTS, PRESETS, max_score, resolve

ROOT = Path(__file__).resolve().parents[2]


# --- the paper's formula


@pytest.mark.parametrize("verdict", VERDICTS)
def test_an_ideal_response_earns_the_maximum(verdict: str) -> None:
    response = f"<think>because</think>\n{answer_line(verdict)}"
    assert grade(response, verdict)["score"] == 4.0
    spoken = {**ROW, **SPEECH, "speech_transcript": f"so answer {verdict}", "speech_tokens": 100}
    assert grade(response, verdict, spoken)["score"] == 5.25


def test_keys_and_types_are_those_of_the_contract() -> None:
    result = grade(RIGHT)
    assert list(result) == KEYS
    assert {key: type(result[key]) for key in KEYS} == {
        **dict.fromkeys(KEYS, float),
        "pred": str,
        "reward_error_cause": str,
        "response_tokens": int,
    }


def test_a_wrong_verdict_in_good_form_keeps_format_and_length() -> None:
    result = grade(RIGHT, NOT_ENTAILED)
    assert (result["text_format"], result["answer"], result["acc"]) == (1.0, 0.0, 0.0)
    assert result["score"] == 2.0 and result["pred"] == ENTAILED and result["parsed"] == 1.0


def test_answer_counts_only_in_good_form_and_accuracy_in_any() -> None:
    result = grade("Answer: entailed", row={**ROW, "response_tokens": 5})
    assert (result["acc"], result["answer"], result["text_format"]) == (1.0, 0.0, 0.0)
    assert result["score"] == 0.5


def test_truncated_thinking_keeps_only_its_length() -> None:
    result = grade("<think>one two three", row={**ROW, "response_tokens": 3})
    assert result["score"] == result["text_length"] == 0.3
    assert result["parsed"] == 0.0 and result["pred"] == ""


@pytest.mark.parametrize(
    ("preset", "weights"),
    [
        ("paper", (1.0, 0.5, 2.0, 1.0, 0.75)),
        ("no_audio_rewards", (1.0, 0.0, 2.0, 1.0, 0.0)),
        ("no_text_rewards", (0.0, 1.0, 2.0, 0.0, 1.0)),
        ("no_answer_reward", (1.0, 0.5, 0.0, 1.0, 0.75)),
    ],
)
def test_presets_are_the_papers_as_printed(preset: str, weights: tuple[float, ...]) -> None:
    assert tuple(PRESETS[preset].values()) == weights and tuple(PRESETS[preset]) == COMPONENTS
    assert max_score(preset=preset, has_speech=True) == sum(weights)
    assert max_score(preset=preset) == weights[0] + weights[2] + weights[3]
    full = {**ROW, **SPEECH, "speech_tokens": 100}
    assert grade(RIGHT, row=full, preset=preset)["score"] == sum(weights)


def test_ungraded_format_still_gates_the_answer_in_an_ablation() -> None:
    assert grade(RIGHT, preset="no_text_rewards")["score"] == 2.0
    assert grade("Answer: entailed", preset="no_text_rewards")["score"] == 0.0


# --- ground truth


@pytest.mark.parametrize("truth", ["not entailed", "Not-entailed", "not-entailed."])
def test_ground_truth_is_read_in_both_spellings(truth: str) -> None:
    assert grade(RIGHT, truth)["acc"] == 0.0
    assert grade("<think>a</think> Answer: not-entailed", truth)["answer"] == 1.0


def test_unknown_ground_truth_is_counted_and_not_raised(log: Any) -> None:
    result = grade(RIGHT, "perhaps")
    assert list(result) == KEYS and result["reward_error"] == 1.0 and result["acc"] == 0.0
    assert "'perhaps' of soundmind/alr" in log.text


# --- lengths


def test_tokens_of_the_rollout_are_measured_against_reference_tokens() -> None:
    result = grade(RIGHT, row={"reference_tokens": 40, "reference_words": 1, "response_tokens": 10})
    assert result["text_length"] == 0.25 and result["response_tokens"] == 10


def test_the_token_count_may_come_as_a_keyword() -> None:
    assert grade(RIGHT, row={"reference_tokens": 40}, response_tokens=20)["text_length"] == 0.5


def test_words_are_a_choice_of_the_config() -> None:
    row = {"reference_tokens": 1, "reference_words": 10, "response_tokens": 10}
    assert grade(RIGHT, row=row, length_unit="words")["text_length"] == 0.5


@pytest.mark.parametrize(
    "row", [{"reference_words": 10}, {"reference_words": 10, "response_tokens": 9}]
)
def test_words_stand_in_for_tokens_that_are_unknown_and_the_log_says_so(
    row: dict[str, int], log: Any
) -> None:
    assert grade(RIGHT, row=row)["text_length"] == 0.5
    assert "measured in words, not in tokens" in log.text


def test_unknown_token_count_is_reported_as_minus_one() -> None:
    assert grade(RIGHT, row={})["response_tokens"] == -1


@pytest.mark.parametrize("reference", [None, 0, -3, float("nan"), float("inf"), "many"])
def test_a_row_without_reference_loses_the_term_and_the_log_says_so_once(
    reference: object, log: Any
) -> None:
    row = {"reference_tokens": reference, "response_tokens": 5}
    scores = [grade(RIGHT, row=row)["score"] for _ in range(3)]
    assert scores == [3.0, 3.0, 3.0]
    assert log.text.count("row without a reference length") == 1


def test_extra_info_may_be_missing_altogether() -> None:
    assert compute_score("soundmind/alr", RIGHT, ENTAILED)["score"] == 3.0


# --- speech


def test_without_speech_the_audio_terms_drop_out_and_the_log_says_so_once(log: Any) -> None:
    results = [grade(RIGHT, row={**ROW, "speech_tokens": None}) for _ in range(3)]
    assert all(r["audio_format"] == r["audio_length"] == 0.0 for r in results)
    assert log.text.count("response without speech") == 1


def test_speech_is_measured_in_codec_tokens_before_seconds() -> None:
    row = {**ROW, **SPEECH, "speech_seconds": 9.0, "reference_seconds": 9.0}
    assert grade(RIGHT, row=row)["audio_length"] == 0.5
    row["reference_speech_tokens"] = None
    assert grade(RIGHT, row=row)["audio_length"] == 1.0


def test_speech_without_a_reference_loses_its_length_only(log: Any) -> None:
    row = {**ROW, "speech_transcript": "answer entailed", "speech_seconds": 3.0}
    result = grade(RIGHT, row=row)
    assert (result["audio_format"], result["audio_length"]) == (1.0, 0.0)
    assert "loses audio_length" in log.text


def test_speech_without_a_transcript_loses_its_format_only(log: Any) -> None:
    row = {**ROW, "speech_seconds": 3.0, "reference_seconds": 6.0}
    result = grade(RIGHT, row=row)
    assert (result["audio_format"], result["audio_length"]) == (0.0, 0.5)
    assert "loses audio_format" in log.text


def test_a_transcript_that_trails_off_is_no_audio_format() -> None:
    row = {**ROW, **SPEECH, "speech_transcript": "answer entailed thank you"}
    assert grade(RIGHT, row=row)["audio_format"] == 0.0


# --- configuration


def test_single_weights_of_a_preset_can_be_changed() -> None:
    assert grade(RIGHT, weights={"text_length": 0.0, "answer": 5})["score"] == 6.0


def test_a_changed_dict_takes_effect_at_the_next_call() -> None:
    weights = {"answer": 1.0}
    before = grade(RIGHT, weights=weights)["score"]
    weights["answer"] = 2.0
    assert grade(RIGHT, weights=weights)["score"] == before + 1.0


def test_omegaconf_reward_kwargs_work_as_verl_passes_them() -> None:
    node = OmegaConf.create(
        {"preset": "no_audio_rewards", "weights": {"answer": 3.0}, "labels": ["yes", "no"]}
    )
    kwargs = dict(node)
    for _ in range(2):
        result = grade("<think>a</think> Answer: yes", "yes", **kwargs)
        assert result["score"] == 5.0
    assert grade(RIGHT, preset="paper")["score"] == 4.0


def test_arguments_of_a_reward_model_are_accepted_and_ignored() -> None:
    assert grade(RIGHT, reward_router_address="x", reward_model_tokenizer=None)["score"] == 4.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"presett": "paper"}, "unknown key 'presett'"),
        ({"preset": "papers"}, "'papers' is none of paper, no_audio_rewards"),
        ({"length_unit": "bytes"}, "'bytes' is neither"),
        ({"weights": {"format": 1}}, "'format' is no component of preset 'paper'"),
        ({"weights": {"no_verdict": -1}}, "'no_verdict' is no component of preset 'paper'"),
        ({"weights": {"answer": "two"}}, "weights.answer: 'two' is not a finite number"),
        ({"weights": {"answer": float("nan")}}, "not a finite number"),
        ({"labels": "json"}, "does not begin with pkg://"),
        ({"labels": [True, False]}, "quote the labels"),
        ({"labels": ["A"]}, "needs two labels"),
        ({"labels": "pkg://soundmind.task.labels:ENTAILED"}, "is no label set"),
        ({"components": [{"name": "x"}]}, "each entry is"),
        ({"components": [{"name": "x", "path": "pkg://nowhere:f"}]}, "cannot import 'nowhere'"),
        ({"components": [{"name": "x", "path": "pkg://json:f"}]}, "'json' has no 'f'"),
        ({"components": [{"name": "answer", "path": "pkg://json:dumps"}]}, "'answer' is taken"),
        ({"components": [{"name": "pred", "path": "pkg://json:dumps"}]}, "'pred' is taken"),
        ({"components": [{"name": "x", "path": "pkg://json:dumps", "w": 1}]}, "unknown key 'w'"),
        ({"components": [{"name": "x", "path": "pkg://json:__name__"}]}, "not a function"),
    ],
)
def test_a_wrong_configuration_names_the_key(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**kwargs)


# --- plug-ins and other label sets


def test_a_plugged_in_component_is_summed_and_returned(plugin_module: Any) -> None:
    def brevity(response: str, row: dict[str, Any]) -> float:
        return 1.0 if len(response) < row["limit"] and row["ground_truth"] == ENTAILED else 0.0

    plugin_module.brevity = brevity
    entry = {"name": "brevity", "path": f"pkg://{plugin_module.__name__}", "weight": 0.5}
    result = grade(RIGHT, row={**ROW, "limit": 100}, components=[entry])
    assert result["score"] == 4.5 and result["brevity"] == 1.0
    assert reward_settings.component_names(components=[entry]) == (*COMPONENTS, "brevity")
    assert max_score(components=[entry]) == 4.5


def test_the_path_of_a_component_may_name_the_function(plugin_module: Any) -> None:
    plugin_module.half = lambda response, row: 0.5
    entry = {"name": "other", "path": f"pkg://{plugin_module.__name__}:half"}
    assert grade(RIGHT, components=[entry])["other"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1, "much", None])
def test_a_component_that_leaves_its_range_counts_zero_and_is_counted(
    plugin_module: Any, bad: object, log: Any
) -> None:
    plugin_module.bad = lambda response, row: bad
    entry = {"name": "bad", "path": f"pkg://{plugin_module.__name__}"}
    result = grade(RIGHT, components=[entry])
    assert (result["score"], result["bad"], result["reward_error"]) == (4.0, 0.0, 1.0)
    assert "component 'bad'" in log.text


def test_a_component_that_raises_keeps_the_group_and_logs_one_traceback(
    plugin_module: Any, log: Any
) -> None:
    def fails(response: str, row: dict[str, Any]) -> float:
        raise KeyError("tempo")

    plugin_module.fails = fails
    entry = {"name": "fails", "path": f"pkg://{plugin_module.__name__}", "weight": 2.0}
    results = [grade(RIGHT, components=[entry]) for _ in range(3)]
    assert [r["score"] for r in results] == [4.0] * 3
    assert [r["reward_error"] for r in results] == [1.0] * 3
    assert log.text.count("Traceback") == 1 and "KeyError: 'tempo'" in log.text


def test_a_component_cannot_change_the_row(plugin_module: Any) -> None:
    def greedy(response: str, row: dict[str, Any]) -> float:
        row["reference_tokens"] = 1
        return 1.0

    plugin_module.greedy = greedy
    row = dict(ROW)
    grade(
        RIGHT, row=row, components=[{"name": "greedy", "path": "pkg://" + plugin_module.__name__}]
    )
    assert row == ROW


@pytest.mark.parametrize("labels", [["A", "B", "C", "D"], {"A": ["dog"], "B": ["cat"]}])
def test_a_multiple_choice_task_uses_the_same_terms(labels: Any) -> None:
    response = "<think>It barks.</think>\nAnswer: (A)."
    assert grade(response, "A", labels=labels)["score"] == 4.0
    assert grade(response, "B", labels=labels)["score"] == 2.0
    spoken = {**ROW, **SPEECH, "speech_transcript": "so the answer A"}
    assert grade(response, "A", spoken, labels=labels)["audio_format"] == 1.0


def test_a_label_set_can_come_from_a_module(plugin_module: Any) -> None:
    plugin_module.SOUNDS = LabelSet.build("sounds", {"dog": ["barking"], "cat": []})
    labels = f"pkg://{plugin_module.__name__}:SOUNDS"
    assert grade("<think>a</think> Answer: barking", "dog", labels=labels)["answer"] == 1.0


# --- properties


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(VERDICTS) | st.text(max_size=5), ROWS, st.sampled_from(list(PRESETS)))
def test_components_are_bounded_keys_constant_and_score_their_weighted_sum(
    text: str, truth: str, row: dict[str, Any], preset: str
) -> None:
    result = grade(text, truth, row, preset=preset)
    weights = PRESETS[preset]
    assert list(result) == list(grade("", preset=preset))
    assert all(0.0 <= result[name] <= 1.0 for name in weights)
    assert result["score"] == pytest.approx(sum(w * result[name] for name, w in weights.items()))
    assert result["score"] <= max_score(preset=preset, has_speech=True)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(VERDICTS))
def test_answer_implies_format_and_accuracy(text: str, truth: str) -> None:
    result = grade(f"<think>{text}</think>\n{answer_line(truth)}", truth)
    assert result["answer"] == min(result["text_format"], result["acc"])


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.booleans())
def test_flipping_the_truth_flips_the_answer_and_nothing_else(text: str, framed: bool) -> None:
    text = f"<think>a{text.replace('think', '')}</think>\nAnswer: entailed" if framed else text
    one, other = (grade(text, truth) for truth in VERDICTS)
    expected = one["text_format"] if one["parsed"] else 0.0
    assert one["answer"] + other["answer"] == expected
    assert one["acc"] + other["acc"] == one["parsed"]
    differing = {key for key in KEYS if one[key] != other[key]}
    assert differing <= {"answer", "acc", "score"}
    assert not framed or differing == {"answer", "acc", "score"}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 2500))
def test_length_credit_rises_up_to_the_reference_and_is_flat_after_it(
    first: int, second: int, reference: int
) -> None:
    low, high = (
        grade(RIGHT, row={"reference_tokens": reference, "response_tokens": n})["text_length"]
        for n in sorted((first, second))
    )
    assert low <= high
    if min(first, second) >= reference:
        assert low == high == 1.0
    elif first != second:
        assert low < high


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.sampled_from(list(PRESETS)))
def test_grading_is_deterministic_and_leaves_the_row_alone(text: str, preset: str) -> None:
    row = dict(ROW)
    assert grade(text, row=row, preset=preset) == grade(text, row=row, preset=preset)
    assert row == ROW


def test_threads_with_different_configurations_do_not_disturb_each_other() -> None:
    wrong: list[float] = []

    def work(weight: float) -> None:
        for _ in range(500):
            score = grade(RIGHT, weights={"answer": weight})["score"]
            if score != 2.0 + weight:
                wrong.append(score)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- verl's contract and imports


def test_importing_the_reward_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; import soundmind.rewards, soundmind.task.rescore; "
        "heavy = {'torch', 'numpy', 'verl', 'vllm', 'transformers', 'omegaconf'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
