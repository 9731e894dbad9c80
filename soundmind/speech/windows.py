"""Long clips for a recogniser that hears 30 s: overlapping windows, and one transcript of theirs.

    windows(70 s)      0-28, 22-50, 44-70      each within the 30 s a Whisper model hears
    join_transcripts   neighbours are joined at the longest run of words that both heard

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

WINDOW_SECONDS = 28.0  # Whisper hears 30; a little less, so that padding marks the end of speech
OVERLAP_SECONDS = 6.0  # some fifteen words: enough for an unmistakable run
MAX_WORDS_PER_SECOND = 6
MIN_COMMON_WORDS = 2  # a single word in common may be any "the"

_NOT_WORD = re.compile(r"[^\w]+")


def windows(num_samples: int, sample_rate: int) -> list[tuple[int, int]]:
    """Sample ranges [start, end) that cover a clip with overlap; one range for a short clip."""
    length = int(WINDOW_SECONDS * sample_rate)
    step = length - int(OVERLAP_SECONDS * sample_rate)
    ranges = [(0, min(length, num_samples))]
    while ranges[-1][1] < num_samples:
        start = ranges[-1][0] + step
        ranges.append((start, min(start + length, num_samples)))
    return ranges


def join_transcripts(transcripts: Sequence[str]) -> str:
    """One transcript from those of overlapping windows, in order."""
    words: list[str] = []
    for transcript in transcripts:
        words = _join(words, transcript.split())
    return " ".join(words)


def _join(left: list[str], right: list[str]) -> list[str]:
    """Both word lists, the words heard twice once.

    A window's edge may cut a word in two; what either side heard beyond the common run is dropped.
    """
    reach = int(2 * OVERLAP_SECONDS * MAX_WORDS_PER_SECOND)
    offset = max(0, len(left) - reach)
    tail, head = left[offset:], right[:reach]
    match = SequenceMatcher(
        None, [_bare(w) for w in tail], [_bare(w) for w in head], autojunk=False
    ).find_longest_match()
    if match.size < MIN_COMMON_WORDS:
        return left + right
    return left[: offset + match.a + match.size] + right[match.b + match.size :]


def _bare(word: str) -> str:
    return _NOT_WORD.sub("", word.lower())
