"""The command from triples to Parquet, killed in each stage, and with everything that can be wrong."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from own_data import arguments, contents, read
from own_triples import own_triples, write_triples
from processes import REPOSITORY
from scripted_server import ScriptedServer, teacher

from soundmind import preprocess
from soundmind.make_data import main
from soundmind.making.stages import STAGE_NAMES
from soundmind.system.chat import Client
from soundmind.task.labels import parse_verdict, verdict_of

SPLITS = ["--split", "train=0.5", "dev=0.25", "test=0.25"]


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(teacher) as running:
        yield running


@pytest.fixture(scope="module")
def made(server: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 20 rows in three splits; the path has a space in it."""
    folder = tmp_path_factory.mktemp("own data")
    source = write_triples(folder / "triples.jsonl", own_triples(20))
    voices = ["--voices", "en-us", "en-us+m3", "en-us+f2", "en-gb", "--separate-voices"]
    assert main(arguments(folder / "set", source, server.url, *SPLITS, *voices)) == 0
    return folder / "set"


# -- what is made ---------------------------------------------------------------------------------


def test_both_published_layouts_hold_the_same_rows(made: Path) -> None:
    for split, count in (("train", 10), ("dev", 5), ("test", 5)):
        github, hub = read(made / f"{split}.jsonl"), read(made / split / "metadata.jsonl")
        assert [row["id"] for row in github] == [f"{n:04d}" for n in range(1, count + 1)]
        for one, other in zip(github, hub, strict=True):
            assert list(one) == ["id", "user_content", "answer", "label"]
            assert one["user_content"] == other["annotation_question"]
            assert one["answer"] == other["annotation_answer"]
            assert (one["id"], one["label"]) == (other["id"], other["label"])
            own = json.loads((made / split / one["id"] / "annotation.json").read_text())
            assert own == other
            assert other["answer_file_name"] == f"{one['id']}/answer_{one['label']}.wav"
            assert (made / split / other["question_file_name"]).is_file()


@pytest.mark.parametrize("hidden", ["metadata.jsonl", "{split}.jsonl"])
def test_preprocess_reads_either_layout_to_the_same_parquet(
    hidden: str, made: Path, tmp_path: Path
) -> None:
    for split in ("train", "dev", "test"):
        for path in (made / split).rglob("*"):
            target = tmp_path / "set" / path.relative_to(made)
            if path.is_file() and path.name not in (hidden, "annotation.json"):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
        if hidden != "{split}.jsonl":
            os.link(made / f"{split}.jsonl", tmp_path / "set" / f"{split}.jsonl")
    options = ["--mode", "audio", "--data-dir", str(tmp_path / "set"), "--tokenizer", "none"]
    assert preprocess.main(options) == 0
    for split in ("train", "dev", "test"):
        name = f"parquet/audio/{split}.parquet"
        assert pq.read_table(tmp_path / "set" / name).equals(pq.read_table(made / name))


def test_every_answer_ends_in_the_verdict_of_its_label(made: Path) -> None:
    for split in ("train", "dev", "test"):
        for row in read(made / f"{split}.jsonl"):
            assert parse_verdict(row["answer"]) == verdict_of(row["label"])


def test_clips_are_as_published_and_as_long_as_the_report_says(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    for split in ("train", "dev", "test"):
        clips = list((made / split).rglob("question.wav"))
        infos = [soundfile.info(clip) for clip in clips]
        assert {(i.samplerate, i.channels, i.subtype) for i in infos} == {(24_000, 1, "PCM_16")}
        total = sum(info.duration for info in infos)
        assert report["splits"][split]["question_seconds"]["sum"] == pytest.approx(total, abs=0.02)


def test_separate_voices_leaves_none_in_train_that_is_in_dev_or_test(made: Path) -> None:
    splits = json.loads((made / "report.json").read_text())["splits"]
    held_out = {*splits["dev"]["voices"], *splits["test"]["voices"]}
    assert held_out and not held_out & set(splits["train"]["voices"])


def test_the_data_card_names_sources_teacher_voices_and_what_is_not_known(made: Path) -> None:
    card = (made / "README.md").read_text()
    for text in (
        "`triples.jsonl`",
        "`m`",
        "espeak-ng",
        "en-gb",
        "licence not known",
        "| train | 10 |",
    ):
        assert text in card


def test_a_licence_that_is_known_is_on_the_card(server: ScriptedServer, tmp_path: Path) -> None:
    source = write_triples(tmp_path / "logiqa_nli.jsonl", own_triples(4))
    more = ["--questions-only", "--licence", "cc-by-nc-sa-4.0", "--modes"]
    assert main(arguments(tmp_path / "set", source, server.url, *more)) == 0
    card = (tmp_path / "set/README.md").read_text()
    assert (
        card.startswith("---\nlicense: cc-by-nc-sa-4.0\n") and "LogiQA 2.0: CC BY-NC-SA 4.0" in card
    )


def test_the_same_command_again_asks_and_speaks_nothing(made: Path, server: ScriptedServer) -> None:
    before, asked = contents(made), len(server.bodies)
    clips = {path: path.stat().st_mtime_ns for path in (made / "work/clips").rglob("*.wav")}
    voices = ["--voices", "en-us", "en-us+m3", "en-us+f2", "en-gb", "--separate-voices"]
    source = made.parent / "triples.jsonl"
    assert main(arguments(made, source, server.url, *SPLITS, *voices)) == 0
    assert contents(made) == before and len(server.bodies) == asked
    assert {path: path.stat().st_mtime_ns for path in clips} == clips


def test_questions_only_leaves_answers_unspoken_in_both_layouts(
    server: ScriptedServer, tmp_path: Path
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(4))
    assert main(arguments(tmp_path / "set", source, server.url, "--questions-only")) == 0
    assert list((tmp_path / "set/train").rglob("answer*")) == []
    assert "answer_file_name" not in read(tmp_path / "set/train/metadata.jsonl")[0]
    assert pq.read_table(tmp_path / "set/parquet/audio/train.parquet").num_rows == 4


def test_what_is_dropped_in_any_stage_is_listed_and_counted(
    server: ScriptedServer, tmp_path: Path
) -> None:
    rows = own_triples(8)
    rows += [rows[0], {**rows[1], "label": "perhaps"}, {"major": "x"}]
    source = write_triples(tmp_path / "t.jsonl", rows)
    more = ["--questions-only", "--modes", "--tries", "1", "--seed", "5"]
    assert main(arguments(tmp_path / "set", source, server.url, *more)) == 0
    dropped = read(tmp_path / "set/dropped.jsonl")
    report = json.loads((tmp_path / "set/report.json").read_text())
    counted = {(s, why): n for s, e in report["stages"].items() for why, n in e["dropped"].items()}
    listed = [(item["stage"], item["reason"]) for item in dropped]
    assert counted == {reason: listed.count(reason) for reason in set(listed)}
    assert counted["triples", "duplicate"] == counted["triples", "bad-label"] == 1
    assert all(f"{source}:" in item["where"] for item in dropped)
    kept = len(read(tmp_path / "set/train.jsonl"))
    assert kept + len(dropped) == len(rows)


# -- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--source", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--voices", "klingon"], "klingon"),
        (["--teacher-url", "", "--teacher-model", ""], "--teacher-url"),
        (["--split", "train=0"], "train=0"),
        (["--split", "validation=1"], "validation"),
        (["--workers", "0"], "--workers"),
        (["--teacher-url", "http://127.0.0.1:9/v1", "--timeout", "2"], "does not answer"),
        (["--wording", "nowhere.yaml"], "nowhere.yaml"),
        (["--speech-command", "no-such-program {output}", "--voices", "x"], "no-such-program"),
        (["--speech-url", "http://x/v1", "--speech-command", "y {output}"], "exclude each other"),
        (["--speech-url", "http://x/v1"], "--voices"),
        (["--separate-voices", "--voices", "en-us"], "two voices"),
        (["--stages", "speech"], "run the stage"),
        (["--max-total-tokens", "10"], "budget"),
        (["--max-cost", "1"], "--price"),
        (["--max-cost", "nan", "--price", "1", "1"], "--max-cost"),
        (["--per-minute", "0"], "--per-minute"),
        (["--timeout", "-1"], "--timeout"),
        (["--limit", "0"], "--limit"),
        (["--answer-words", "9", "3"], "--answer-words"),
        (["--teacher-body", "[1]"], "--teacher-body"),
        (["--teacher-body", '{"model": "x"}'], "--teacher-body"),
        (["--separate-voices", "--voices", "en-us", "en-us"], "two voices"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_ends_in_one_line_and_status_2(
    change: list[str],
    said: str,
    server: ScriptedServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("soundmind.make_data.Client", partial(Client, first_pause=0.01))
    source = write_triples(tmp_path / "t.jsonl", own_triples(2))
    options = arguments(tmp_path / "set", source, server.url, "--questions-only")
    assert main([*options, *change]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("error: ") and error.count("\n") <= 1


def test_a_split_that_is_no_longer_made_leaves_nothing_behind(
    server: ScriptedServer, tmp_path: Path
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(8))
    options = arguments(tmp_path / "set", source, server.url, "--questions-only")
    assert main([*options, "--split", "train=0.5", "dev=0.5"]) == 0
    assert list((tmp_path / "set").rglob("dev*")) != []
    assert main(options) == 0
    assert list((tmp_path / "set").rglob("dev*")) == []
    assert (
        "dev" not in json.loads((tmp_path / "set/parquet/audio/report.json").read_text())["splits"]
    )


def test_a_voice_that_does_not_exist_is_said_before_the_teacher_is_paid(
    server: ScriptedServer, tmp_path: Path
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(2))
    asked = len(server.bodies)
    assert main([*arguments(tmp_path / "set", source, server.url), "--voices", "klingon"]) == 2
    assert len(server.bodies) == asked


def test_a_folder_that_holds_other_things_is_not_touched(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(2))
    other = tmp_path / "alr"
    other.mkdir()
    (other / "train.jsonl").write_text("published")
    assert main(arguments(other, source, server.url)) == 2
    assert "other things" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["train.jsonl"]


def test_stages_run_alone_and_an_old_file_does_not_meet_a_new_question(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_triples(tmp_path / "t.jsonl", own_triples(4))
    options = arguments(tmp_path / "set", source, server.url, "--questions-only", "--modes")
    for stage in STAGE_NAMES:
        assert main([*options, "--stages", stage]) == 0
    assert (tmp_path / "set/report.json").is_file()
    write_triples(source, own_triples(3, seed=2))
    assert main([*options, "--stages", "triples"]) == 0
    assert main([*options, "--stages", "speech"]) == 2
    assert "run the stages from words on" in capsys.readouterr().err


def test_other_words_in_a_row_ask_and_speak_that_row_anew_and_no_other(
    server: ScriptedServer, tmp_path: Path
) -> None:
    rows = own_triples(5)
    source = write_triples(tmp_path / "t.jsonl", rows)
    options = arguments(tmp_path / "set", source, server.url, "--questions-only", "--modes")
    assert main(options) == 0
    clips = set((tmp_path / "set/work/clips").rglob("*.wav"))
    asked = len(server.bodies)
    rows[2] = own_triples(1, seed=4)[0]
    write_triples(source, rows)
    assert main(options) == 0
    new = server.bodies[asked:]
    assert 1 <= len(new) <= 3 and all(rows[2]["major"] in str(body) for body in new)
    assert len(set((tmp_path / "set/work/clips").rglob("*.wav")) - clips) == 1


def test_a_clip_that_is_not_understood_is_said_again_and_then_dropped(
    server: ScriptedServer, tmp_path: Path
) -> None:
    """Deaf to everything in the first voice, and for good to one row."""
    rows = own_triples(6)
    source = write_triples(tmp_path / "t.jsonl", rows)
    ears = tmp_path / "ears.py"
    hopeless = rows[3]["conclusion"].split()[0]
    ears.write_text(
        "import json, pathlib, sys\n"
        "work = pathlib.Path(sys.argv[1]).parents[2]\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from soundmind.making.engines import Espeak\n"
        "from soundmind.making.sound import Utterance\n"
        "for line in (work / 'speech.jsonl').read_text().splitlines():\n"
        "    row = json.loads(line)\n"
        "    for voice in ('en-us', 'en-gb'):\n"
        "        for attempt in (0, 1):\n"
        "            u = Utterance(row['spoken_question'], voice, Espeak().describe(), attempt)\n"
        "            if u.key in sys.argv[1] and attempt == 1:\n"
        f"                print('' if '{hopeless}' in u.text else u.text)\n"
    )
    command = f"{shlex.quote(sys.executable)} {ears} {{audio}} {shlex.quote(str(REPOSITORY))}"
    more = ["--questions-only", "--voices", "en-us", "en-gb", "--recogniser-command", command]
    assert main(arguments(tmp_path / "set", source, server.url, *more, "--modes")) == 0
    report = json.loads((tmp_path / "set/report.json").read_text())
    assert report["stages"]["check"]["dropped"] == {"not-understood": 1}
    assert report["stages"]["check"]["said_again"] == 6
    assert report["splits"]["train"]["word_error_rate"]["max"] == 0.0
    dropped = read(tmp_path / "set/dropped.jsonl")
    assert [item["where"].rpartition(":")[2] for item in dropped] == ["4"]


def test_a_server_of_the_speech_protocol_speaks_both_parts_and_is_asked_once(
    server: ScriptedServer, tmp_path: Path
) -> None:
    def speak(body: dict[str, Any]) -> tuple[int, bytes]:
        file = io.BytesIO()
        samples = 0.1 * np.sin(np.arange(len(body["input"].split()) * 9_600) * 0.05)
        soundfile.write(file, samples, 24_000, format="WAV")
        return 200, file.getvalue()

    source = write_triples(tmp_path / "t.jsonl", own_triples(3))
    with ScriptedServer(speak) as talker:
        more = ["--speech-url", talker.url, "--speech-model", "tts-1", "--voices", "anna", "ben"]
        for _ in range(2):
            assert main(arguments(tmp_path / "set", source, server.url, *more)) == 0
        assert len(talker.bodies) == 6
        assert {body["voice"] for body in talker.bodies} <= {"anna", "ben"}
    said = {body["input"] for body in talker.bodies}
    rows = read(tmp_path / "set/work/speech.jsonl")
    assert said == {row[f"spoken_{part}"] for row in rows for part in ("question", "answer")}
    assert len(list((tmp_path / "set/train").rglob("answer_*.wav"))) == 3


def test_faulty_clips_are_dropped_by_name_and_never_in_the_set(
    server: ScriptedServer, tmp_path: Path
) -> None:
    """An engine that is silent for one row and endless for another."""
    rows = own_triples(5)
    source = write_triples(tmp_path / "t.jsonl", rows)
    names = [row["conclusion"].split()[0] for row in rows]
    engine = tmp_path / "engine.py"
    engine.write_text(
        "import numpy, soundfile, sys\n"
        "text = sys.stdin.read()\n"
        "hum = 0.1 * numpy.sin(numpy.arange(24_000 * 30) * 0.1)\n"
        f"hum = hum * 0 if '{names[1]}' in text else hum\n"
        f"hum = numpy.tile(hum, 20) if '{names[2]}' in text else hum\n"
        "soundfile.write(sys.argv[1], hum, 24_000)\n"
    )
    command = f"{shlex.quote(sys.executable)} {engine} {{output}}"
    more = ["--questions-only", "--speech-command", command, "--voices", "x", "--modes"]
    assert main(arguments(tmp_path / "set", source, server.url, *more)) == 0
    dropped = read(tmp_path / "set/dropped.jsonl")
    assert [(d["where"].rpartition(":")[2], d["reason"]) for d in dropped] == [
        ("2", "silent"),
        ("3", "endless"),
    ]
    assert len(read(tmp_path / "set/train.jsonl")) == 3
    for clip in (tmp_path / "set/train").rglob("question.wav"):
        assert np.abs(soundfile.read(clip)[0]).max() > 0.01
