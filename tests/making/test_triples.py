"""Triples from every kind of source, and which of them stay."""
# ruff: noqa: RUF001

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from own_triples import own_triples, write_triples

from soundmind.making.near import are_alike, find_alike, pairs_of
from soundmind.making.triples import Triple, other_language, read, run
from soundmind.making.words import Wording
from soundmind.system.errors import UserError

WORDING = Wording.load()


def select(
    rows: list[Any], folder: Path, held_out: list[Any] | None = None, **options: Any
) -> tuple[list[Triple], dict[str, str]]:
    """What stays of the rows, and the reason of each other line."""
    source = write_triples(folder / "rows.jsonl", rows)
    exclude = [write_triples(folder / "held.jsonl", held_out)] if held_out else []
    settings: dict[str, Any] = {
        **{"shares": {"train": 1.0}, "balanced": False, "limit": None, "seed": 0},
        **options,
    }
    kept, dropped = run([source], exclude, WORDING, **settings)
    return kept, {item.where.rpartition(":")[2]: item.reason for item in dropped}


@pytest.mark.parametrize(
    ("record", "parts", "label"),
    [
        (
            {"major": "All a are b", "minor": "x is a", "conclusion": "x is b", "label": 1},
            ("All a are b", "x is a", "x is b"),
            1,
        ),
        (
            {  # LogiQA 2.0 NLI: a list of sentences without their full stops
                "label": "not entailed",
                "major_premise": ["F is old", " G is young"],
                "minor_premise": " H is here",
                "conclusion": "F is here.",
            },
            ("F is old. G is young", " H is here", "F is here."),
            0,
        ),
        (
            {"premise": "It rains. Mr. C. Li is wet.", "hypothesis": "Li is.", "label": "e"},
            ("It rains.", "Mr. C. Li is wet.", "Li is."),
            1,
        ),
        (
            {"premise": "It rains. We go.", "hypothesis": "No.", "label": "not-entailment"},
            ("It rains.", "We go.", "No."),
            0,
        ),
        (
            {  # FOLIO
                "premises": ["All a are b. ", "[BG] b is c.", "x is a."],
                "conclusion": "x is c.",
                "label": "Uncertain",
            },
            ("All a are b. b is c.", "x is a.", "x is c."),
            0,
        ),
        (
            {"premises": "All a are b.\nx is a.", "conclusion": "x is b.", "label": "True"},
            ("All a are b.", "x is a.", "x is b."),
            1,
        ),
        (
            {"user_content": WORDING.question(("A.", 'the "B"', " C ")), "label": 0, "answer": "-"},
            ("A.", 'the "B"', " C "),
            0,
        ),
    ],
    ids=["plain", "logiqa", "control", "logiqa-new", "folio", "folio-lines", "released"],
)
def test_every_kind_of_source_gives_its_triple(
    record: dict[str, Any], parts: tuple[str, ...], label: int, tmp_path: Path
) -> None:
    found, dropped = read(write_triples(tmp_path / "x.jsonl", [record]), WORDING)
    assert dropped == []
    assert (found[0].parts, found[0].label) == (parts, label)


GOOD = {"major": "All men are mortal", "minor": "Bob is a man", "conclusion": "Bob is mortal"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "broken-line"),
        (b"[1, 2]", "broken-line"),
        (b"\xff\xfe", "broken-line"),
        (json.dumps({**GOOD}).encode(), "bad-label"),
        (json.dumps({**GOOD, "label": "perhaps"}).encode(), "bad-label"),
        (json.dumps({**GOOD, "label": None}).encode(), "bad-label"),
        (json.dumps({**GOOD, "label": 2}).encode(), "bad-label"),
        (json.dumps({**GOOD, "minor": " \n", "label": 1}).encode(), "missing-part"),
        (json.dumps({**GOOD, "minor": "...", "label": 1}).encode(), "missing-part"),
        (json.dumps({**GOOD, "minor": None, "label": 1}).encode(), "missing-part"),
        (json.dumps({**GOOD, "conclusion": 7, "label": 1}).encode(), "missing-part"),
        (json.dumps({"major": "x", "label": 1}).encode(), "missing-part"),
        (
            json.dumps({"premise": "Only one.", "hypothesis": "x", "label": "e"}).encode(),
            "missing-part",
        ),
        (json.dumps({"premises": [], "conclusion": "x", "label": "True"}).encode(), "missing-part"),
        (json.dumps({"user_content": "free text", "label": 1}).encode(), "missing-part"),
        (json.dumps({**GOOD, "major": "a" * 30_000, "label": 1}).encode(), "broken-text"),
        (json.dumps({**GOOD, "major": "a \ud800 b", "label": 1}).encode(), "broken-text"),
    ],
)
def test_a_line_that_holds_no_triple_is_listed_with_its_place(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps({**GOOD, "label": 1}).encode() + b"\n\n" + line + b"\n")
    found, dropped = read(path, WORDING)
    assert len(found) == 1
    assert [(item.where, item.reason) for item in dropped] == [(f"{path}:3", reason)]


def test_both_labels_of_one_triple_are_all_dropped_and_named(tmp_path: Path) -> None:
    rows = [{**GOOD, "label": 1}, {**GOOD, "major": "all men are MORTAL.", "label": 0}]
    kept, dropped = select([*rows, *own_triples(2)], tmp_path)
    assert dropped == {"1": "both-labels", "2": "both-labels"} and len(kept) == 2


def test_duplicates_exact_and_near_stay_once(tmp_path: Path) -> None:
    row = own_triples(1)[0]
    spaced = {**row, "major": row["major"].upper() + " !"}
    one_word = {**row, "major": row["major"].replace("lives", "dwells")}
    kept, dropped = select([row, spaced, one_word], tmp_path)
    assert dropped == {"2": "duplicate", "3": "near-duplicate"} and len(kept) == 1


def test_near_the_same_with_the_other_label_is_a_pair_of_opposites_and_stays(
    tmp_path: Path,
) -> None:
    row = own_triples(1)[0]
    conclusion = row["conclusion"].replace(" is a ", " is by no means ever a ")
    assert len(select([row, {**row, "conclusion": conclusion, "label": 0}], tmp_path)[0]) == 2


def test_questions_on_one_premise_are_no_duplicates(tmp_path: Path) -> None:
    long = "The committee met on the first day of the month and chose a chair for the coming year"
    endings = ["it met", "a chair was chosen", "nobody came", "the year is over"]
    rows = [
        {"major": long, "minor": "Which of the following is true?", "conclusion": c, "label": 0}
        for c in endings
    ]
    assert len(select(rows, tmp_path)[0]) == 4


@pytest.mark.parametrize(
    "parts",
    [
        ("Tous les hommes sont mortels", "Socrate est un homme", "Socrate est mortel"),
        ("Alle Menschen sind sterblich", "Sokrates ist ein Mensch", "Sokrates ist sterblich"),
        ("所有人都会死", "苏格拉底是人", "苏格拉底会死"),
        ("Все люди смертны", "Сократ человек", "Сократ смертен"),
        (
            "All men are mortal",
            "Socrates is a man",
            "Der Mensch Sokrates ist also sterblich und alt",
        ),
    ],
    ids=["fr", "de", "zh", "ru", "one part"],
)
def test_other_languages_are_dropped(parts: tuple[str, str, str], tmp_path: Path) -> None:
    major, minor, conclusion = parts
    row = {"major": major, "minor": minor, "conclusion": conclusion, "label": 1}
    assert select([row, *own_triples(1)], tmp_path)[1] == {"1": "other-language"}


def test_no_released_row_is_taken_for_another_language(alr_dev: Path) -> None:
    found, _ = read(alr_dev, WORDING)
    assert [t.where for t in found if other_language(t.parts, "en")] == []


# -- leakage --------------------------------------------------------------------------------------

HELD = own_triples(40, seed=7)


def planted() -> list[tuple[dict[str, Any], str]]:
    """Rows that give away a held-out one, by every way of doing so, and the reason expected."""
    fresh = own_triples(40, seed=8)
    question, premise = "held-out-question", "held-out-premise"
    rows = []
    for i, (held, own) in enumerate(zip(HELD, fresh, strict=True)):
        variants = [
            (held, question),
            ({**held, "label": 1 - held["label"]}, question),
            ({k: str(v).upper() if k != "label" else v for k, v in held.items()}, question),
            ({**held, "minor": f"  {held['minor']} . "}, question),
            ({**own, "major": held["major"]}, premise),
            ({**own, "minor": held["minor"]}, premise),
            ({**own, "minor": held["major"]}, premise),  # in the other place
            ({**own, "major": held["major"].replace("lives", "sleeps")}, premise),
            ({**own, "major": held["major"].replace(" that ", ", that ") + "!"}, premise),
            ({**own, "major": f"{held['major']} of old"}, premise),
            (
                {**own, "major": f"It had rained for days. {held['major']}. Nobody minded it."},
                premise,
            ),  # among other sentences
        ]
        rows.append(variants[i % len(variants)])
    return rows


def test_every_planted_duplicate_and_shared_premise_is_found_and_nothing_else(
    tmp_path: Path,
) -> None:
    clean = own_triples(60, seed=9)
    rows = planted()
    kept, dropped = select([*clean, *(row for row, _ in rows)], tmp_path, HELD)
    assert dropped == {str(61 + i): reason for i, (_, reason) in enumerate(rows)}
    assert len(kept) == len(clean)


def test_a_file_to_exclude_needs_no_labels(tmp_path: Path) -> None:
    held = [{k: v for k, v in row.items() if k != "label"} for row in HELD[:3]]
    assert set(select(HELD[:3] + own_triples(2), tmp_path, held)[1]) == {"1", "2", "3"}


def test_an_exam_stem_in_common_is_no_leak(tmp_path: Path) -> None:
    stem = "According to the above definition, which of the following is correct?"
    held, own = own_triples(2, seed=3)
    assert select([{**own, "minor": stem}], tmp_path, [{**held, "minor": stem}])[1] == {}


def test_real_rows_planted_among_others_are_found(alr_dev: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in alr_dev.read_text("utf-8").splitlines()]
    kept, dropped = select(rows[:50] + own_triples(10), tmp_path, rows)
    assert len(kept) == 10
    assert set(dropped.values()) == {"held-out-question"}


def test_a_file_to_exclude_that_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held\.jsonl"):
        select(own_triples(1), tmp_path, [{"text": "?"}])


def test_likeness_finds_every_pair_that_a_full_comparison_finds() -> None:
    rows = [r["major"] + r["minor"] for r in own_triples(30)]
    texts = rows + [r.replace("lives", "sleeps") for r in rows] + [r[: len(r) // 2] for r in rows]
    sets = [pairs_of(text) for text in texts]
    all_pairs = [
        (i, j)
        for i in range(len(sets))
        for j in range(i + 1, len(sets))
        if are_alike(sets[i], sets[j])
    ]
    assert sorted(find_alike(sets)) == all_pairs and len(all_pairs) >= 30


# -- splits and labels ----------------------------------------------------------------------------


def test_rows_with_a_premise_in_common_are_in_the_same_split(tmp_path: Path) -> None:
    base = own_triples(120)
    rows = [
        {**row, "major": base[i // 4 * 4]["major"]} for i, row in enumerate(base)
    ]  # groups of four
    shares = {"train": 0.6, "dev": 0.2, "test": 0.2}
    kept, dropped = select(rows, tmp_path, shares=shares)
    assert dropped == {} and Counter(t.split for t in kept) == {"train": 72, "dev": 24, "test": 24}
    by_premise: dict[str, set[str]] = {}
    for triple in kept:
        by_premise.setdefault(triple.parts[0], set()).add(triple.split)
    assert {len(splits) for splits in by_premise.values()} == {1}


def test_balance_leaves_as_many_of_each_label_in_every_split(tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(own_triples(60)) if i % 3]
    kept, dropped = select(rows, tmp_path, balanced=True, shares={"train": 0.5, "test": 0.5})
    counts = Counter((t.split, t.label) for t in kept)
    assert counts["train", 0] == counts["train", 1] and counts["test", 0] == counts["test", 1]
    assert len(kept) + len(dropped) == len(rows) and set(dropped.values()) <= {"balance"}


def test_a_limit_draws_by_seed(tmp_path: Path) -> None:
    rows = own_triples(30)
    drawn = [[t.key for t in select(rows, tmp_path, limit=10, seed=seed)[0]] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
