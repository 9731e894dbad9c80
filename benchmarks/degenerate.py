"""What cheating earns: degenerate responses, graded, as the tables of docs/rewards.md.

    python benchmarks/degenerate.py                          # print the two tables
    python benchmarks/degenerate.py --write docs/rewards.md  # and put them between the marks there

`RESPONSES` break the format or state no single verdict: none may earn the answer term against
either truth, and under the preset `guarded` none may outscore an honest wrong answer. `SHELLS`
keep the format around no reasoning at all. A rule cannot see a guess, so a right one earns the
answer like any other; `guarded` refuses those whose thinking is a loop. Lengths are words here,
so that no tokenizer is needed; the reference length is that of `REASONING`. A test compares the
page with what the code earns, so the page cannot go stale.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from soundmind.task.labels import ENTAILED, NOT_ENTAILED, VERDICTS, answer_line
from soundmind.task.prompts import INSTRUCTIONS
from soundmind.task.reward import compute_score

BEGIN, END = "<!-- degenerate: begin -->", "<!-- degenerate: end -->"


MEGABYTE = 1_000_000


QUESTION = (
    "Let us see how these statements hang together. 'Entailed' means the premises force the "
    "conclusion, 'not-entailed' means they do not. The first premise says that every ferry to the "
    "island leaves before noon. The second premise says that the last bus reaches the harbour at "
    "one in the afternoon. The conclusion says that whoever takes the last bus misses the ferry "
    "of that day. Is the conclusion 'entailed' or 'not-entailed' based on these premises?"
)


REASONING = (
    "Let me lay out the times first. Every ferry to the island is gone by noon, without exception, "
    "since the first premise says every ferry and not most of them. The last bus pulls in at one "
    "in the afternoon, which is an hour after the latest possible departure. So a passenger on "
    "that bus stands on the quay when no boat of the day is left. Could there be a way around it? "
    "A later ferry is ruled out by the word every, and an earlier arrival is ruled out because we "
    "speak of the last bus and its fixed hour. Delays could only make things worse. Somebody might "
    "take an earlier bus, but the conclusion does not speak about that person. Both premises are "
    "needed, and together they leave no gap, so the conclusion is forced."
)


REFERENCE_WORDS = len(REASONING.split())


ROW = {"reference_words": REFERENCE_WORDS}


class Degenerate(NamedTuple):
    """A response and what is wrong with it."""

    what: str
    response: str


def think(thinking: str, closing: str = answer_line(ENTAILED)) -> str:
    """A response with this thinking and these last words."""
    return f"<think>{thinking}</think>\n{closing}"


def honest(verdict: str) -> str:
    """A full-length, well-formed response; wrong wherever `verdict` is not the truth."""
    return think(REASONING, answer_line(verdict))


def earned(response: str, truth: str, preset: str) -> dict[str, float | int | str]:
    """Grade a response in words against the example's reference length."""
    return compute_score("degenerate", response, truth, ROW, preset=preset, length_unit="words")


def _noise(num_characters: int, alphabet: str) -> str:
    return "".join(random.Random(0).choices(alphabet, k=num_characters))


def _fill(phrase: str, times_reference: float = 1.0) -> str:
    """The phrase repeated until it has the reference number of words."""
    repeats = round(times_reference * REFERENCE_WORDS / len(phrase.split())) + 1
    return " ".join([phrase] * repeats)


def _random_words(num_words: int) -> str:
    rng = random.Random(0)
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(num_words))


_THOUGHT = "Every ferry leaves before noon and the bus comes at one."


_YES, _NO = answer_line(ENTAILED), answer_line(NOT_ENTAILED)


RESPONSES = (
    Degenerate("empty", ""),
    Degenerate("whitespace only", " \n\t \n"),
    Degenerate("tags and nothing else", "<think></think>"),
    Degenerate("empty thinking, then a verdict", think("")),
    Degenerate("thinking of blank lines, then a verdict", think("\n \n")),
    Degenerate("thinking of dots, then a verdict", think("...")),
    Degenerate("thinking of emoji, then a verdict", think("\U0001f914\U0001f914")),
    Degenerate("opening tag only", "<think>"),
    Degenerate("thinking never closed, verdict inside", f"<think>{_THOUGHT}\n{_YES}"),
    Degenerate("thinking cut off at the length limit", f"<think>{REASONING[:400]}"),
    Degenerate("thinking closed but never opened", f"{_THOUGHT}</think>\n{_YES}"),
    Degenerate("tags in the wrong order", f"</think>{_THOUGHT}<think>\n{_YES}"),
    Degenerate("two blocks, then a verdict", f"<think>a</think><think>b</think>\n{_YES}"),
    Degenerate("ten blocks, then a verdict", "<think>a</think>" * 10 + f"\n{_YES}"),
    Degenerate("nested tags, then a verdict", think(f"<think>{_THOUGHT}</think>")),
    Degenerate("closed twice", f"<think>{_THOUGHT}</think></think>\n{_YES}"),
    Degenerate("thinking opened again after the verdict", think(_THOUGHT) + "\n<think>"),
    Degenerate("tags in capitals", f"<THINK>{_THOUGHT}</THINK>\n{_YES}"),
    Degenerate("tags with spaces", f"< think >{_THOUGHT}< /think >\n{_YES}"),
    Degenerate("other tags", f"<thinking>{_THOUGHT}</thinking>\n{_YES}"),
    Degenerate("tags in a code fence", f"```\n<think>{_THOUGHT}</think>\n```\n{_YES}"),
    Degenerate("the whole response in a code fence", f"```\n{think(_THOUGHT)}\n```"),
    Degenerate("words before the thinking", f"Sure! {think(_THOUGHT)}"),
    Degenerate("reasoning and verdict without tags", f"{REASONING}\n{_YES}"),
    Degenerate("verdict without any thinking", _YES),
    Degenerate("verdict first, thinking last", f"{_YES}\n<think>{_THOUGHT}</think>"),
    Degenerate("verdict before and after the thinking", f"{_YES}\n{think(_THOUGHT)}"),
    Degenerate("verdict only inside the thinking", f"<think>{_THOUGHT}\n{_YES}</think>"),
    Degenerate("thinking, then silence", think(_THOUGHT, "")),
    Degenerate("the bare word instead of the answer line", think(_THOUGHT, "entailed")),
    Degenerate("answer line without a verdict", think(_THOUGHT, "Answer:")),
    Degenerate("answer line with half a verdict", think(_THOUGHT, "Answer: not")),
    Degenerate("a verdict of its own", think(_THOUGHT, "Answer: undecidable")),
    Degenerate("both verdicts, one per line", think(_THOUGHT, f"{_YES}\n{_NO}")),
    Degenerate("both verdicts, in one line", think(_THOUGHT, f"{_YES} {_NO}")),
    Degenerate("denied: words before the marker", think(_THOUGHT, f"I cannot conclude {_YES}")),
    Degenerate("a sentence that ends in the answer", think(_THOUGHT, f"So, after all, {_YES}")),
    Degenerate("both verdicts: Answers", think(_THOUGHT, f"Answers: not entailed\n{_YES}")),
    Degenerate("both verdicts: Answer -", think(_THOUGHT, f"Answer - not entailed, or\n{_YES}")),
    Degenerate(
        "both verdicts: look-alike marker",
        think(_THOUGHT, f"\u0410nswer: not entailed. Or\n{_YES}"),
    ),
    Degenerate("hedge: or", think(_THOUGHT, f"{_YES} or not entailed")),
    Degenerate("hedge: or, on the next line", think(_THOUGHT, f"{_YES}\nor not entailed")),
    Degenerate("hedge: slash", think(_THOUGHT, "Answer: entailed/not-entailed")),
    Degenerate("hedge: question mark", think(_THOUGHT, f"{_YES}?")),
    Degenerate("hedge: probably", think(_THOUGHT, "Answer: probably entailed")),
    Degenerate("hedge: neither", think(_THOUGHT, "Answer: neither entailed nor not entailed")),
    Degenerate("negation by a sign", think(_THOUGHT, "Answer: !entailed")),
    Degenerate("the same verdict twice", think(_THOUGHT, f"{_YES}\n{_YES}")),
    Degenerate("the same verdict fifty times", think(_THOUGHT, f"{_YES}\n" * 50)),
    Degenerate("verdict, then taken back", think(_THOUGHT, f"{_YES}\nWait, no.\n{_NO}")),
    Degenerate("verdict, then an explanation", think(_THOUGHT, f"{_YES}\nThe bus is late.")),
    Degenerate("verdict, then an emoji", think(_THOUGHT, f"{_YES} \u2705")),
    Degenerate("answer tags", think(_THOUGHT, "<answer>entailed</answer>")),
    Degenerate("boxed answer", think(_THOUGHT, "Answer: \\boxed{entailed}")),
    Degenerate("JSON", '{"think": "the bus is late", "answer": "entailed"}'),
    Degenerate(
        "look-alike: Cyrillic letter in the verdict", think(_THOUGHT, "Answer: \u0435ntailed")
    ),
    Degenerate("look-alike: long s in the marker", think(_THOUGHT, "An\u017fwer: entailed")),
    Degenerate("look-alike: full-width colon", think(_THOUGHT, "Answer\uff1a entailed")),
    Degenerate("look-alike: non-ASCII hyphen", think(_THOUGHT, "Answer: not\u2011entailed")),
    Degenerate("zero-width space in the verdict", think(_THOUGHT, "Answer: ent\u200bailed")),
    Degenerate("right-to-left mark before the verdict", think(_THOUGHT, "Answer: \u200fentailed")),
    Degenerate("right-to-left override", think(_THOUGHT, "Answer: \u202edeliatne\u202c")),
    Degenerate("the instruction echoed", INSTRUCTIONS["alr"]),
    Degenerate("the practice instruction echoed", INSTRUCTIONS["practice"]),
    Degenerate("the question copied", QUESTION),
    Degenerate("the question copied as thinking, no verdict", think(QUESTION, "")),
    Degenerate("one word to the reference length", _fill("hmm")),
    Degenerate("one word to ten times the reference length", _fill("hmm", 10)),
    Degenerate("a sentence to the reference length", _fill(_THOUGHT)),
    Degenerate("one letter 5,000 times, no space", "a" * 5000),
    Degenerate("answer lines to the reference length", _fill(f"{_YES}\n")),
    Degenerate("both answer lines in turn to the reference length", _fill(f"{_YES}\n{_NO}\n")),
    Degenerate("random words to the reference length", _random_words(REFERENCE_WORDS)),
    Degenerate("1 MB of noise with spaces", _noise(MEGABYTE, "abcdefghij <>/:\n")),
    Degenerate("1 MB of noise without spaces", _noise(MEGABYTE, "abcdefghij")),
    Degenerate("1 MB of opening tags", "<think>" * (MEGABYTE // 7)),
    Degenerate("1 MB of answer markers", "Answer:" * (MEGABYTE // 7)),
    Degenerate("control characters and a lone surrogate", "\x00\x1b[0m\ud800\uffff"),
)


SHELLS = (
    Degenerate("one word of thinking", think("ok")),
    Degenerate("one word to the reference length", think(_fill("hmm"))),
    Degenerate("one sentence to the reference length", think(_fill(_THOUGHT))),
    Degenerate("one letter 5,000 times, no space", think("a" * 5000)),
    Degenerate("the verdict, over and over", think(_fill(_YES))),
    Degenerate("the question copied", think(QUESTION)),
    Degenerate("the question four times", think(" ".join([QUESTION] * 4))),
    Degenerate(
        "half the reasoning, twice", think(" ".join([REASONING[: len(REASONING) // 2]] * 2))
    ),
    Degenerate("random words to the reference length", think(_random_words(REFERENCE_WORDS))),
    Degenerate("random words, ten times too many", think(_random_words(10 * REFERENCE_WORDS))),
)


def responses_table() -> str:
    """Markdown table of `RESPONSES`; no column depends on the truth, as none earns the answer."""
    lines = [
        "| # | response | verdict read | text_format | answer | text_length | paper | guarded |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for number, case in enumerate(RESPONSES, start=1):
        paper = [earned(case.response, truth, "paper") for truth in VERDICTS]
        guarded = [earned(case.response, truth, "guarded") for truth in VERDICTS]
        answer = max(float(result["answer"]) for result in (*paper, *guarded))
        lines.append(
            f"| {number} | {case.what} | {paper[0]['pred'] or '-'} "
            f"| {paper[0]['text_format']:g} | {answer:g} | {paper[0]['text_length']:.2f} "
            f"| {max(float(r['score']) for r in paper):.2f} "
            f"| {max(float(r['score']) for r in guarded):.2f} |"
        )
    return "\n".join(lines)


def shells_table() -> str:
    """Markdown table of `SHELLS` and, for comparison, honest reasoning of reference length."""
    lines = [
        "| thinking | paper, wrong | paper, right | guarded, wrong | guarded, right |",
        "|---|--:|--:|--:|--:|",
    ]
    for case in (*SHELLS, Degenerate("**honest reasoning**", honest(ENTAILED))):
        scores = [
            earned(case.response, truth, preset)["score"]
            for preset in ("paper", "guarded")
            for truth in (NOT_ENTAILED, ENTAILED)
        ]
        lines.append(f"| {case.what} | " + " | ".join(f"{score:.2f}" for score in scores) + " |")
    return "\n".join(lines)


def page_block() -> str:
    """Both tables between their marks, as they stand in docs/rewards.md."""
    return "\n".join(
        (
            BEGIN,
            f"{len(RESPONSES)} responses that break the form or state no single verdict; an honest "
            f"wrong answer earns {earned(honest(ENTAILED), NOT_ENTAILED, 'paper')['score']:.2f} "
            f"under `paper` and {earned(honest(ENTAILED), NOT_ENTAILED, 'guarded')['score']:.2f} "
            "under `guarded`:",
            "",
            responses_table(),
            "",
            f"{len(SHELLS)} well-formed shells around no reasoning, guessing wrong and right:",
            "",
            shells_table(),
            END,
        )
    )


def write_page(path: Path) -> None:
    """Replace what stands between the marks of a page; ValueError if it has none."""
    page = path.read_text(encoding="utf-8")
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: no lines {BEGIN} and {END} to write between")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(head + page_block() + tail, encoding="utf-8")
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/degenerate.py", description="Grade degenerate responses."
    )
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="page to bring up to date")
    options = parser.parse_args(argv)
    print(page_block())
    if options.write:
        try:
            write_page(options.write)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
