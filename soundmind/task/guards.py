"""Guards against cheap length, used by the reward preset `guarded`. All of it is [ours].

The paper's length term pays for any text up to the reference length. Under `guarded`

    text_length = min(1, L / L_ref * novelty_factor(novelty)) * over_length_factor(L / L_ref)

    novelty            share of distinct word 4-grams of the response, in [0, 1]
    novelty_factor     1 for natural text, the novelty itself for text written twice or oftener
    over_length_factor 1 up to twice the reference length, 0 from four times it on

and thinking that is one loop is not thinking, so that the format, and with it the answer, is not
met. The thresholds come from the published dev annotations (606 rows): novelty is 0.95 in the
median and 0.68 at the least there, so that no honest row loses anything, while a text written
twice has 0.5 at the most. What a guard of this kind cannot see: a loop with a counter in every
sentence, fluent nonsense, or the question copied once.

    >>> novelty("no " * 50) < 0.03, novelty_factor(0.9), over_length_factor(3.0)
    (True, 1.0, 0.5)

Standard library only; linear in the part of the text that is read.
"""

from __future__ import annotations

from collections.abc import Sequence

NATURAL_NOVELTY = 0.65  # from here up, length counts in full
TWICE = 0.5  # from here down, only the distinct part of the length counts
LOOP_NOVELTY = 0.3  # below it, the thinking is a loop
LOOP_MIN_CHARACTERS = 40  # too little text to call anything a loop
MAX_UNITS = 8192  # words read for the estimate; the longest dev annotation has 5,045
TAPER_START, TAPER_END = 2.0, 4.0  # multiples of the reference length
CHARACTERS_PER_WORD = 24  # a longer mean is no spaced script; English reasoning has 5 to 7


def novelty(text: str) -> float:
    """Share of distinct word 4-grams in [0, 1]; 1.0 for fewer than five words.

    Text without spaces is read by character, so that neither one endless "word" nor a script that
    does without spaces escapes. Only the first MAX_UNITS units are read.
    """
    units: Sequence[str] = text.lower().split(None, MAX_UNITS)[:MAX_UNITS]
    if sum(map(len, units)) > CHARACTERS_PER_WORD * len(units):
        units = text[:MAX_UNITS].lower()
    total = len(units) - 3
    if total < 2:
        return 1.0
    return len(set(zip(units, units[1:], units[2:], units[3:], strict=False))) / total


def novelty_factor(share: float) -> float:
    """What part of a length counts at this novelty: the distinct part, or all if natural."""
    if share <= TWICE:
        return share
    return min(1.0, TWICE + (1.0 - TWICE) * (share - TWICE) / (NATURAL_NOVELTY - TWICE))


def over_length_factor(ratio: float) -> float:
    """1.0 up to TAPER_START times the reference length, falling to 0.0 at TAPER_END times it."""
    return min(1.0, max(0.0, (TAPER_END - ratio) / (TAPER_END - TAPER_START)))


def is_loop(thinking: str) -> bool:
    """Whether the thinking does little but repeat itself."""
    return len(thinking) >= LOOP_MIN_CHARACTERS and novelty(thinking) < LOOP_NOVELTY
