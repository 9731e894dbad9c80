"""The normaliser of the word error rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from soundmind.evaluation import transcripts


def test_the_normaliser_writes_numbers_spellings_and_tags_one_way(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("jiwer")
    kept = {"name": "x", "digest": "0", "spellings": {"colour": "color"}}
    transcripts.save_recogniser(tmp_path, kept)
    normalise, definition = transcripts.saved_normaliser(tmp_path)
    spoken = normalise("It's the colour of fifty roofs, so answer: not entailed.")
    written = normalise("<think>It is the color of 50 roofs, so</think>\nAnswer: not-entailed")
    assert spoken == written
    assert "1 spellings" in definition["normaliser"] and "jiwer" in definition["aligner"]
