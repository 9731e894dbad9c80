"""What supervised fine-tuning teaches: an annotated answer in the form that the prompt asks for. [ours]

The annotations reason in free text and close with the teacher's verdict; the prompt asks for the
reasoning between think tags and the verdict on a line of its own:

    Okay, let's see ... so it follows.          <think>Okay, let's see ... so it follows.</think>
                                           ->   Answer: entailed
    Answer: entailed.

A row teaches only what its label bears out. Every other row is left out under one of `REASONS`.
Standard library only.
"""

from __future__ import annotations

import re

from soundmind.task.labels import answer_line, parse_verdict, split_response, verdict_of

# Why a row is not taught, in the order in which the reasons are looked for.
REASONS = ("no_verdict", "contradicts_label", "empty_reasoning", "not_the_asked_form")

_CLOSING = re.compile(r"[*_`\"' \t(]*answer[*_`\"' \t]{0,8}:[^\n]*\Z", re.IGNORECASE)


class LeftOutError(ValueError):
    """An annotation that is not taught; `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def taught_reasoning(answer: str, label: int) -> str:
    """The reasoning of an annotated answer, without its closing verdict and without tags.

    Raises `LeftOutError` where it closes with no verdict or not with that of `label`, where nothing
    is left of it, or where it holds think tags that do not make one block.
    """
    response = split_response(answer)
    text = answer.rstrip()
    closing = _CLOSING.search(text)
    if closing is None or response.verdict is None:
        raise LeftOutError("no_verdict")
    if response.verdict != verdict_of(label):
        raise LeftOutError("contradicts_label")
    reasoning = response.thinking if response.one_block else text[: closing.start()]
    if not re.search(r"[^\W_]", reasoning):
        raise LeftOutError("empty_reasoning")
    written = split_response(taught_text(reasoning.strip(), label))
    if not written.well_formed or parse_verdict(written.text) != verdict_of(label):
        raise LeftOutError("not_the_asked_form")
    return reasoning.strip()


def taught_text(reasoning: str, label: int) -> str:
    """The response that is taught: `reasoning` between think tags, then the verdict of `label`."""
    return f"<think>{reasoning}</think>\n{answer_line(verdict_of(label))}"
