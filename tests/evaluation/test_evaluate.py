"""The evaluation command without a model: grading, comparing, resuming, and every bad input."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment
from saved_evaluation import alr_test_lines, save, saved_line

from soundmind import evaluate as soundmind_evaluate
from soundmind.evaluation import evaluate
from soundmind.evaluation.grade import paper_figures
from soundmind.evaluation.store import Store, StoreError, read_predictions
from soundmind.evaluation.text import OutOfMemory, as_memory_error

# --- grading ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """656 saved answers of published length, 534 right, graded by the command."""
    folder = save(tmp_path_factory.mktemp("graded") / "ours", alr_test_lines())
    assert soundmind_evaluate.main(["grade", str(folder)]) == 0
    return folder


def test_534_right_of_656_grade_as_the_papers_figure(graded: Path) -> None:
    metrics = json.loads((graded / "metrics.json").read_text())
    accuracy = metrics["accuracy"]
    assert (accuracy["correct"], accuracy["n"]) == (534, 656)
    assert [f"{100 * bound:.1f}" for bound in accuracy["interval"]] == ["78.2", "84.2"]
    assert f"{100 * metrics['majority_floor']['value']:.2f}" == "54.88"


def test_the_papers_figures_stand_beside_the_alr_test_split(graded: Path) -> None:
    page = (graded / "report.html").read_text()
    assert "81.40" in page and "77.59" in page and "54.88" in page and "78.2 to 84.2" in page


def test_the_page_of_656_long_answers_stays_under_3_mb(graded: Path) -> None:
    assert (graded / "report.html").stat().st_size < 3_000_000


def test_the_page_of_the_real_reasonings_stays_under_3_mb(alr_dev: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in alr_dev.read_text(encoding="utf-8").splitlines()]
    texts = [row["answer"] for row in rows] + [row["answer"] for row in rows[:50]]
    lines = [
        saved_line(i, i % 2, 1, text[::-1] if i >= 606 else text) for i, text in enumerate(texts)
    ]
    folder = save(tmp_path / "real", lines)
    evaluate.finish_evaluation(folder)
    assert len(lines) == 656 and (folder / "report.html").stat().st_size < 3_000_000


def test_grading_again_changes_nothing(graded: Path) -> None:
    before = {path.name: path.read_bytes() for path in graded.glob("*.*")}
    evaluate.finish_evaluation(graded)
    assert {path.name: path.read_bytes() for path in graded.glob("*.*")} == before


def test_the_page_needs_no_network(graded: Path) -> None:
    page = (graded / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_responses_cannot_inject_markup(tmp_path: Path) -> None:
    line = saved_line(0, 1, 1, "</script><script>alert(1)</script><img src=x onerror=alert(2)>")
    folder = save(tmp_path / "x", [line], model__given="<b>model</b>")
    evaluate.finish_evaluation(folder)
    page = (folder / "report.html").read_text()
    assert "alert(" not in page and "<b>model" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "dev"},
        {"data_source": "soundmind/practice"},
        {"id": "0657"},
        {"label": 1, "ground_truth": "entailed"},
        {"model__stand_in": "stand-in with random weights"},
        {"data__mode": "text"},  # nobody has published text to text
    ],
)
def test_the_papers_figures_stand_nowhere_else(changes: dict[str, Any]) -> None:
    """656 rows of which one is another, or another configuration; three rows of the test split."""
    settings = {key: value for key, value in changes.items() if "__" in key}
    lines = alr_test_lines()
    first = next(line for line in lines if line["label"] == 0)
    first |= {key: value for key, value in changes.items() if "__" not in key}
    config = {
        "data": {"mode": settings.get("data__mode", "audio")},
        "model": {"stand_in": settings.get("model__stand_in")},
        "output_modality": "text",
    }
    assert paper_figures(config, lines) == []
    assert paper_figures(config, lines[:3]) == []


def test_published_counts_and_percentages_agree() -> None:
    for mode, modality in (("audio", "text"), ("text", "speech"), ("audio", "speech")):
        config = {
            "data": {"mode": mode},
            "model": {"stand_in": None},
            "output_modality": modality,
        }
        figures = paper_figures(config, alr_test_lines())
        assert len(figures) == 2
        for figure in figures:
            assert f"{100 * figure['correct'] / figure['n']:.2f}" == f"{figure['accuracy']:.2f}"
            assert ("wer" in figure) == (modality == "speech")


def test_foreign_predictions_are_refused_with_the_key_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "x", [{"index": 0, "prompt": "?", "completion": "!"}])
    assert soundmind_evaluate.main(["grade", str(folder)]) == 2
    assert "lacks 'data_source'" in capsys.readouterr().err
    assert soundmind_evaluate.main(["grade", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predictions", "config", "message"),
    [
        (b'{"a":1}\n{"a":"\xe9"}\n', b"", "lacks 'data_source'"),
        (b"[1]\n", b"", "predictions.jsonl:1: a JSON object is wanted, found list"),
        (b'{"a": 1\n', b"", "predictions.jsonl:1: not a JSON line"),
        (b"", b"model: {given: x}\n", "config.yaml lacks data, generation"),
        (b"", b'{"a: [', "config.yaml cannot be read"),
        (b"", b"\xff\xfe", "config.yaml cannot be read"),
        (b"", b"- 1\n", "config.yaml holds no settings"),
    ],
)
def test_damaged_folders_are_named_in_one_line(
    tmp_path: Path,
    predictions: bytes,
    config: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save(tmp_path / "x", [saved_line(0, 1, 1)])
    if predictions:
        (folder / "predictions.jsonl").write_bytes(predictions)
    if config:
        (folder / "config.yaml").write_bytes(config)
    assert soundmind_evaluate.main(["grade", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") <= 2 and message in error


# --- resuming --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_run(
    tmp_path_factory: pytest.TempPathFactory, random_stand_in: Path
) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command with a formula for a model, on 40 rows of text, 4 a batch."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [
        {"id": f"{i:04d}", "user_content": f"All {i} are {i}.", "answer": "So.", "label": i % 2}
        for i in range(40)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "soundmind.preprocess", "--mode", "text", "--splits", "test"]
    subprocess.run(
        [*command, "--data-dir", str(folder), "--output-dir", str(folder / "parquet")],
        check=True,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
    )

    def start(seconds: float, output: Path, *limits: str) -> subprocess.Popen[str]:
        script = [sys.executable, str(REPOSITORY / "tests/support/evaluate_fake.py"), str(seconds)]
        data = ["--data", str(folder / "parquet/text/test.parquet"), "--batch-rows", "4"]
        model = ["--model", str(random_stand_in), "--output-dir", str(output)]
        return subprocess.Popen(
            [*script, *limits, *model, *data],
            cwd=REPOSITORY,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_predictions(folder)]


@pytest.fixture(scope="module")
def undisturbed(
    fake_run: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    process = fake_run(0.0, folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return folder


def test_five_kills_at_random_moments_leave_no_trace(
    fake_run: Callable[..., subprocess.Popen[str]], undisturbed: Path, tmp_path: Path
) -> None:
    generator = random.Random(0)
    folder = tmp_path / "out"
    for kill in range(5):
        process = fake_run(0.05, folder)
        rows = kill * 6  # let each run get somewhere before it dies
        while process.poll() is None and count_lines(folder) <= rows:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = fake_run(0.0, folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "continuing: " in out
    assert without_seconds(folder) == without_seconds(undisturbed)
    assert [line["index"] for line in read_predictions(folder)] == list(range(40))
    metrics = [(path / "metrics.json").read_text() for path in (folder, undisturbed)]
    assert metrics[0] == metrics[1]


def count_lines(folder: Path) -> int:
    path = folder / "predictions.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_full_disk_keeps_what_is_finished_and_the_rest_follows(
    fake_run: Callable[..., subprocess.Popen[str]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    process = fake_run(0.0, folder, "--file-limit", "9000")
    out, err = process.communicate()
    assert process.returncode == 2, out + err
    assert "make room and run the same command again" in err
    kept = read_predictions(folder)
    assert 0 < len(kept) < 40 and len(kept) % 4 == 0
    assert fake_run(0.0, folder).wait() == 0
    assert without_seconds(folder) == without_seconds(undisturbed)


def test_a_finished_evaluation_asks_nothing_again(
    fake_run: Callable[..., subprocess.Popen[str]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    before = (folder / "predictions.jsonl").read_bytes()
    process = fake_run(1e6, folder)  # would never end if it asked a row
    assert process.wait() == 0
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out", {"seed": 0})
    with pytest.raises(StoreError, match="another evaluation is running"):
        Store.open(tmp_path / "out", {"seed": 0})
    store.lock.close()
    with pytest.raises(StoreError, match=r"seed: 0 there, 1 now.*another --output-dir"):
        Store.open(tmp_path / "out", {"seed": 1})


def test_a_piece_of_a_line_and_of_a_batch_are_cut_off(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out", {"seed": 0})
    store.append([{"index": i} for i in range(7)])
    with (store.path / "predictions.jsonl").open("a") as file:
        file.write('{"index": 7, "resp')
    assert store.resume(batch_lines=3, total_lines=20) == 6
    assert [line["index"] for line in store.predictions()] == list(range(6))
    assert store.resume(batch_lines=4, total_lines=6) == 6  # all there: the last batch is short


def test_predictions_without_their_configuration_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match=r"no config\.yaml"):
        Store.open(tmp_path, {"seed": 0})
    assert (tmp_path / "predictions.jsonl").read_text() == "{}\n"


# --- running out of memory -------------------------------------------------------------------------


def test_out_of_memory_starts_over_with_half_the_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: evaluate.Options) -> Path:
        raise OutOfMemory(16, RuntimeError("CUDA out of memory"))

    started: list[list[str]] = []
    monkeypatch.setattr(soundmind_evaluate, "evaluate", fail)
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    soundmind_evaluate.main(["--model", "m", "--data", "d.parquet", "--max-num-seqs", "16"])
    assert started[0][-2:] == ["--max-num-seqs", "8"]
    assert soundmind_evaluate.parse_options(started[0][3:]).max_num_seqs == 8
    assert "max_num_seqs=16" in capsys.readouterr().err


def test_one_sequence_that_does_not_fit_is_an_error_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: evaluate.Options) -> Path:
        raise OutOfMemory(1, RuntimeError("CUDA out of memory"))

    monkeypatch.setattr(soundmind_evaluate, "evaluate", fail)
    assert soundmind_evaluate.main(["--model", "m", "--data", "d.parquet"]) == 2
    assert "--tensor-parallel" in capsys.readouterr().err


def test_lack_of_memory_is_recognised_behind_other_errors() -> None:
    try:
        try:
            raise ValueError("No available memory for the cache blocks.")
        except ValueError as error:
            raise RuntimeError("Engine core initialization failed") from error
    except RuntimeError as error:
        assert isinstance(as_memory_error(error, 8), OutOfMemory)
    other = RuntimeError("shapes do not match")
    assert as_memory_error(other, 8) is other


# --- command line ----------------------------------------------------------------------------------


def test_the_default_folder_tells_settings_apart(tmp_path: Path) -> None:
    config = {
        "model": {"given": "SoundMind-RL/SoundMindModel"},
        "data": {"mode": "audio", "split": "test"},
        "output_modality": "text",
        "generation": {"seed": 0},
    }
    first = evaluate.default_output_dir(config)
    assert first.name.startswith("SoundMindModel_audio-to-text_test_")
    assert first != evaluate.default_output_dir({**config, "generation": {"seed": 1}})
