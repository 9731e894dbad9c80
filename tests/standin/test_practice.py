"""The practice set: its language, its controls, and that it is rebuilt byte for byte."""

from __future__ import annotations

import json
import random
import wave
from collections import Counter
from pathlib import Path

import pytest

from soundmind import practice as soundmind_practice
from soundmind.standin import controls, practice, syllogism
from soundmind.standin.syllogism import Syllogism
from soundmind.task.labels import parse_verdict, verdict_of

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
SMALL = {"train": 10, "dev": 2, "test": 9}


def need_speech() -> None:
    pytest.importorskip("espeakng_loader")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- language -------------------------------------------------------------------------------------


def test_the_language_has_240_sentences_that_read_back() -> None:
    sentences = list(syllogism.all_syllogisms())
    assert len({s.text for s in sentences}) == len(sentences) == 240
    assert all(syllogism.parse_syllogism(s.text) == s for s in sentences)
    assert sum(s.label for s in sentences) == 48


def test_text_of_another_data_set_is_an_error_with_an_example() -> None:
    with pytest.raises(ValueError, match="All wugs are"):
        syllogism.parse_syllogism("Major premise is: all men are mortal.")


def test_the_answer_compares_pairs_and_ends_in_the_verdict() -> None:
    row = Syllogism("wug", "dax", "wug", "fep", "Ann")
    assert row.text == "All wugs are daxes, Ann is a wug, so Ann is a fep."
    assert row.answer == "wug, wug, same, dax, fep, different\nAnswer: not-entailed"


def test_every_answer_states_the_verdict_of_its_label() -> None:
    for row in syllogism.all_syllogisms():
        assert parse_verdict(row.answer) == verdict_of(row.label)


# --- rows -----------------------------------------------------------------------------------------


def test_labels_voices_and_mismatches_are_balanced_in_every_split() -> None:
    for split, count in practice.ROWS.items():
        rows = [practice.make_row(0, split, index) for index in range(count)]
        assert sum(row.syllogism.label for row in rows) == count // 2
        wrong_middle = sum(row.syllogism.minor != row.syllogism.first for row in rows)
        assert wrong_middle == count // 4
        held_out = [row for row in rows if row.recipe.held_out]
        assert len(held_out) == (count // 2 if split == "test" else 0)
        assert sum(row.syllogism.label for row in held_out) == len(held_out) // 2


def test_held_out_voices_never_speak_train_or_dev() -> None:
    used = {
        split: {practice.make_row(0, split, i).recipe.voice for i in range(400)}
        for split in practice.ROWS
    }
    assert used["train"] == used["dev"] == set(practice.TRAIN_VOICES)
    assert used["test"] == set(practice.TRAIN_VOICES) | set(practice.HELD_OUT_VOICES)
    assert not set(practice.TRAIN_VOICES) & set(practice.HELD_OUT_VOICES)


def test_no_single_word_tells_the_label() -> None:
    rows = [
        practice.make_row(0, "train", index).syllogism for index in range(practice.ROWS["train"])
    ]
    for word in ("first", "second", "minor", "conclusion", "name"):
        counts = Counter((getattr(row, word), row.label) for row in rows)
        for value in {value for value, _ in counts}:
            share = counts[value, 1] / (counts[value, 0] + counts[value, 1])
            assert abs(share - 0.5) < 0.06, (word, value, share)


def test_a_row_depends_on_seed_split_and_index_only() -> None:
    assert practice.make_row(3, "train", 17) == practice.make_row(3, "train", 17)
    rows = {practice.make_row(seed, split, 17) for seed in (0, 1) for split in ("train", "test")}
    assert len(rows) == 4


# --- controls -------------------------------------------------------------------------------------


def test_length_control_finds_a_shortcut_when_there_is_one() -> None:
    seconds, labels = [1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]
    found = controls.length_control((seconds, labels), (seconds, labels))
    assert found == {"threshold_seconds": 2.0, "fitted": 1.0, "scored": 1.0}
    shorter = controls.length_control((seconds, labels[::-1]), (seconds, labels[::-1]))
    assert shorter["scored"] == 1.0


def test_length_control_is_the_best_threshold_of_all() -> None:
    draw = random.Random(0)
    seconds = [round(draw.uniform(2, 4), 1) for _ in range(60)]  # with ties
    labels = [draw.randrange(2) for _ in range(60)]
    brute = max(
        max(hits, 60 - hits)
        for threshold in [0.0, *seconds]
        for hits in [sum((s > threshold) == bool(y) for s, y in zip(seconds, labels, strict=True))]
    )
    found = controls.length_control((seconds, labels), (seconds, labels))
    assert found["fitted"] == found["scored"] == pytest.approx(brute / 60, abs=1e-4)


def test_swapped_clips_leave_half_to_a_listener_and_none_in_place() -> None:
    labels = [practice.make_row(0, "test", index).syllogism.label for index in range(800)]
    partners = controls.swapped_partners(labels)
    assert sorted(partners) == list(range(800))
    assert all(partner != row for row, partner in enumerate(partners))
    same = [labels[partner] == label for partner, label in zip(partners, labels, strict=True)]
    assert sum(same) == 400
    # A listener that is right on these clips and wrong on those still scores half.
    right = [random.Random(index).random() < 0.9 for index in range(800)]
    heard = [label if ok else 1 - label for label, ok in zip(labels, right, strict=True)]
    hits = sum(heard[p] == label for p, label in zip(partners, labels, strict=True))
    assert abs(hits / 800 - 0.5) < 0.05


def test_a_row_that_cannot_be_swapped_is_an_error() -> None:
    with pytest.raises(ValueError, match="label 1 leaves one row"):
        controls.swapped_partners([0, 0, 0, 1])


# --- the built set --------------------------------------------------------------------------------


def test_the_committed_sample_is_what_the_command_makes(tmp_path: Path) -> None:
    need_speech()
    assert soundmind_practice.main(["--sample", str(tmp_path / "sample")]) == 0
    made, committed = tree(tmp_path / "sample"), tree(SAMPLE)
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []
    assert sum(map(len, committed.values())) < 4 * 2**20


def test_the_sample_is_laid_out_like_the_real_data() -> None:
    for split in practice.ROWS:
        rows = [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").open(encoding="utf-8")]
        assert [row["id"] for row in rows] == [f"{index:04d}" for index in range(1, 9)]
        for row in rows:
            assert set(row) == {"id", "user_content", "answer", "label"}
            assert (SAMPLE / split / row["id"] / f"answer_{row['label']}.wav").is_file()
            with wave.open(str(SAMPLE / split / row["id"] / "question.wav")) as clip:
                assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (
                    16_000,
                    1,
                    2,
                )


def test_bytes_do_not_depend_on_workers_or_size(tmp_path: Path) -> None:
    need_speech()
    practice.build_practice(tmp_path / "one", rows=SMALL, workers=1)
    practice.build_practice(tmp_path / "two", rows=SMALL, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    question = "train/0008/question.wav"  # the sample has eight train rows, this set ten
    assert tree(tmp_path / "one")[question] == (SAMPLE / question).read_bytes()


def test_a_complete_set_is_left_alone_and_a_changed_one_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_speech()
    practice.build_practice(tmp_path, rows=SMALL, workers=1)
    clip = tmp_path / "test" / "0003" / "question.wav"
    before = clip.stat().st_mtime_ns
    capsys.readouterr()
    practice.build_practice(tmp_path, rows=SMALL, workers=1)
    assert capsys.readouterr().out.endswith("up to date\n")
    assert clip.stat().st_mtime_ns == before
    assert practice.verify(tmp_path) == []

    clip.write_bytes(clip.read_bytes()[:-2] + b"\1\1")
    assert practice.verify(tmp_path) == ["test"]
    clip.unlink()
    practice.build_practice(tmp_path, rows=SMALL, workers=1)
    assert practice.verify(tmp_path) == []


def test_an_interrupted_build_looks_incomplete_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_speech()
    practice.build_practice(tmp_path / "whole", rows=SMALL, workers=1)
    stock, spoken = practice.speak_question, []

    def power_cut(row: practice.PracticeRow) -> object:
        if len(spoken) == 14:  # in dev or test, after a complete train split
            raise KeyboardInterrupt
        spoken.append(row)
        return stock(row)

    monkeypatch.setattr(practice, "speak_question", power_cut)
    with pytest.raises(KeyboardInterrupt):
        practice.build_practice(tmp_path / "cut", rows=SMALL, workers=1)
    assert (tmp_path / "cut" / "train.jsonl").is_file()
    assert not (tmp_path / "cut" / "test.jsonl").exists()

    spoken.clear()
    monkeypatch.setattr(practice, "speak_question", lambda row: (spoken.append(row), stock(row))[1])
    practice.build_practice(tmp_path / "cut", rows=SMALL, workers=1)
    assert len(spoken) == sum(SMALL.values()) - 14  # nothing is spoken twice
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_another_seed_replaces_the_set(tmp_path: Path) -> None:
    need_speech()
    practice.build_practice(tmp_path, rows=SMALL, workers=1)
    old = tree(tmp_path)
    practice.build_practice(tmp_path, seed=1, rows=SMALL, workers=1)
    new = tree(tmp_path)
    assert old["train.jsonl"] != new["train.jsonl"]
    assert not [name for name in new if ".partial" in name]
    assert practice.verify(tmp_path) == []


def test_verifying_nothing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"soundmind\.practice --output"):
        practice.verify(tmp_path)
