"""Texts that say nearly the same: pairs of neighbouring words in common, found exactly.

Likeness is the Jaccard index of the two texts' sets of neighbouring words (case, punctuation, kind
of quotes and accents' encoding do not count). `ALIKE` is passed by one word in seven replaced; it
is not passed by "all a are b" and "all b are a". Paraphrases in other words are not found.

No pair is missed: two sets that are alike share one of their rarest members (prefix filtering), so
only texts that do are compared.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

ALIKE = 0.6
# Scripts without spaces: a character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019")

Pairs = frozenset[tuple[int, str, str]]


def words_of(text: str) -> list[str]:
    """Words of a text, in small letters and without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES))


def plain(text: str) -> str:
    """The text as far as it counts here; equal for exact duplicates."""
    return " ".join(words_of(text))


def pairs_of(*texts: str) -> Pairs:
    """Neighbouring words, both ends included; those of several texts are kept apart."""
    return frozenset(
        (number, *pair)
        for number, text in enumerate(texts)
        for pair in pairwise(["", *words_of(text), ""])
    )


def are_alike(first: Pairs, second: Pairs) -> bool:
    """Whether their Jaccard index reaches `ALIKE`."""
    return len(first & second) >= ALIKE * len(first | second)


def find_alike(
    mine: Sequence[Pairs], others: Sequence[Pairs] | None = None
) -> list[tuple[int, int]]:
    """Index pairs of alike texts: (i, j) of `mine` and `others`, or i < j among `mine`."""
    theirs = mine if others is None else others
    counts = Counter(
        pair for found in (mine if others is None else [*mine, *theirs]) for pair in found
    )

    def rarest(found: Pairs) -> list[tuple[int, str, str]]:
        """Enough that two alike sets have one of them in common."""
        ordered = sorted(found, key=lambda pair: (counts[pair], pair))
        return ordered[: len(found) - math.ceil(ALIKE * len(found) - 1e-9) + 1]

    holders: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for j, found in enumerate(theirs):
        for pair in rarest(found):
            holders[pair].append(j)
    result = []
    for i, found in enumerate(mine):
        near = {j for pair in rarest(found) for j in holders.get(pair, ())}
        result += [
            (i, j)
            for j in sorted(near)
            if (others is not None or i < j) and are_alike(found, theirs[j])
        ]
    return result
