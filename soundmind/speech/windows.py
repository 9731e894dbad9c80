"""Long clips for a recogniser that hears 30 s: overlapping windows, and one transcript of theirs.

    windows(70 s)      0-28, 22-50, 44-70      each within the 30 s a Whisper model hears
    join_transcripts   neighbours are aligned over the seconds that both heard, and cut in their middle

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WINDOW_SECONDS = 28.0  # Whisper hears 30; a little less, so that padding marks the end of speech
OVERLAP_SECONDS = 6.0  # some fifteen words: enough for an unmistakable alignment
# An overlap is the same sound heard twice, so a missing word is dearer than a misheard one, and its
# length is known: a word beyond what the windows speak in these seconds earns nothing. [ours]
SAME, MISHEARD, MISSING, AWRY = 3, -1, -2, -3
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
    last = 0  # words of the window before
    for transcript in transcripts:
        heard = transcript.split()
        overlap = max(last, len(heard)) * OVERLAP_SECONDS / WINDOW_SECONDS
        words = _join(words, heard, overlap)
        last = len(heard)
    return " ".join(words)


def _join(left: list[str], right: list[str], overlap: float) -> list[str]:
    """Both word lists, the words heard twice once; about `overlap` words are.

    Aligns all of some end of `left` with all of some beginning of `right`, and joins them at the
    middle one of the words that agree: a window's edge cuts words in two, its middle does not. Beyond
    twice the overlap nothing is searched: a phrase that returns would be taken for the same sound.
    """
    reach = int(2 * overlap) + 4
    ours, theirs = [_bare(word) for word in left[-reach:]], [_bare(word) for word in right[:reach]]
    # score[i][j]: best alignment of an end of ours[:i] with all of theirs[:j]; step: its last move
    score = [[MISSING * j for j in range(len(theirs) + 1)]]
    step = [["right"] * (len(theirs) + 1)]
    for word in ours:
        above, row, moves = score[-1], [0], ["end"]
        for j, other in enumerate(theirs, start=1):
            both = above[j - 1] + (SAME if word == other else MISHEARD)
            alone = max(above[j], row[-1]) + MISSING
            moves.append("both" if both >= alone else "left" if above[j] > row[-1] else "right")
            row.append(max(both, alone))
        score.append(row)
        step.append(moves)
    i = len(ours)
    j = max(range(len(theirs) + 1), key=lambda j: score[i][j] + AWRY * abs(j - overlap))
    matches = []
    while i and j:
        if step[i][j] == "both" and ours[i - 1] == theirs[j - 1]:
            matches.append((i, j))
        i, j = i - (step[i][j] != "right"), j - (step[i][j] != "left")
    if len(matches) < MIN_COMMON_WORDS:
        return left + right
    i, j = matches[len(matches) // 2]
    return left[: len(left) - len(ours) + i] + right[j:]


def _bare(word: str) -> str:
    return _NOT_WORD.sub("", word.lower()) or word
