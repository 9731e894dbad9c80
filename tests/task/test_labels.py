"""Claims about verdicts and the format rule; every case is one a model has written or might."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundmind.task.labels import (
    ENTAILED,
    ENTAILMENT,
    NOT_ENTAILED,
    VERDICTS,
    LabelSet,
    answer_line,
    choices,
    label_of,
    parse_spoken_verdict,
    parse_verdict,
    split_response,
    verdict_of,
)

FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<think>", "</think>", "<THINK>", "Answer:", "answer :", "**Answer:**", " entailed",
            " not entailed", " not-entailed", "not", ".", "?", "*", "_", "`", '"', "\n", "\r\n",
            " or ", " ", "because", "\u200f", "\u0435ntailed", "\u0130", "\u00a0", "\ud800",
        ]
    )
    | st.text(max_size=8),
    max_size=24,
).map("".join)  # fmt: skip


def test_labels_and_verdicts_are_each_others_inverse() -> None:
    assert [label_of(verdict_of(label)) for label in (0, 1)] == [0, 1]
    assert VERDICTS[1] == ENTAILED and VERDICTS[0] == NOT_ENTAILED
    assert label_of("Not entailed.") == 0


@pytest.mark.parametrize("label", [-1, 2])
def test_unknown_label_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match="neither 0"):
        verdict_of(label)


def test_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="maybe"):
        label_of("maybe")


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_answer_line_reads_back_as_its_verdict(verdict: str) -> None:
    assert parse_verdict(answer_line(verdict)) == verdict


SPELLINGS = {
    "entailed": ENTAILED,
    "ENTAILED": ENTAILED,
    "not entailed": NOT_ENTAILED,
    "not-entailed": NOT_ENTAILED,
    "Not  Entailed": NOT_ENTAILED,
    "NOT-ENTAILED": NOT_ENTAILED,
    "**not** entailed": NOT_ENTAILED,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "line",
    [
        "Answer: {}",
        "answer: {}.",
        "ANSWER: {}!",
        "**Answer:** {}",
        "**Answer: {}**",
        "**Answer**: *{}*.",
        "_Answer: {}_",
        'Answer: "{}."',
        "Answer: '{}'",
        "Answer: \u201c{}\u201d",
        "Answer: `{}`",
        "Answer: ({})",
        "Answer : {}...",
        "Answer:{}",
        "- Answer: {}",
        "Therefore it is not entailed, or is it entailed?\nAnswer: {}.",
        "### Answer: {}",
        "> Answer: {}",
        "Answer: {}\r\n",
        "Answer: {}\n\n\n",
    ],
)
def test_both_verdicts_are_read_in_every_dress(line: str, spelling: str) -> None:
    assert parse_verdict(line.format(spelling)) == SPELLINGS[spelling]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "entailed",
        "The conclusion is entailed.",
        "Answer:",
        "Answer:\nentailed",
        "Answer: not",
        "Answer: maybe entailed",
        "Answer: entailed or not entailed",
        "Answer: entailed/not-entailed",
        "Answer: entailed, not-entailed",
        "Answer: entailed?",
        "Answer: entailed not",
        "Answer: not necessarily entailed",
        "Answer: not, entailed",
        "Answer: (not) entailed",
        "Answer: !entailed",
        "Answer: \u00acentailed",
        "Answer: entailed\nAnswer: not-entailed",
        "Answer: entailed\n\n**Answer: not entailed**\n",
        "Answer: entailed\nor\nAnswer: not entailed",
        "Answer: entailed\nor not entailed",
        "Answer: entailed. Answer: not entailed.",
        "Answer: entailed\nAnswer: undecided",
        "finish with 'Answer: entailed' or 'Answer: not-entailed'",
        "<think>Answer: entailed</think>",
        "<think>Answer: entailed",
        "Answer: entailed\n<think>so</think>",
        "<think>a</think>\nAnswer: entailed\n<think>",
        "<Think>Answer: entailed</Think>",
        "An\u017fwer: entailed",
        "Answer: \u0435ntailed",
        "Answer: ent\u200bailed",
        "Answer: \u200fentailed",
        "Answer: not\u2011entailed",
        "Answer\uff1a entailed",
        "Answer: <answer>entailed</answer>",
        "Answer: ent*ai*led",
        "myanswer: entailed",
        "I cannot conclude Answer: entailed",
        "So, Answer: entailed",
        "Final Answer: entailed",
        "1. Answer: entailed",
        "not Answer: entailed",
        "I cannot conclude\u2028Answer: entailed",
        "Answer - not entailed\nAnswer: entailed",
        "Answers: not entailed\nAnswer: entailed",
        "\u0410nswer: not entailed\nAnswer: entailed",
        "Answer\uff1a not entailed\nAnswer: entailed",
        "Answer: entailed\nNo, that is wrong.",
        "Answer: entailed\nWait.",
        "Answer: entailed\nEvery wug is a fep.\nActually, none is.",
        "Answer: entailed" + " " * 3000 + "or not entailed",
    ],
)
def test_hedges_contradictions_and_look_alikes_are_no_verdict(text: str) -> None:
    assert parse_verdict(text) is None


def test_last_verdict_holds_when_the_model_changes_its_mind() -> None:
    assert parse_verdict("Answer: entailed\nWait, no.\nAnswer: not entailed") == NOT_ENTAILED
    assert parse_verdict("Answer: entailed.\n\nHmm, wait.\nAnswer: not entailed.") == NOT_ENTAILED


def test_a_verdict_within_a_sentence_does_not_contradict_the_closing_line() -> None:
    assert parse_verdict("Hence, Answer: entailed.\n\n\nAnswer: not entailed.") == NOT_ENTAILED


def test_an_explanation_after_the_verdict_costs_the_format_and_not_the_verdict() -> None:
    response = split_response("<think>a</think>\nAnswer: not-entailed\nIt isn't entailed.")
    assert response.verdict == NOT_ENTAILED and not response.well_formed


def test_an_answer_line_far_from_the_end_is_not_final_but_still_counts_as_stated() -> None:
    assert parse_verdict("Answer: entailed\n" + "so " * 30_000) is None
    response = split_response("<think>a</think>\nAnswer: entailed\n" + "so " * 30_000 + "\n"
                              "Answer: entailed")  # fmt: skip
    assert response.verdict == ENTAILED and not response.well_formed


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 1000])
def test_the_text_after_the_last_of_many_blocks_is_read(num_blocks: int) -> None:
    blocks = "<think>Answer: entailed</think>" * num_blocks
    assert parse_verdict(blocks + "\nAnswer: not entailed") == NOT_ENTAILED
    assert parse_verdict(blocks + "\n<think>\nAnswer: not entailed") is None


def test_only_text_after_the_thinking_is_read() -> None:
    text = "<think>Answer: entailed</think>\nAnswer: not entailed"
    assert parse_verdict(text) == NOT_ENTAILED
    assert split_response(text).thinking == "Answer: entailed"


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think>\nAnswer: entailed",
        "  \n<think>a</think>Answer: entailed\n  ",
        "<think>\nline one\n\nline two\n</think>\n\nThe premises force it.\nAnswer: entailed.",
        "<think>3</think> Answer: **entailed**.",
        "<think>a</think>\nThe answer follows.\nAnswer: entailed",
        "<think>a</think>\nThe answer - as we saw - follows.\n- Answer: entailed",
        "<think>\u7532</think>\nAnswer: entailed",
        "<think>Answer: not entailed?</think>\nAnswer: entailed",
        "<think>a</think>\nAnswer: entailed\n```",
    ],
)
def test_one_block_then_the_verdict_is_well_formed(text: str) -> None:
    response = split_response(text)
    assert response.well_formed and response.verdict == ENTAILED


@pytest.mark.parametrize(
    "text",
    [
        "Answer: entailed",
        "<think></think>\nAnswer: entailed",
        "<think> \n </think>\nAnswer: entailed",
        "<think>...</think>\nAnswer: entailed",
        "Well. <think>a</think>\nAnswer: entailed",
        "\ufeff<think>a</think>\nAnswer: entailed",
        "<think>a</think><think>b</think>\nAnswer: entailed",
        "<think>a<think>b</think></think>\nAnswer: entailed",
        "a</think>\nAnswer: entailed",
        "</think>a<think>\nAnswer: entailed",
        "<THINK>a</THINK>\nAnswer: entailed",
        "<think>a</think>\nAnswer: entailed\nAnswer: entailed",
        "<think>a</think>\nAnswer: entailed\nThank you!",
        "<think>a</think>\nSo Answer: entailed",
        "<think>a</think>\nI cannot conclude Answer: entailed",
        "<think>a</think>\nAnswers: entailed\nso\nAnswer: entailed",
        "<think>a</think>\nAnswer - not entailed, said I.\nAnswer: entailed",
        "<think>a</think>\nThe answer = entailed, said I.\nAnswer: entailed",
        "<think>a</think>\n\u0410nswer: entailed, said I.\nAnswer: entailed",
        "<think>a</think>\nAn\u200bswer\uff1a entailed, said I.\nAnswer: entailed",
        "<think>a</think>\nAnswer: entailed \u2705",
        "<think>a</think>\nentailed",
        "<think>a</think>",
    ],
)
def test_anything_else_is_not_well_formed(text: str) -> None:
    assert not split_response(text).well_formed


@pytest.mark.parametrize(
    ("transcript", "verdict"),
    [
        ("So nothing follows. Answer. Not entailed.", NOT_ENTAILED),
        ("it follows answer entailed", ENTAILED),
        ("Answer: not-entailed", NOT_ENTAILED),
        ("the answer is entailed", None),
        ("answer entailed thank you", None),
        ("answer entailed or answer not entailed", None),
        ("entailed", None),
        ("", None),
    ],
)
def test_a_transcript_is_read_by_its_last_words(transcript: str, verdict: str | None) -> None:
    assert parse_spoken_verdict(transcript) == verdict


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Answer: B", "B"),
        ("Answer: (b).", "B"),
        ("**Answer:** **D**", "D"),
        ("Answer: E", None),
        ("Answer: A or B", None),
        ("Answer: B) the dog barks", None),
        ("Answer: A\nAnswer: B", None),
    ],
)
def test_the_same_parser_reads_a_multiple_choice_task(text: str, choice: str | None) -> None:
    assert parse_verdict(text, choices("ABCD")) == choice


def test_a_choice_may_have_spellings_of_its_own() -> None:
    labels = LabelSet.build("sounds", {"dog": ["a dog", "Barking!"], "cat": []})
    assert parse_verdict("Answer: A  Dog.", labels) == "dog"
    assert parse_verdict("Answer: barking", labels) == "dog"


@pytest.mark.parametrize(
    "table", [["yes"], ["yes", " "], {"yes": ["ja"], "no": ["JA"]}, ["yes", "Yes."]]
)
def test_ambiguous_label_sets_are_refused(table: list[str] | dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="label set 'bad'"):
        LabelSet.build("bad", table)


@settings(max_examples=300, deadline=None)
@given(FRAGMENTS)
def test_no_text_breaks_the_parser(text: str) -> None:
    response = split_response(text)
    assert response.verdict in (None, *VERDICTS)
    assert not response.well_formed or (response.verdict is not None and response.has_thinking)
    assert parse_verdict(text) == response.verdict


@settings(max_examples=200, deadline=None)
@given(FRAGMENTS, st.sampled_from(VERDICTS))
def test_a_line_of_its_own_decides_after_words_without_a_verdict(text: str, verdict: str) -> None:
    closing = f"\nso\n{answer_line(verdict)}"
    assert parse_verdict("<think>" + text + "</think>" + closing) == verdict


@settings(max_examples=200, deadline=None)
@given(FRAGMENTS)
def test_thinking_never_changes_the_verdict(text: str) -> None:
    assert parse_verdict(f"<think>{text}</think>\nAnswer: entailed") == ENTAILED


@settings(max_examples=200, deadline=None)
@given(FRAGMENTS, st.sampled_from(VERDICTS))
def test_surrounding_whitespace_changes_nothing(text: str, verdict: str) -> None:
    plain, padded = split_response(text, ENTAILMENT), split_response(f" \n{text}\n\t ", ENTAILMENT)
    assert (plain.verdict, plain.well_formed) == (padded.verdict, padded.well_formed)
