"""The evaluation command without a model: grading, comparing, resuming, and every bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import REPOSITORY, clean_environment
from saved_evaluation import alr_test_lines, save, saved_line

from soundmind import evaluate as soundmind_evaluate
from soundmind.evaluation import evaluate
from soundmind.evaluation.compare import CompareError, compare
from soundmind.evaluation.examples import DataError, read_examples
from soundmind.evaluation.grade import paper_figures
from soundmind.evaluation.models import ADAPTERS, known_models, open_model, render
from soundmind.evaluation.store import Store, StoreError, read_predictions
from soundmind.evaluation.text import OutOfMemory, as_memory_error
from soundmind.model.folder import ModelError
from soundmind.system import hub

# --- grading --------------------------------------------------------------------------------------


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


# --- comparing ------------------------------------------------------------------------------------


def test_compare_counts_rows_won_and_lost_and_corrects_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [saved_line(i, i % 2, i % 2 if i < 60 else 1 - i % 2) for i in range(100)]
    better = [saved_line(i, i % 2, i % 2 if 5 <= i < 90 else 1 - i % 2) for i in range(100)]
    same = [dict(line) for line in base]
    folders = [
        str(save(tmp_path / name, lines))
        for name, lines in {"base": base, "better": better, "same": same}.items()
    ]
    output = tmp_path / "comparison.json"
    assert soundmind_evaluate.main(["compare", *folders, "--output", str(output)]) == 0
    assert "won" in capsys.readouterr().out
    first, second = json.loads(output.read_text())["comparisons"]
    assert (first["won"]["count"], first["lost"]["count"]) == (30, 5)
    assert first["bootstrap"]["value"] == pytest.approx(0.25)
    assert first["mcnemar"]["p_holm"] == pytest.approx(2 * first["mcnemar"]["p"])
    assert (second["won"]["count"], second["lost"]["count"], second["mcnemar"]["p"]) == (0, 0, 1)


def test_compare_pairs_the_rows_that_both_have(tmp_path: Path) -> None:
    save(tmp_path / "a", [saved_line(i, 1, 1) for i in range(10)])
    save(tmp_path / "b", [saved_line(i, 1, 0) for i in range(4, 12)])
    comparison = compare([tmp_path / "a", tmp_path / "b"])["comparisons"][0]
    assert (comparison["rows_shared"], comparison["rows_only_in_one"]) == (6, 6)
    assert comparison["baseline_accuracy"]["n"] == 6


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", [saved_line(i, 1, 1) for i in range(4)])
    part = save(tmp_path / "part", [saved_line(0, 1, 1)], data__rows=4)
    other = save(tmp_path / "other", [saved_line(i, 1, 1) for i in range(8, 12)])
    relabelled = save(tmp_path / "relabelled", [saved_line(i, 0, 1) for i in range(4)])
    for folders, message in (
        ([whole], "at least two"),
        ([whole, part], r"not finished \(1 of 4"),
        ([whole, other], "no row in common"),
        ([whole, relabelled], "different data"),
        ([whole, tmp_path / "nowhere"], "no config.yaml"),
    ):
        with pytest.raises(CompareError, match=message):
            compare(folders)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation__max_tokens": 16},
        {"generation__temperature": 1.3},
        {"data__digest": "2" * 16},
        {"data__mode": "text"},
        {"output_modality": "speech"},
    ],
)
def test_compare_refuses_other_settings_unless_asked_and_lists_them_first(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        str(save(tmp_path / "a", [saved_line(i, 1, 1) for i in range(4)])),
        str(save(tmp_path / "b", [saved_line(i, 1, 0) for i in range(4)], **changes)),
    ]
    key = next(iter(changes)).replace("__", ".")
    assert soundmind_evaluate.main(["compare", *folders]) == 2
    assert f"{key}: " in capsys.readouterr().err
    assert soundmind_evaluate.main(["compare", *folders, "--across-settings"]) == 0
    out = capsys.readouterr().out
    assert f"{key}: " in out and out.index(f"{key}: ") < out.index("McNemar")


def test_compare_takes_models_speeds_and_places_for_no_settings(tmp_path: Path) -> None:
    lines = [saved_line(i, 1, 1) for i in range(4)]
    save(tmp_path / "a", lines)
    others = {"model__digest": "9" * 16, "data__path": "b", "generation__batch_rows": 1}
    save(tmp_path / "b", lines, **others)
    assert compare([tmp_path / "a", tmp_path / "b"])["comparisons"][0]["settings_differ"] == []


def test_compare_refuses_one_id_in_two_rows(tmp_path: Path) -> None:
    lines = [saved_line(i, 1, 1) for i in range(4)]
    lines[3]["id"] = lines[0]["id"]
    save(tmp_path / "a", lines)
    save(tmp_path / "b", [saved_line(i, 1, 1) for i in range(4)])
    for folders in (("a", "b"), ("b", "a")):
        with pytest.raises(CompareError, match="0001 stands in two rows"):
            compare([tmp_path / name for name in folders])


# --- resuming -------------------------------------------------------------------------------------


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


# --- running out of memory ------------------------------------------------------------------------


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


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def omni(tmp_path: Path, random_stand_in: Path) -> Path:
    """A stand-in's folder that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(random_stand_in, folder)
    return folder


def drop_weights(folder: Path, *prefixes: str) -> None:
    """Rewrite the safetensors header without the tensors of some parts."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    kept = {name: entry for name, entry in header.items() if not name.startswith(prefixes)}
    text = json.dumps(kept).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_a_complete_folder_opens_for_text_and_speech(omni: Path) -> None:
    model = open_model(str(omni), speech=True)
    assert model.is_omni and model.stand_in == "stand-in with random weights"
    digest = model.digest
    weights = bytearray((omni / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (omni / "model.safetensors").write_bytes(weights)
    assert open_model(str(omni)).digest != digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", r"tokenizer\.json \(or vocab\.json"),
        ("*processor_config.json", "preprocessor_config"),
        ("model.safetensors", r"model\.safetensors \(or its index"),
        ("spk_dict.pt", "voices"),
        ("config.json", "no config.json"),
    ],
)
def test_missing_files_of_a_model_are_named(omni: Path, name: str, message: str) -> None:
    for path in omni.glob(name):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        open_model(str(omni), speech=True)


def test_a_missing_shard_is_named(omni: Path) -> None:
    (omni / "model.safetensors").unlink()
    table = {"thinker.a": "model-00001-of-00002.safetensors", "talker.b": "model-2.safetensors"}
    (omni / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors; model-2"):
        open_model(str(omni))


def test_a_cut_weight_file_is_told(omni: Path) -> None:
    data = (omni / "model.safetensors").read_bytes()
    (omni / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(ModelError, match="cut short"):
        open_model(str(omni))


def test_a_folder_without_talker_writes_but_does_not_speak(omni: Path) -> None:
    drop_weights(omni, "talker.", "token2wav.")
    assert open_model(str(omni)).is_omni
    with pytest.raises(ModelError, match=r"talker\.\*.*token2wav\.\*"):
        open_model(str(omni), speech=True)


def test_a_thinker_alone_is_explained_and_the_export_named(omni: Path) -> None:
    config = json.loads((omni / "config.json").read_text())
    (omni / "config.json").write_text(json.dumps(config["thinker_config"]))
    with pytest.raises(ModelError, match=r"thinker alone.*soundmind\.export"):
        open_model(str(omni))


def test_thinker_weights_under_a_complete_configuration_are_explained_too(omni: Path) -> None:
    drop_weights(omni, "thinker.", "talker.", "token2wav.")
    drop = {"audio_tower.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(drop).encode()
    (omni / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b" ")
    with pytest.raises(ModelError, match=r"soundmind\.export"):
        open_model(str(omni))


def test_a_training_checkpoint_is_explained(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    with pytest.raises(ModelError, match=r"training checkpoint.*soundmind\.export"):
        open_model(str(tmp_path))


def test_unknown_models_get_the_list_of_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no adapter for model type 'llama'") as error:
        open_model(str(tmp_path))
    assert all(adapter.name in str(error.value) for adapter in ADAPTERS.values())
    assert known_models() in str(error.value)


def test_no_model_and_no_hub_are_plain_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="no such folder, and not a Hub id"):
        open_model(str(tmp_path / "nowhere"))
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be reached.*hf download"):
        open_model("nobody-here/no-model-9f2")


def test_speech_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ModelError, match="Qwen2-Audio; use --output-modality text"):
        open_model(str(tmp_path), speech=True)


def test_placeholders_are_those_of_the_installed_vllm() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model_executor/models"
    files = {
        "qwen2_5_omni": "qwen2_5_omni_thinker",
        "qwen3_omni_moe": "qwen3_omni_moe_thinker",
        "gemma3n": "gemma3n_mm",
    }
    for key, adapter in ADAPTERS.items():
        source = (folder / f"{files.get(key, key)}.py").read_text()
        text = adapter.placeholder.replace("Audio 1: ", "").replace("\n", "")
        assert text in source or text.replace("1", "{i}") in source, key


def test_other_models_get_plain_strings_with_their_own_placeholder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    model = open_model(str(tmp_path))

    class Template:
        def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
            return json.dumps(messages)

    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are Qwen."}]},
        {
            "role": "user",
            "content": [{"type": "audio", "audio": "x.wav"}, {"type": "text", "text": "Think."}],
        },
    ]
    rendered = json.loads(render(model, Template(), messages))
    text = "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nThink."
    assert rendered == [{"role": "user", "content": text}]


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def parquet(make_github: Callable[..., Path]) -> Path:
    """Four prepared rows with clips, in audio mode."""
    root = make_github({"test": 4})
    command = [sys.executable, "-m", "soundmind.preprocess", "--mode", "audio", "--splits", "test"]
    subprocess.run(
        [*command, "--data-dir", str(root), "--output-dir", str(root / "parquet")],
        check=True,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
    )
    return root / "parquet/audio/test.parquet"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def test_examples_carry_what_preprocessing_measured(parquet: Path) -> None:
    examples = read_examples(parquet, limit=3)
    assert [example.index for example in examples] == [0, 1, 2]
    assert all(example.clip_file() and example.info["audio_tokens"] > 0 for example in examples)
    assert examples[0].question == ""  # heard, not read


def test_a_clip_that_has_gone_is_a_row_and_not_an_end(parquet: Path) -> None:
    clip = read_examples(parquet)[0].clip_file()
    assert clip is not None
    Path(clip).unlink()
    assert len(read_examples(parquet)) == 4


def test_a_folder_without_any_of_its_clips_is_refused(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Move the data folder.*--audio-root"):
        read_examples(parquet, root=str(tmp_path / "elsewhere"))


def test_other_files_and_layouts_are_refused(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found.*soundmind\.preprocess"):
        read_examples(tmp_path / "nowhere.parquet")
    text = tmp_path / "x.parquet"
    text.write_text("not Parquet at all")
    with pytest.raises(DataError, match="no Parquet file"):
        read_examples(text)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), other)
    with pytest.raises(DataError, match="no column data_source, reward_model"):
        read_examples(other)
    columns = {name: ["x"] for name in ("data_source", "prompt", "reward_model", "extra_info")}
    pq.write_table(pa.table({**columns, "audio": [{"path": "x"}]}), other)
    with pytest.raises(DataError, match="another layout"):
        read_examples(other)


def test_mixed_and_unknown_modes_are_refused(parquet: Path) -> None:
    rewrite(parquet, lambda row: row["extra_info"].update(mode="video"))
    with pytest.raises(DataError, match="mode 'video' is none of"):
        read_examples(parquet)
    rewrite(
        parquet,
        lambda row: row["extra_info"].update(mode="text" if row["extra_info"]["index"] else "dual"),
    )
    with pytest.raises(DataError, match="mixes the modes dual, text"):
        read_examples(parquet)


def test_other_verdicts_are_refused(parquet: Path) -> None:
    rewrite(parquet, lambda row: row["reward_model"].update(ground_truth="B"))
    with pytest.raises(DataError, match="ground truth 'B'"):
        read_examples(parquet)


# --- command line ---------------------------------------------------------------------------------


def test_bad_input_ends_with_status_2_and_one_line(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = soundmind_evaluate.main(["--model", str(tmp_path / "nowhere"), "--data", str(parquet)])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


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
