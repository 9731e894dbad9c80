"""Windows over long clips, and one transcript of theirs."""

from __future__ import annotations

import itertools
import random

import pytest

from soundmind.speech.windows import OVERLAP_SECONDS, join_transcripts, windows

RATE = 16_000


@pytest.mark.parametrize("seconds", [0.5, 27.9, 28.0, 28.1, 50.0, 600.0])
def test_windows_cover_a_clip_with_overlap_and_fit_the_recogniser(seconds: float) -> None:
    length = int(seconds * RATE)
    ranges = windows(length, RATE)
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    assert all(0 < end - start <= 30 * RATE for start, end in ranges)
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end - start == OVERLAP_SECONDS * RATE
    assert (len(ranges) == 1) == (seconds <= 28.0)


def test_words_heard_by_two_windows_count_once() -> None:
    left = "if all wugs are feps and Rex is a wug then"
    right = "rex is a wug, then Rex must be a fep."
    assert join_transcripts([left, right]) == (
        "if all wugs are feps and Rex is a wug then Rex must be a fep."
    )


def test_words_cut_in_two_at_a_window_edge_are_dropped() -> None:
    left = "premise one says that every house has a roof and a ga"
    right = "ery house has a roof and a garden behind it"
    assert join_transcripts([left, right]) == (
        "premise one says that every house has a roof and a garden behind it"
    )


def test_transcripts_without_a_common_run_are_kept_whole() -> None:
    assert join_transcripts(["one two the", "the four five"]) == "one two the the four five"
    assert join_transcripts(["", "a b"]) == "a b"
    assert join_transcripts([]) == ""


def test_a_long_text_comes_back_from_its_windows() -> None:
    generator = random.Random(0)
    words = [f"w{generator.randint(0, 300)}" for _ in range(1500)]
    pieces = [" ".join(words[i : i + 70]) for i in range(0, len(words), 55)]
    assert join_transcripts(pieces).split() == words
