"""Questions by template, and writing as spoken words."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from soundmind.making.near import words_of
from soundmind.making.words import RELEASED, Wording
from soundmind.system.errors import UserError

AWKWARD = [
    line.rpartition(" | ")[::2]
    for line in (Path(__file__).with_name("awkward.txt")).read_text("utf-8").split("\n")
    if line and not line.startswith("#")
]
WORDING = Wording.load()


def test_the_template_rebuilds_every_released_question_byte_for_byte(alr_dev: Path) -> None:
    rows = [json.loads(line) for line in alr_dev.read_text("utf-8").splitlines()]
    assert len(rows) == 606
    for row in rows:
        parts = WORDING.parts(row["user_content"])
        assert parts is not None
        assert WORDING.question(parts).encode() == row["user_content"].encode()


def test_no_digit_and_no_sign_of_a_released_row_is_left_unspoken(alr_dev: Path) -> None:
    for line in alr_dev.read_text("utf-8").splitlines()[:60]:
        row = json.loads(line)
        spoken = WORDING.spoken(row["user_content"] + "\n" + row["answer"])
        assert {c for c in spoken if not (c.isalpha() or c in " \n.,;:!?'\"()-")} == set()


def test_there_are_two_hundred_awkward_sentences() -> None:
    assert len(AWKWARD) >= 200


@pytest.mark.parametrize(("written", "expected"), AWKWARD, ids=[w for w, _ in AWKWARD])
def test_an_awkward_sentence_is_spoken_in_full(written: str, expected: str) -> None:
    assert words_of(WORDING.spoken(written)) == words_of(expected)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_whatever_is_written_only_letters_and_pauses_are_spoken(text: str) -> None:
    spoken = WORDING.spoken(text)
    left = {c for c in spoken if unicodedata.category(c)[0] not in "LM"} - set(" \n.,;:!?'\"()-")
    assert left == set()


@given(st.lists(st.sampled_from(["river", "Anna", "is", "entailed", "not"]), max_size=12))
def test_plain_words_are_spoken_as_they_are(words: list[str]) -> None:
    assert WORDING.spoken(" ".join(words)) == " ".join(words)


def test_braces_and_quotes_in_a_part_go_in_as_they_are() -> None:
    parts = ('{minor} says "x".\nMinor', " {conclusion}", '{0} \\1 "')
    assert WORDING.parts(WORDING.question(parts)) == parts


def test_a_wording_of_ones_own_takes_what_it_leaves_out_from_the_released_one(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "language: en\nteacher: Think.\nquestion: '{major}? {minor}! {conclusion}.'\n"
        "abbreviations: {wug: small animal}\n"
    )
    wording = Wording.load(own)
    assert wording.question(("A", "B", "C")) == "A? B! C."
    assert wording.spoken("A wug eats 5 %.") == "A small animal eats five percent."


def test_another_language_has_its_own_numbers_and_decimals(tmp_path: Path) -> None:
    own = tmp_path / "deutsch.yaml"
    own.write_text(
        "language: de\ndecimal: ','\nteacher: Denke.\nquestion: '{major} {minor} {conclusion}'\n"
        "units: {'%': [Prozent, Prozent]}\nsymbols: {'&': und}\n"
    )
    spoken = Wording.load(own).spoken("Es sind 3,5 % & 1.200 Leute in 21 Tagen.")
    assert spoken == (
        "Es sind drei Komma fünf Prozent und eintausendzweihundert Leute in einundzwanzig Tagen."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "{major} {minor}"}, "conclusion"),
        ({"question": "{major} {minor} {conclusion} {other}"}, "other"),
        ({"question": None}, "question"),
        ({"teacher": 7}, "teacher"),
        ({"colour": "red"}, "colour"),
        ({"language": "xx"}, "xx"),
        ({"units": {"kg": "kilogram"}}, "units"),
        ({"symbols": {"&": True}}, "symbols"),
        ({"symbols": {"": "nothing"}}, "symbols"),
        ({"decimal": ";"}, "decimal"),
    ],
)
def test_a_wording_that_cannot_be_used_names_file_and_key(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    values = {**yaml.safe_load(RELEASED.read_text("utf-8")), **change}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    with pytest.raises(UserError, match=said) as error:
        Wording.load(path)
    assert "own.yaml" in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- list", b""])
def test_a_wording_file_that_is_none_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.yaml"):
        Wording.load(path)
