"""Prepared rows are read whoever wrote the file last, wherever it is reached from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from soundmind import preprocess
from soundmind.data.clips import load_clip
from soundmind.data.columns import row_schema
from soundmind.data.reread import RowsError
from soundmind.data.rows import read_row, read_rows

MakeData = Callable[..., Path]
Writer = Callable[[Path, Path], None]


def prepare(root: Path, *arguments: str, mode: str = "audio") -> Path:
    """Rows of split test; the Parquet file's name."""
    command = ["--mode", mode, "--data-dir", str(root), "--tokenizer", "none", "--workers", "1"]
    assert preprocess.main([*command, "--splits", "test", *arguments]) == 0
    output = root / "parquet"
    if "--output-dir" in arguments:
        output = Path(arguments[arguments.index("--output-dir") + 1])
    return output / mode / "test.parquet"


def seconds(path: Path, **keys: Any) -> list[float]:
    """Length of every clip that the rows refer to."""
    return [
        len(load_clip(clip)) / 16_000 for clip in read_rows(str(path), **keys)["_clip"].to_pylist()
    ]


def by_pandas(source: Path, target: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(source)
    table["mine"] = [f"note {i}" for i in range(len(table))]
    table[table["mine"] != "note 1"].to_parquet(target)  # keeps an index column


def by_datasets(source: Path, target: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(source), cache_dir=str(target.parent / "cache"))
    kept = rows.filter(lambda row: row["extra_info"]["id"] != "0001")
    kept.map(lambda row: {"mine": row["extra_info"]["id"]}).to_parquet(str(target))


def by_polars(source: Path, target: Path) -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(source).with_row_index("mine")
    table.filter(polars.col("mine") != 1).write_parquet(target)


def by_duckdb(source: Path, target: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"select *, 1 as mine from '{source}' where extra_info.id != '0001'"
    duckdb.sql(f"copy ({query}) to '{target}'")


def by_plain_values(source: Path, target: Path) -> None:
    """As a program writes that keeps no schema: every type is guessed, nulls have none."""
    rows = [{**row, "mine": 1} for row in pq.read_table(source).to_pylist()]
    pq.write_table(
        pa.Table.from_pylist([row for row in rows if row["extra_info"]["id"] != "0001"]), target
    )


WRITERS = [by_pandas, by_datasets, by_polars, by_duckdb, by_plain_values]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("embed", [False, True], ids=["linked", "embedded"])
def test_rows_saved_by_another_program_are_read(
    make_github: MakeData, write: Writer, embed: bool, tmp_path: Path
) -> None:
    root = make_github({"test": 4})
    source = prepare(root, *(["--embed-audio"] if embed else []))
    target = source.with_name("kept.parquet")
    write(source, target)
    if embed:
        shutil.rmtree(root / "test")
        target = target.rename(tmp_path / "elsewhere.parquet")
    before, after = read_rows(str(source)), read_rows(str(target))
    for name in row_schema().names:
        if name != "audio":
            assert after[name].type == before[name].type, name
    assert [info["id"] for info in after["extra_info"].to_pylist()] == ["0000", "0002", "0003"]
    assert seconds(target) == [seconds(source)[i] for i in (0, 2, 3)]
    assert "mine" in after.column_names and "__index_level_0__" not in after.column_names
    both = pa.concat_tables([before, after], promote_options="permissive")  # as training joins them
    assert len(both) == 7 and both["prompt"].to_pylist()[4] == before["prompt"].to_pylist()[0]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_text_rows_saved_by_another_program_are_read(make_github: MakeData, write: Writer) -> None:
    source = prepare(make_github({"test": 4}), mode="text")
    target = source.with_name("kept.parquet")
    write(source, target)
    table = read_rows(str(target))
    assert table["_clip"].to_pylist() == [None] * 3
    assert table["prompt"].type == row_schema().field("prompt").type


def test_a_data_root_is_found_by_the_report_where_the_output_lies_apart(
    make_github: MakeData, tmp_path: Path
) -> None:
    source = prepare(make_github({"test": 3}), "--output-dir", str(tmp_path / "apart"))
    by_plain_values(source, source.with_name("kept.parquet"))
    assert len(seconds(source.with_name("kept.parquet"))) == 2
    lost = source.with_name("kept.parquet").rename(tmp_path / "lost.parquet")
    with pytest.raises(RowsError, match=r"does not say where its clips are.*audio-root"):
        read_rows(str(lost))
    assert len(seconds(lost, root=str(tmp_path / "data"))) == 2


def test_embedded_sound_is_used_whatever_root_is_named(
    make_github: MakeData, tmp_path: Path
) -> None:
    source = prepare(make_github({"test": 2}), "--embed-audio")
    assert all(
        clip.startswith("parquet://")
        for clip in read_rows(str(source), root=str(tmp_path))["_clip"].to_pylist()
    )


def test_some_rows_may_carry_their_sound_and_others_not(make_github: MakeData) -> None:
    root = make_github({"test": 4})
    linked = pq.read_table(prepare(root)).to_pylist()
    embedded = pq.read_table(prepare(root, "--embed-audio")).to_pylist()
    mixed = root / "parquet/audio/mixed.parquet"
    pq.write_table(
        pa.Table.from_pylist([linked[0], embedded[1], linked[2], embedded[3]], row_schema()), mixed
    )
    kinds = [clip.startswith("parquet://") for clip in read_rows(str(mixed))["_clip"].to_pylist()]
    assert kinds == [False, True, False, True] and len(seconds(mixed)) == 4


def test_a_file_is_read_through_links_and_by_its_own_path(
    make_github: MakeData, tmp_path: Path
) -> None:
    root = make_github({"test": 2})
    disk = tmp_path / "disk/deep/parquet"
    disk.mkdir(parents=True)
    (root / "parquet").symlink_to(disk)  # the outputs lie on another disk
    through = prepare(root)
    assert seconds(through) == seconds(disk / "audio/test.parquet")
    alone = tmp_path / "test.parquet"
    alone.symlink_to(through)
    assert seconds(alone) == seconds(through)
    snapshot, blob = tmp_path / "hub/snapshots/1", tmp_path / "hub/blobs/0"
    shutil.copytree(root / "test", snapshot / "data/test")
    (snapshot / "data/parquet/audio").mkdir(parents=True)
    blob.parent.mkdir()
    shutil.copy(prepare(make_github({"test": 2}, name="other")), blob)
    (snapshot / "data/parquet/audio/test.parquet").symlink_to(blob)
    assert len(seconds(snapshot / "data/parquet/audio/test.parquet")) == 2


@pytest.mark.parametrize("saved_again", [False, True])
def test_clips_of_another_set_under_the_same_names_are_refused(
    make_github: MakeData, saved_again: bool
) -> None:
    root, other = make_github({"test": 3}), make_github({"test": 3}, seconds=2.0, name="other")
    source = prepare(root)
    if saved_again:
        target = other / "parquet/audio/kept.parquet"
        target.parent.mkdir(parents=True)
        by_plain_values(source, target)
        source = target
    with pytest.raises(RowsError, match=r"lasts 2\.0.* s and its row says 1\.0"):
        read_rows(str(source), root=None if saved_again else str(other))
    soundfile.write(root / "test/0002/question.wav", [0.1, -0.1] * 999, 24_000)
    with pytest.raises(RowsError, match="0002"):
        read_rows(str(root / "parquet/audio/test.parquet"))


def test_one_row_is_read_as_all_are(make_github: MakeData) -> None:
    source = prepare(make_github({"test": 3}))
    assert [read_row(str(source), i) for i in range(3)] == read_rows(str(source)).to_pylist()
    with pytest.raises(IndexError, match="rows 0 to 2, asked for 3"):
        read_row(str(source), 3)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<html><body>404</body></html>", "web page"),
        (b"", "empty"),
        (None, "cut short"),
    ],
)
def test_what_is_no_parquet_file_says_what_it_is(
    make_github: MakeData, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "x.parquet"
    if content is None:
        whole = prepare(make_github({"test": 2})).read_bytes()
        content = whole[: len(whole) * 6 // 10]
    path.write_bytes(content)
    with pytest.raises(RowsError, match=words):
        read_rows(str(path))


def test_sound_in_one_huge_group_is_refused_with_the_way_out(
    make_github: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepare(make_github({"test": 3}), "--embed-audio")
    monkeypatch.setattr("soundmind.data.reread.LARGEST_GROUP", os.path.getsize(source) // 2)
    with pytest.raises(RowsError, match="row_group_size"):
        read_rows(str(source))


@pytest.mark.parametrize("audio", ["dropped", "plain path", "nulls"])
def test_a_heard_question_without_its_clip_is_refused(make_github: MakeData, audio: str) -> None:
    source = prepare(make_github({"test": 3}))
    rows = pq.read_table(source).to_pylist()
    for row in rows:
        row["audio"] = {
            "dropped": None,
            "plain path": row["audio"]["path"],
            "nulls": {"path": None, "bytes": None},
        }[audio]
    pq.write_table(pa.Table.from_pylist(rows), source)
    for need in (True, False):
        with pytest.raises(RowsError, match="neither a path nor bytes"):
            read_rows(str(source), need_clips=need)


def test_rows_without_durations_are_read(make_github: MakeData) -> None:
    source = prepare(make_github({"test": 2}))
    rows = pq.read_table(source).to_pylist()
    for row in rows:
        del row["extra_info"]["question_seconds"]
    pq.write_table(pa.Table.from_pylist(rows), source.with_name("other.parquet"))
    assert len(seconds(source.with_name("other.parquet"))) == 2
