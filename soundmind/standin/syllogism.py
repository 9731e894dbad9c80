"""The little language of the practice set: one syllogism form, four nonsense nouns, four names.

    All wugs are daxes, Rex is a wug, so Rex is a dax.       entailed
    All wugs are daxes, Rex is a fep, so Rex is a dax.       not-entailed (middle term differs)
    All wugs are daxes, Rex is a wug, so Rex is a blicket.   not-entailed (conclusion differs)

A sentence is entailed when the minor premise repeats the first noun and the conclusion repeats the
second. In the other half of the sentences exactly one of the two is replaced by a noun that occurs
nowhere else in it. So no single word carries the label, comparing one pair of words reaches 75 %,
and only a listener that compares both pairs gets above that.

The written reasoning compares the heard words in pairs, and ends like every annotation of the real
data set:

    wug, wug, same, dax, fep, different
    Answer: not-entailed

Four names times sixty noun patterns make 240 sentences, all of which occur in every split: held-out
clips are new recordings, not new sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from soundmind.task.labels import answer_line, verdict_of

# Singular and plural.
NOUNS: dict[str, str] = {"wug": "wugs", "fep": "feps", "dax": "daxes", "blicket": "blickets"}
NAMES: tuple[str, ...] = ("Rex", "Tom", "Ann", "Lily")


@dataclass(frozen=True)
class Syllogism:
    """`All {first}s are {second}s, {name} is a {minor}, so {name} is a {conclusion}.`"""

    first: str
    second: str
    minor: str
    conclusion: str
    name: str

    @property
    def label(self) -> int:
        """1 when both comparisons hold (entailed), else 0; the index of `labels.VERDICTS`."""
        return int(self.minor == self.first and self.conclusion == self.second)

    @property
    def text(self) -> str:
        """The sentence as spoken. Commas, not full stops: espeak-ng pauses less at them."""
        return (
            f"All {NOUNS[self.first]} are {NOUNS[self.second]}, {self.name} is a {self.minor}, "
            f"so {self.name} is a {self.conclusion}."
        )

    @property
    def heard(self) -> str:
        """The four nouns in the order in which they are compared, without the comparisons."""
        return f"{self.first}, {self.minor}, {self.second}, {self.conclusion}"

    @property
    def reasoning(self) -> str:
        """The four nouns and both comparisons, e.g. `wug, wug, same, dax, fep, different`."""
        pairs = ((self.first, self.minor), (self.second, self.conclusion))
        return ", ".join(f"{a}, {b}, {'same' if a == b else 'different'}" for a, b in pairs)

    @property
    def answer(self) -> str:
        """The annotated answer: the reasoning, then the verdict on a line of its own."""
        return f"{self.reasoning}\n{answer_line(verdict_of(self.label))}"


def all_syllogisms() -> Iterator[Syllogism]:
    """Every sentence of the language once, in a fixed order: 48 entailed, 192 not."""
    for name, (first, second) in itertools.product(NAMES, itertools.permutations(NOUNS, 2)):
        unused = [noun for noun in NOUNS if noun not in (first, second)]
        yield Syllogism(first, second, first, second, name)
        for other in unused:
            yield Syllogism(first, second, other, second, name)
            yield Syllogism(first, second, first, other, name)


def parse_syllogism(text: str) -> Syllogism:
    """The inverse of `Syllogism.text`, so that training targets can be derived from a data row."""
    try:
        return _BY_TEXT[text]
    except KeyError:
        raise ValueError(
            f"not a sentence of the practice language: {text!r}. Expected something like "
            f"{next(all_syllogisms()).text!r}; is this another data set?"
        ) from None


_BY_TEXT: dict[str, Syllogism] = {syllogism.text: syllogism for syllogism in all_syllogisms()}
