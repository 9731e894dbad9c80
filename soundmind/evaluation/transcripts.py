"""What defines a word error rate: Whisper's English normaliser, and who listened.

The normaliser lower-cases, spells out contractions, writes numbers one way, and drops punctuation
and whatever stands in brackets (so the `<think>` tags do not count as words). Its table of British
and American spellings belongs to the recogniser and is kept beside the predictions, so that saved
transcripts can be graded again without the model. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soundmind.system.files import write_json

RECOGNISER_FILE = "recogniser.json"


def save_recogniser(folder: Path, description: dict[str, Any]) -> None:
    """Keep name, digest and spelling table of the recogniser beside the predictions."""
    write_json(folder / RECOGNISER_FILE, description)


def saved_normaliser(folder: Path) -> tuple[Callable[[str], str], dict[str, str]]:
    """Whisper's English normaliser with the table kept in `folder`, and what defines the number."""
    import transformers
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    path = folder / RECOGNISER_FILE
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
