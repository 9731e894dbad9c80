"""Rollouts that are spoken in the actor's process, with the policy as it is at that moment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from processes import REPOSITORY, start_ranks

CASES = ["mixed", "mixed-packed", "mixed-keyed"]


def speak(model: Path, folder: Path, ranks: int, cases: list[str], *more: str) -> dict[str, Any]:
    output = folder / f"{ranks}.pt"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/speech_rank.py")]
    command += ["--model", str(model), "--ranks", str(ranks), "--output", str(output), *more]
    command += ["--rendezvous", str(folder / f"rendezvous{ranks}"), "--cases", *cases]
    return start_ranks(command, ranks, output)[0]


def wanted(model: Path, weights: dict[str, Any]) -> dict[int, list[int]]:
    """Codes of every row by transformers' thinker with `weights`, row by row."""
    from engine_rank import build_rows
    from speech_rank import SETTINGS
    from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

    from soundmind.model.processor import load_processor
    from soundmind.speech.decoding import SpeechSettings
    from soundmind.speech.states import mark_embeddings, thinker_states
    from soundmind.speech.talker import Talker
    from soundmind.speech.weights import load_part, load_voice

    thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        AutoConfig.from_pretrained(model).thinker_config, dtype=torch.float32
    ).eval()
    load_part(thinker, model, "thinker.")
    ours = {name.removeprefix("thinker."): tensor for name, tensor in weights.items()}
    assert not thinker.load_state_dict(ours, strict=False).unexpected_keys
    talker = Talker(model)
    start = load_voice(model, SETTINGS["speaker"]).start_token
    marks = mark_embeddings(thinker, start, talker.mark_ids)
    settings = SpeechSettings(temperature=0.0, max_seconds=SETTINGS["max_seconds"])
    found = {}
    for row in build_rows(load_processor(str(model)), "mixed"):
        said = torch.as_tensor(row["response"])[:-1]
        ids = torch.cat([row["prompt"], said])[None]
        states = thinker_states(thinker, ids, **row["features"])
        inputs = talker.inputs(states, len(row["prompt"]), marks)
        found[row["index"]] = list(talker.speak([inputs], [0], settings)[0].tokens)
    return found


@pytest.fixture(scope="module")
def two_ranks(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return speak(random_stand_in, tmp_path_factory.mktemp("speech"), 2, CASES)


@pytest.fixture(scope="module")
def expected(random_stand_in: Path, two_ranks: dict[str, Any]) -> dict[int, list[int]]:
    return wanted(random_stand_in, two_ranks["weights"])


@pytest.mark.parametrize("case", CASES)
def test_every_rollout_of_two_ranks_is_spoken_once_from_the_current_policy(
    two_ranks: dict[str, Any], expected: dict[int, list[int]], case: str
) -> None:
    assert_spoken(two_ranks["cases"][case], expected)


def test_a_thinker_of_an_earlier_step_says_something_else(
    random_stand_in: Path, expected: dict[int, list[int]]
) -> None:
    assert wanted(random_stand_in, {}) != expected


def test_the_adapter_is_heard(
    random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = speak(random_stand_in, tmp_path_factory.mktemp("lora"), 1, ["mixed-split"], "--lora")
    adapted = wanted(random_stand_in, result["weights"])
    assert adapted != wanted(random_stand_in, {})
    assert_spoken(result["cases"]["mixed-split"], adapted)


def assert_spoken(found: dict[int, str], codes: dict[int, list[int]]) -> None:
    from speech_rank import UNSPOKEN

    assert found[UNSPOKEN] == ""  # as padding is
    said = {index: json.loads(text)["codes_digest"] for index, text in found.items() if text}
    assert said == {index: digest(own) for index, own in codes.items() if index != UNSPOKEN}


def digest(codes: list[int]) -> str:
    from soundmind.training.speech import codes_digest

    return codes_digest(codes)
