"""Transcripts of long clips put together from windows, and Whisper's English normaliser.

    windows(70 s)      0-28, 22-50, 44-70      each within the 30 s a Whisper model hears
    join_transcripts   neighbours are joined at the longest run of words that both heard

The normaliser lower-cases, spells out contractions, writes numbers one way, and drops punctuation
and whatever stands in brackets (so the `<think>` tags do not count as words). Its table of British
and American spellings belongs to the recogniser and is kept beside the predictions, so that saved
transcripts can be graded again without the model. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soundmind.system.files import write_json

WINDOW_SECONDS = 28.0  # Whisper hears 30; a little less, so that padding marks the end of speech


OVERLAP_SECONDS = 6.0  # some fifteen words: enough for an unmistakable run


MAX_WORDS_PER_SECOND = 6


MIN_COMMON_WORDS = 2  # a single word in common may be any "the"


RECOGNISER = "recogniser.json"


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


def save_recogniser(folder: Path, description: dict[str, Any]) -> None:
    """Keep name, digest and spelling table of the recogniser beside the predictions."""
    write_json(folder / RECOGNISER, description)


def saved_normaliser(folder: Path) -> tuple[Callable[[str], str], dict[str, str]]:
    """Whisper's English normaliser with the table kept in `folder`, and what defines the number."""
    import transformers
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    path = folder / RECOGNISER
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    spellings = kept.get("spellings", {})
    definition = {
        "recogniser": kept.get("name", "not recorded"),
        "recogniser_digest": kept.get("digest", "not recorded"),
        "normaliser": f"Whisper's English normaliser, {len(spellings)} spellings "
        f"(transformers {transformers.__version__})",
        "aligner": f"jiwer {version('jiwer')}",
        "reference_text": "the thinker's own text",
    }
    return EnglishTextNormalizer(spellings), definition
