"""Verdicts: how they are written, and the one place that reads them back.

A response thinks in one `<think>...</think>` block and closes with its verdict as the last words:

    <think>If every A is a B and no B is a C, then no A can be a C.</think>
    Answer: entailed

`parse_verdict` answers "which verdict does this text commit to?", whatever else is wrong with the
text. `split_response` adds the facts that the reward's format rule is made of. Training,
evaluation, practice data and tests all read responses through these two functions.

    >>> parse_verdict("Nothing forces it.\\n**Answer:** Not entailed.")
    'not-entailed'
    >>> parse_verdict("I cannot conclude Answer: entailed") is None
    True

Rules of the verdict parser [ours; the paper states no parser, sec. 4 and 5.1 only name the marker]:

1.  Only text outside the thinking part is read. It begins after the last `</think>`; it is the
    whole text where no tag occurs, and nothing at all where a `<think>` is left open.
2.  The final line with `Answer:` decides. It must be the marker and the verdict and nothing else:
    any case, wrapped in quotes, brackets or markdown emphasis, followed by punctuation. No word
    stands before the marker, and the phrase after it counts as a whole, so "not entailed" can never
    be taken for the "entailed" inside it, and "I cannot conclude Answer: entailed", "entailed or
    not entailed", "entailed, I guess" or "entailed?" are no verdict.
3.  Closing lines that contradict one another are no verdict, nor is one that the next words take
    back ("or not", "Wait, no."). Of verdicts with other words between them the last one holds.
4.  Answer lines further than 65,536 characters from the end are too early to be final.
5.  Letters of the verdict are compared as they are. A Cyrillic letter, a zero-width space or a
    right-to-left mark inside the phrase makes it a different phrase. Where statements are counted
    or compared with the closing one (rule 3, "stated once"), any dress counts: `Answers:`,
    `Answer - entailed`, full-width and look-alike letters.

What a fair reader would accept beside this is soundmind.task.lenient.

Nothing is read or written; standard library only; time is linear in the length of the text.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from soundmind.task.reading import REVOKED, TAKEN_BACK, fold

ENTAILED = "entailed"
NOT_ENTAILED = "not-entailed"
VERDICTS = (NOT_ENTAILED, ENTAILED)  # the index is the `label` of the annotations [release]

# Both sides of a verdict may carry quotes, brackets or markdown emphasis. Punctuation only follows
# it: a leading "!" or "~" is negation in many notations, a trailing "?" is a hedge.
_EMPHASIS = "*_`"
_OPENING = _EMPHASIS + "\"'\u201c\u2018\u00ab([ \t\r"
_CLOSING = _EMPHASIS + "\"'\u201d\u2019\u00bb)] \t\r.,;:!\u2026"
_LINE_START = _OPENING + "-#>"  # what markdown puts before the words of a line

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
    *   after them the answer is stated exactly once, by a closing line that is `Answer:` and the
        verdict: nothing before it but emphasis, nothing after it but quotes, emphasis, punctuation
        or whitespace.

    The paper asks for "Answer:" within the last five characters, which cannot hold, as the marker
    alone has seven; read as the last five words it fits every published annotation. [paper] sec. 4
    The single-block, nothing-before, stated-once and line-of-its-own clauses are [ours].
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


@functools.lru_cache(maxsize=16)
def _statement(labels: LabelSet) -> re.Pattern[str]:
    """Finds the marker of an answer in any dress, in folded lower case: `answers:`, `answer - yes`.

    A dash alone is no marker ("the answer - as we saw - follows"); with a label after it, it is.
    """
    phrases = "|".join(re.escape(phrase).replace("\\ ", r"\s+") for phrase in labels.spellings)
    gap = r"(?:[^\w\n]|_)"
    return re.compile(
        rf"(?<![^\W_])answers?(?![^\W_]){gap}{{0,10}}?"
        rf"(?::|[-=>](?={gap}{{0,10}}(?:{phrases})(?![^\W_])))"
    )


def _final_verdict(after: str, labels: LabelSet) -> tuple[str | None, bool]:
    """Return (verdict, whether it is stated once and as the last words) of the non-thinking part.

    Works on the lower-cased text throughout, as lower-casing may change lengths.
    """
    whole = after.lower()
    lines = [line for line in whole[-_CLOSING_WINDOW:].split("\n") if line.strip(_CLOSING)]
    place = next((i for i in reversed(range(len(lines))) if _marker(lines[i])), None)
    if place is None or not (marker := _marker(lines[place])):
        return None, False
    verdict = labels.read(lines[place][marker.end() :])
    below = lines[place + 1 :]
    if lines[place][: marker.start()].strip(_LINE_START) or verdict is None:
        return None, False
    if any(map(REVOKED.match, below)) or (below and TAKEN_BACK.match(below[0])):
        return None, False

    for line in map(fold, reversed(lines[:place])):  # closing lines right above, in any dress
        if line.strip(_CLOSING) == "or":
            continue
        above = _statement(labels).search(line)
        if above is None or line[: above.start()].strip(_LINE_START):
            break  # words follow it, or it is part of a sentence: an earlier thought, not a closing
        if labels.read(line[above.end() :]) not in (None, verdict):
            return None, False
    stated = itertools.islice(_statement(labels).finditer(fold(whole)), 2)
    return verdict, len(list(stated)) == 1 and not below


def _marker(line: str) -> re.Match[str] | None:
    """The first `answer:` of a line that is a word of its own."""
    found = (
        m for m in _MARKER.finditer(line) if m.start() == 0 or not line[m.start() - 1].isalnum()
    )
    return next(found, None)
