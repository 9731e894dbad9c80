"""Gold answers graded before any model runs: the label as an ideal response, the teacher's text.

The published annotations are found through SOUNDMIND_ALR_DIR or in ../shared/data/alr; without
them their tests skip. Our own sample in data/sample has the same layout and is always there.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from soundmind.task import guards
from soundmind.task.labels import answer_line, parse_verdict, split_response, verdict_of
from soundmind.task.reward import compute_score

ROOT = Path(__file__).resolve().parents[2]
ALR_DIR = Path(os.environ.get("SOUNDMIND_ALR_DIR", ROOT.parent / "shared" / "data" / "alr"))
SAMPLE_DIR = ROOT / "data" / "sample"

# split -> (rows, rows labelled entailed, rows whose teacher contradicts the label)
COUNTS = {"dev": (606, 264, 33), "test": (656, 296, 31)}
FILES = [
    *(pytest.param(SAMPLE_DIR / f"{split}.jsonl", id=f"sample-{split}") for split in
      ("train", "dev", "test")),
    *(
        pytest.param(
            ALR_DIR / f"{split}.jsonl",
            id=f"alr-{split}",
            marks=pytest.mark.skipif(
                not (ALR_DIR / f"{split}.jsonl").is_file(),
                reason=f"no {split}.jsonl of the published annotations; set SOUNDMIND_ALR_DIR",
            ),
        )
        for split in COUNTS
    ),
]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reasoning_and_closing(answer: str) -> tuple[str, str]:
    """The annotated reasoning without its last line, and that line."""
    reasoning, _, closing = answer.rstrip().rpartition("\n")
    return reasoning, closing


def grade(annotation: dict[str, Any], response: str, preset: str = "paper") -> dict[str, Any]:
    row = {"reference_words": len(annotation["answer"].split())}
    truth = verdict_of(annotation["label"])
    return compute_score("soundmind/alr", response, truth, row, preset=preset, length_unit="words")


@pytest.mark.parametrize("path", FILES)
def test_every_label_written_as_an_ideal_response_earns_format_and_answer(path: Path) -> None:
    annotations = read(path)
    assert annotations
    for annotation in annotations:
        reasoning, _ = reasoning_and_closing(annotation["answer"])
        closing = answer_line(verdict_of(annotation["label"]))
        result = grade(annotation, f"<think>{reasoning}</think>\n{closing}")
        assert (result["text_format"], result["answer"], result["acc"]) == (1.0, 1.0, 1.0)
        assert result["text_length"] > 0.9  # the label may be a word shorter than the teacher's


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("preset", ["paper", "guarded"])
def test_annotated_reasoning_in_the_required_form_loses_only_wrong_answers(
    path: Path, preset: str
) -> None:
    disagreements = 0
    for annotation in (annotations := read(path)):
        reasoning, closing = reasoning_and_closing(annotation["answer"])
        result = grade(annotation, f"<think>{reasoning}</think>\n{closing}", preset)
        assert (result["text_format"], result["text_length"], result["parsed"]) == (1.0, 1.0, 1.0)
        assert result["answer"] == result["acc"]
        disagreements += result["acc"] == 0.0
    if ALR_DIR in path.parents:
        rows, entailed, expected = COUNTS[path.stem]
        assert len(annotations) == rows and disagreements == expected
        assert sum(annotation["label"] for annotation in annotations) == entailed
    else:
        assert disagreements == sum(
            parse_verdict(annotation["answer"]) != verdict_of(annotation["label"])
            for annotation in annotations
        )


@pytest.mark.parametrize("path", FILES)
def test_bare_annotations_state_a_verdict_in_the_last_five_words(path: Path) -> None:
    for annotation in read(path):
        last_five = " ".join(annotation["answer"].split()[-5:])
        assert parse_verdict(annotation["answer"]) is not None
        assert parse_verdict(last_five[last_five.rindex("Answer:") :]) is not None
        assert not split_response(annotation["answer"]).well_formed  # no tags, no format


@pytest.mark.parametrize("path", FILES)
def test_no_question_states_a_verdict(path: Path) -> None:
    assert all(parse_verdict(annotation["user_content"]) is None for annotation in read(path))


@pytest.mark.parametrize("path", FILES)
def test_guards_find_no_repetition_in_annotated_reasoning(path: Path) -> None:
    for annotation in read(path):
        assert guards.novelty(annotation["answer"]) >= guards.NATURAL_NOVELTY


def test_disagreements_of_the_sample_stay_rare() -> None:
    annotations = [
        a for split in ("train", "dev", "test") for a in read(SAMPLE_DIR / f"{split}.jsonl")
    ]
    wrong = sum(parse_verdict(a["answer"]) != verdict_of(a["label"]) for a in annotations)
    assert wrong <= 0.1 * len(annotations)
