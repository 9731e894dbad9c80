"""Guards against cheap length, and the degenerate responses of docs/rewards.md."""

import itertools
from pathlib import Path

import degenerate
import pytest
from graded import KEYS, RIGHT, grade

from soundmind.task import guards
from soundmind.task.labels import ENTAILED, NOT_ENTAILED, VERDICTS
from soundmind.task.reward_settings import PRESETS, max_score

ROOT = Path(__file__).resolve().parents[2]


def test_guards_leave_an_honest_answer_of_natural_length_alone() -> None:
    for truth in VERDICTS:
        honest = degenerate.honest(ENTAILED)
        paper, guarded = (degenerate.earned(honest, truth, p) for p in ("paper", "guarded"))
        assert guarded["score"] == paper["score"]


def test_guarded_adds_one_key_and_charges_for_no_verdict() -> None:
    result = grade("hello", row={}, preset="guarded")
    assert list(result) == [*KEYS[:6], "no_verdict", *KEYS[6:]]
    assert result["score"] == -0.25 and max_score(preset="guarded") == 4.0


def test_repeating_half_the_reasoning_earns_half_the_length() -> None:
    half = degenerate.REASONING[: len(degenerate.REASONING) // 2]
    once, twice = (
        degenerate.earned(degenerate.think(text), NOT_ENTAILED, "guarded")["text_length"]
        for text in (half, f"{half} {half}")
    )
    assert twice <= 1.3 * once  # type: ignore[operator]


def test_over_length_tapers_between_two_and_four_references() -> None:
    lengths = [
        grade(RIGHT, row={"reference_tokens": 10, "response_tokens": n}, preset="guarded")
        for n in (10, 20, 30, 40, 100)
    ]
    assert [result["text_length"] for result in lengths] == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_novelty_is_read_by_character_where_there_are_no_words() -> None:
    assert guards.novelty("a" * 5000) < 0.01
    assert guards.novelty("\u7532\u4e59\u4e19\u4e01\u620a\u5df1\u5e9a\u8f9b\u58ec\u7678") == 1.0
    assert guards.novelty("") == guards.novelty("one two three") == 1.0


def test_novelty_factor_is_continuous_and_never_falls() -> None:
    factors = [guards.novelty_factor(i / 1000) for i in range(1001)]
    steps = [b - a for a, b in itertools.pairwise(factors)]
    assert factors[0] == 0.0 and factors[-1] == 1.0 and min(steps) >= 0.0 and max(steps) < 0.01


def test_there_are_forty_degenerate_responses_or_more() -> None:
    assert len({case.response for case in degenerate.RESPONSES}) == len(degenerate.RESPONSES) >= 40


@pytest.mark.parametrize("case", degenerate.RESPONSES, ids=lambda case: case.what)
def test_no_degenerate_response_earns_the_answer(case: degenerate.Degenerate) -> None:
    for preset in PRESETS:
        for truth in VERDICTS:
            result = degenerate.earned(case.response, truth, preset)
            assert result["answer"] == 0.0 and result["text_format"] == 0.0


@pytest.mark.parametrize(
    "case", (*degenerate.RESPONSES, *degenerate.SHELLS), ids=lambda case: case.what
)
def test_under_guards_none_outscores_an_honest_wrong_answer(case: degenerate.Degenerate) -> None:
    honest = degenerate.earned(degenerate.honest(ENTAILED), NOT_ENTAILED, "guarded")["score"]
    wrong = [NOT_ENTAILED] if case in degenerate.SHELLS else VERDICTS
    for truth in wrong:
        assert degenerate.earned(case.response, truth, "guarded")["score"] <= honest  # type: ignore[operator]


def test_under_guards_a_loop_earns_no_answer_even_if_it_guesses_right() -> None:
    loops = [c for c in degenerate.SHELLS if "to the reference" in c.what or "over" in c.what]
    loops = [c for c in loops if "random" not in c.what]
    assert len(loops) == 3
    for case in loops:
        assert degenerate.earned(case.response, ENTAILED, "paper")["answer"] == 1.0
        assert degenerate.earned(case.response, ENTAILED, "guarded")["answer"] == 0.0


def test_the_page_shows_what_degenerate_responses_earn() -> None:
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    assert degenerate.page_block() in page, (
        "docs/rewards.md is stale: python benchmarks/degenerate.py --write docs/rewards.md"
    )


def test_writing_the_page_replaces_only_what_is_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{degenerate.BEGIN}\nold\n{degenerate.END}\nbelow\n")
    degenerate.write_page(page)
    assert page.read_text() == f"above\n{degenerate.page_block()}\nbelow\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no lines"):
        degenerate.write_page(page)
