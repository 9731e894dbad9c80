from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from soundmind.data import token_count
from soundmind.data.token_count import TokenCounter, find_tokenizer_file, splits_like_qwen2

WORDS = ["it's", "'S", "'ll", "'", "...", "?\n\n", "12", "a1b", "Premise", "é", "前提", "<|AUDIO|>"]
MARKS = ["\u2014", "\u2019s", "\u0663", "\u017f", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85"]
MARKS += ["\u2192", "\u2200x", " \u00ac"]
PIECES = st.sampled_from(WORDS + MARKS)


@pytest.fixture(scope="module")
def both(bpe_folder: Path) -> tuple[TokenCounter, Tokenizer]:
    path = bpe_folder / "tokenizer.json"
    return TokenCounter(path), Tokenizer.from_file(str(path))


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_count_is_the_tokenizers_own(both: tuple[TokenCounter, Tokenizer], text: str) -> None:
    counter, tokenizer = both
    if text.isprintable() or text.encode("utf-8", "ignore").decode() == text:
        expected = len(tokenizer.encode(text, add_special_tokens=False))
        assert counter.count([text, text]) == [expected, expected]


def test_plain_characters_beyond_ascii_are_neither_letters_digits_nor_spaces() -> None:
    plain = [chr(i) for i in range(128, 0x3000) if not token_count._NOT_PLAIN.search(chr(i))]
    assert len(plain) > 300
    for character in plain:
        assert unicodedata.category(character)[0] in "PS"
        assert unicodedata.normalize("NFC", character) == character
    # none of them joins with a plain neighbour either
    text = "".join(f"{character}a={character} {character}" for character in plain)
    assert unicodedata.normalize("NFC", text) == text


def test_real_annotations_are_counted_exactly(
    both: tuple[TokenCounter, Tokenizer], alr_dev: Path
) -> None:
    counter, tokenizer = both
    lines = alr_dev.read_text("utf-8").splitlines()[:60]
    texts = [json.loads(line)[key] for line in lines for key in ("user_content", "answer")]
    expected = [len(e) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert counter.count(texts) == expected


def test_other_tokenizers_take_their_own_way(bpe_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((bpe_folder / "tokenizer.json").read_text("utf-8"))
    assert splits_like_qwen2(spec)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    assert not splits_like_qwen2(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    counter = TokenCounter(tmp_path / "tokenizer.json")
    assert counter.count(["plain words here"]) == [len(tokenizer.encode("plain words here"))]


def test_missing_tokenizer_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        find_tokenizer_file(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not found"):
        find_tokenizer_file(str(tmp_path / "absent" / "folder"))


def test_unreachable_hub_is_a_plain_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundmind.data.token_count.hub_is_reachable", lambda: False)
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"):
        find_tokenizer_file("no-such-org/no-such-model")
