"""Windows over long clips, and one transcript of theirs."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

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
        "if all wugs are feps and Rex is a wug, then Rex must be a fep."
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


# --- clips of published length, as a recogniser hears them ----------------------------------------


def spoken(words: list[str], generator: random.Random) -> list[tuple[float, float]]:
    """Start and end of every word in seconds, at some 2.3 words a second with pauses."""
    now, times = 0.3, []
    for word in words:
        end = now + 0.12 + 0.05 * len(word) * generator.uniform(0.8, 1.25)
        times.append((now, end))
        pause = {".": 0.4, "!": 0.4, "?": 0.4, ",": 0.15, ";": 0.2, ":": 0.2}.get(word[-1], 0.03)
        now = end + pause * generator.uniform(0.7, 1.5)
    return times


def heard(
    words: list[str], noise: float, generator: random.Random, vocabulary: list[str]
) -> tuple[list[str], list[str]]:
    """(transcripts of the windows, the transcript that cuts them where the clock says).

    Of every window each word is misheard, missed or followed by another one with chance `noise`,
    anew for every window; words at a window's edge are cut in two.
    """
    times = spoken(words, generator)
    ranges = windows(int((times[-1][1] + 0.3) * RATE), RATE)
    pieces_of, by_clock = [], []
    for number, (start, end) in enumerate((a / RATE, b / RATE) for a, b in ranges):
        transcript = []
        low = start + OVERLAP_SECONDS / 2 if number else 0.0
        high = end - OVERLAP_SECONDS / 2 if number < len(ranges) - 1 else end
        for word, (begins, ends) in zip(words, times, strict=True):
            if ends <= start or begins >= end:
                continue
            kind = generator.random() / noise if noise else 1.0
            if begins < start or ends > end:
                pieces = [word[: max(1, len(word) // 2)]]
            elif kind < 0.6:
                pieces = [generator.choice(vocabulary)]
            elif kind < 0.8:
                pieces = []
            else:
                pieces = [word, generator.choice(vocabulary)] if kind < 1.0 else [word]
            transcript += pieces
            by_clock += pieces if low <= (begins + ends) / 2 < high else []
        pieces_of.append(" ".join(transcript))
    return pieces_of, by_clock


def real_reasonings(alr_dev: Path) -> list[list[str]]:
    lines = alr_dev.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"].split() for line in lines]


def made_up_reasonings() -> list[list[str]]:
    """Sixty texts of the published length out of sentences that return, as reasonings' do."""
    generator = random.Random(1)
    names = ["wugs", "feps", "daxes", "the conclusion", "the premise", "Rex"]
    texts = []
    for _ in range(60):
        words: list[str] = []
        while len(words) < 840:
            first, second = generator.sample(names, 2)
            sentence = generator.choice(
                (
                    f"So if all {first} are {second}, then {second} are what {first} say.",
                    f"Wait, maybe {first} are no {second}.",
                    f"But the premises only say that {first} are {second}, not that all are.",
                )
            )
            words += sentence.split()
        texts.append(words)
    return texts


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("source", ["real", "made up"])
def test_long_reasonings_lose_nothing_where_their_windows_are_joined(
    source: str, noise: float, request: pytest.FixtureRequest
) -> None:
    jiwer = pytest.importorskip("jiwer")
    made_up = source == "made up"
    texts = made_up_reasonings() if made_up else real_reasonings(request.getfixturevalue("alr_dev"))
    texts = texts if noise == 0.05 else texts[::6]
    vocabulary = sorted({word for text in texts for word in text})
    generator = random.Random(5)
    references, joined, ideal = [], [], []
    for text in texts:
        windowed, by_clock = heard(text, noise, generator, vocabulary)
        ours = join_transcripts(windowed).split()
        assert abs(len(ours) - len(by_clock)) <= 5
        for lines, words in ((references, text), (joined, ours), (ideal, by_clock)):
            lines.append(" ".join(words).lower())
    assert abs(jiwer.wer(references, joined) - jiwer.wer(references, ideal)) < 0.001
