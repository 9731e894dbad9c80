"""Verdicts: how they are written, and the one place that reads them back.

A response thinks in one `<think>...</think>` block and closes with its verdict as the last words:

    <think>If every A is a B and no B is a C, then no A can be a C.</think>
    Answer: entailed

`parse_verdict` answers "which verdict does this text commit to?", whatever else is wrong with the
text. `split_response` adds the facts that the reward's format rule is made of. Training,
evaluation, practice data and tests all read responses through these two functions.

    >>> parse_verdict("Therefore **Answer:** Not entailed.")
    'not-entailed'
    >>> parse_verdict("Answer: entailed or not entailed") is None
    True

Rules of the verdict parser [ours; the paper states no parser, sec. 4 and 5.1 only name the marker]:

1.  Only text outside the thinking part is read. It begins after the last `</think>`; it is the
    whole text where no tag occurs, and nothing at all where a `<think>` is left open.
2.  The final line with `Answer:` decides. Everything from the first `Answer:` of that line to its
    end must be the verdict and nothing else: any case, wrapped in quotes, brackets or markdown
    emphasis, followed by punctuation. A phrase counts as a whole, so "not entailed" can never be
    taken for the "entailed" inside it, and "entailed or not entailed", "entailed, I guess" or
    "entailed?" are no verdict.
3.  Closing lines that each say `Answer:` and contradict one another are no verdict. An earlier
    verdict that other words follow was taken back: the last one holds.
4.  Answer lines further than 65,536 characters from the end are too early to be final.
5.  Letters are compared as they are. A Cyrillic letter, a zero-width space or a right-to-left mark
    inside the phrase makes it a different phrase.

Nothing is read or written; standard library only; time is linear in the length of the text.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ENTAILED = "entailed"


NOT_ENTAILED = "not-entailed"


VERDICTS = (NOT_ENTAILED, ENTAILED)  # the index is the `label` of the annotations [release]


# Both sides of a verdict may carry quotes, brackets or markdown emphasis. Punctuation only follows
# it: a leading "!" or "~" is negation in many notations, a trailing "?" is a hedge.
_EMPHASIS = "*_`"


_OPENING = _EMPHASIS + "\"'\u201c\u2018\u00ab([ \t\r"


_CLOSING = _EMPHASIS + "\"'\u201d\u2019\u00bb)] \t\r.,;:!\u2026"


_TAG = re.compile(r"</?think>", re.IGNORECASE)


# Bounded repetition keeps the search linear on "answer*********..."; the text is lower-cased first
# because IGNORECASE would also match look-alikes such as the long s in "an\u017fwer".
_MARKER = re.compile(r"answer[*_`\"' \t]{0,8}:")


_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


_SPOKEN_WORD = re.compile(r"[^\W_]+")


_CLOSING_WINDOW = 65_536  # characters at the end in which answer lines are read one by one


_LONGEST_PHRASE = 1000  # characters; a megabyte after `Answer:` is not worth splitting


_SPOKEN_TAIL = 400  # characters of a transcript in which its last words are looked for


@dataclass(frozen=True, eq=False)
class LabelSet:
    """The verdicts a task allows. `labels[i]` is the canonical form of label `i`.

    `spellings` maps every accepted spelling (lower case, single spaces) to its canonical form.
    """

    name: str
    labels: tuple[str, ...]
    spellings: Mapping[str, str] = field(repr=False)

    @classmethod
    def build(cls, name: str, labels: Mapping[str, Iterable[str]] | Iterable[str]) -> LabelSet:
        """Make a label set from canonical labels, each with further spellings if a mapping.

        Raises ValueError for fewer than two labels, an empty one, or a spelling used twice.
        """
        table = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, ())
        spellings: dict[str, str] = {}
        for label, others in table.items():
            for spelling in (label, *others):
                phrase = _phrase(spelling)
                if not phrase or spellings.setdefault(phrase, label) != label:
                    raise ValueError(
                        f"label set {name!r}: spelling {spelling!r} of {label!r} is empty or "
                        f"already stands for {spellings.get(phrase)!r}"
                    )
        if len(table) < 2:
            raise ValueError(f"label set {name!r} needs two labels or more, got {list(table)}")
        return cls(name, tuple(table), spellings)

    def read(self, statement: str) -> str | None:
        """Return the label that `statement` is, give or take case, wrapping and punctuation."""
        return self.spellings.get(_phrase(statement))


def _phrase(statement: str) -> str:
    """Lower-case words of a statement, freed of what may wrap a verdict or follow it."""
    bare = statement.lower().strip().lstrip(_OPENING).rstrip(_CLOSING)
    if len(bare) > _LONGEST_PHRASE:
        return ""
    return " ".join(word.strip(_EMPHASIS) for word in bare.split())


ENTAILMENT = LabelSet.build("entailment", {NOT_ENTAILED: ["not entailed"], ENTAILED: []})


def choices(letters: str = "ABCD") -> LabelSet:
    """Label set of a multiple-choice task: `Answer: B`, `Answer: (b).`, one letter per choice."""
    return LabelSet.build(f"choices-{letters}", list(letters))


def verdict_of(label: int) -> str:
    """Return the verdict of an annotation's `label`: 0 is not-entailed, 1 is entailed."""
    if label not in (0, 1):
        raise ValueError(f"label {label!r} is neither 0 (not-entailed) nor 1 (entailed)")
    return VERDICTS[int(label)]


def label_of(verdict: str) -> int:
    """Return 0 or 1 for a verdict in either spelling."""
    canonical = ENTAILMENT.read(verdict)
    if canonical is None:
        raise ValueError(f"verdict {verdict!r} is neither {ENTAILED!r} nor {NOT_ENTAILED!r}")
    return VERDICTS.index(canonical)


def answer_line(verdict: str) -> str:
    """The closing line the prompt asks for, for a verdict of any label set."""
    return f"Answer: {verdict}"


@dataclass(frozen=True)
class Response:
    """One response taken apart. `well_formed` is the format rule; see `split_response`."""

    text: str
    thinking: str  # between the tags; empty unless there is exactly one block, opened first
    after: str  # outside the thinking part; where the verdict is looked for
    verdict: str | None
    one_block: bool  # `<think>...</think>` exactly once, with whitespace at most before it
    closes_with_verdict: bool  # one `Answer:` after the thinking, and its verdict ends the text

    @property
    def has_thinking(self) -> bool:
        """Whether a letter or digit stands in the thinking part; dots or emoji are not thoughts."""
        return _LETTER_OR_DIGIT.search(self.thinking) is not None

    @property
    def well_formed(self) -> bool:
        """The format rule: one block that is not empty, then the verdict as the last words."""
        return self.one_block and self.closes_with_verdict and self.has_thinking


def split_response(text: str, labels: LabelSet = ENTAILMENT) -> Response:
    """Take a response apart: thinking, the text after it, the verdict, and the format facts.

    The format rule, in full. A response is well formed when

    *   `<think>` and `</think>` occur exactly once each, in this spelling and order;
    *   nothing but whitespace precedes `<think>`;
    *   at least one letter or digit stands between them;
    *   after them `Answer:` occurs exactly once, on a line of its own or at the end of a sentence;
    *   its verdict ends the response: only whitespace, quotes, emphasis or punctuation follow.

    The paper asks for "Answer:" within the last five characters, which cannot hold, as the marker
    alone has seven; read as the last five words it fits every published annotation. [paper] sec. 4
    The single-block, nothing-before and stated-once clauses are [ours].
    """
    found = _TAG.finditer(text)
    tags = list(itertools.islice(found, 3))  # three already break the format
    last = next(iter(collections.deque(found, maxlen=1)), tags[-1] if tags else None)
    one_block = (
        len(tags) == 2
        and tags[0].group() == "<think>"
        and tags[1].group() == "</think>"
        and not text[: tags[0].start()].strip()
    )
    if last is None:
        after = text
    elif last.group()[1] == "/":
        after = text[last.end() :]
    else:
        after = ""  # left open: all of it is thinking
    verdict, closes = _final_verdict(after, labels)
    thinking = text[tags[0].end() : tags[1].start()] if one_block else ""
    return Response(text, thinking, after, verdict, one_block, closes)


def parse_verdict(text: str, labels: LabelSet = ENTAILMENT) -> str | None:
    """Return the verdict that `text` commits to, or None; rules in the module docstring."""
    return split_response(text, labels).verdict


def parse_spoken_verdict(transcript: str, labels: LabelSet = ENTAILMENT) -> str | None:
    """Return the verdict that a transcript of speech ends on, or None. [ours]

    Recognisers write punctuation as they please, so the last words alone are compared: "answer"
    followed by a verdict. "... or answer not entailed" offers both and is none.
    """
    words = _SPOKEN_WORD.findall(transcript[-_SPOKEN_TAIL:].lower())
    for spelling, label in labels.spellings.items():
        ending = ["answer", *_SPOKEN_WORD.findall(spelling)]
        if words[-len(ending) :] == ending:
            return None if words[: -len(ending)][-1:] == ["or"] else label
    return None


class _AnswerLine(NamedTuple):
    """A line with `Answer:`; offsets into the lower-cased text it was found in."""

    start: int
    marker: int  # where its first `answer:` begins
    statement: str  # what follows that marker, to the end of the line
    end: int
    num_markers: int


def _answer_lines(lowered: str) -> Iterator[_AnswerLine]:
    """Yield the lines that hold an `answer:` marker, last line first."""
    markers = [
        match
        for match in _MARKER.finditer(lowered)
        if match.start() == 0 or not lowered[match.start() - 1].isalnum()
    ]
    while markers:
        last = first = markers.pop()
        start = lowered.rfind("\n", 0, last.start()) + 1
        end = lowered.find("\n", last.end())
        end = len(lowered) if end < 0 else end
        num_markers = 1
        while markers and markers[-1].start() >= start:
            first = markers.pop()
            num_markers += 1
        yield _AnswerLine(start, first.start(), lowered[first.end() : end], end, num_markers)


def _final_verdict(after: str, labels: LabelSet) -> tuple[str | None, bool]:
    """Return (verdict, whether it is stated once and as the last words) of the non-thinking part.

    Works on the lower-cased text throughout, as lower-casing may change lengths.
    """
    whole = after.lower()
    lowered = whole[-_CLOSING_WINDOW:]
    lines = _answer_lines(lowered)
    final = next(lines, None)
    if final is None:
        return None, False
    verdict = labels.read(final.statement)
    tail = lowered[final.end :].strip()
    if verdict is None or tail.startswith("or "):
        return None, False

    stated_once = final.num_markers == 1 and not _MARKER.search(whole[:-_CLOSING_WINDOW])
    below = final
    for line in lines:
        stated_once = False
        between = lowered[line.end : below.marker].strip(_CLOSING + "\n")
        if between not in ("", "or") or lowered[line.start : line.marker].strip(_OPENING):
            break  # words follow it, or it is part of a sentence: an earlier thought, not a closing
        if labels.read(line.statement) not in (None, verdict):
            return None, False
        below = line
    return verdict, stated_once and not tail.strip(_CLOSING + "\n")
