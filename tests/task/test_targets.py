"""What supervised fine-tuning teaches of an annotation, and what it leaves out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from soundmind.task.labels import split_response, verdict_of
from soundmind.task.targets import LeftOutError, taught_reasoning, taught_text


@pytest.mark.parametrize(
    "answer",
    [
        "It follows.\n\n\n\nAnswer: entailed.",
        "It follows.\n**Answer:** Entailed",
        "<think>It follows.</think>\nAnswer: entailed",
    ],
)
def test_the_closing_verdict_leaves_the_reasoning_and_comes_back_as_asked(answer: str) -> None:
    taught = taught_text(taught_reasoning(answer, 1), 1)
    assert taught == "<think>It follows.</think>\nAnswer: entailed"


@pytest.mark.parametrize(
    ("answer", "label", "reason"),
    [
        ("It follows.", 1, "no_verdict"),
        ("It follows.\nAnswer: perhaps", 1, "no_verdict"),
        ("Answer: entailed\nNo wait, I have to think again.", 1, "no_verdict"),
        ("It follows.\nAnswer: entailed", 0, "contradicts_label"),
        ("\n\nAnswer: entailed.", 1, "empty_reasoning"),
        ("...\nAnswer: entailed", 1, "empty_reasoning"),
        ("I <think> it follows.\nAnswer: entailed", 1, "no_verdict"),
        ("So </think> it follows.\nAnswer: entailed", 1, "not_the_asked_form"),
    ],
)
def test_an_annotation_that_cannot_be_taught_says_why(answer: str, label: int, reason: str) -> None:
    with pytest.raises(LeftOutError) as error:
        taught_reasoning(answer, label)
    assert error.value.reason == reason


def test_of_the_real_dev_annotations_33_contradict_their_label_and_the_rest_is_taught(
    alr_dev: Path,
) -> None:
    reasons: Counter[str] = Counter()
    for line in alr_dev.read_text().splitlines():
        row = json.loads(line)
        try:
            reasoning = taught_reasoning(row["answer"], row["label"])
        except LeftOutError as error:
            reasons[error.reason] += 1
            continue
        reasons["taught"] += 1
        response = split_response(taught_text(reasoning, row["label"]))
        assert response.well_formed and response.verdict == verdict_of(row["label"])
        assert row["answer"].strip().startswith(reasoning)
    assert reasons == {"taught": 573, "contradicts_label": 33}
