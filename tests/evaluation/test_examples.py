"""The rows an evaluation asks about, and files that are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import REPOSITORY, clean_environment

from soundmind import evaluate as soundmind_evaluate
from soundmind.evaluation.examples import DataError, read_examples


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


def test_bad_input_ends_with_status_2_and_one_line(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = soundmind_evaluate.main(["--model", str(tmp_path / "nowhere"), "--data", str(parquet)])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
