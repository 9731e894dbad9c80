"""Kept rows to Parquet, and the report beside it: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.data import statistics
from soundmind.data.columns import row_schema
from soundmind.data.job import REPORT_FORMAT, Job, ScannedSplit
from soundmind.data.scan import part_schema, read_part
from soundmind.data.sources import SourceError, SplitSource, find_split, read_lines
from soundmind.data.workers import rows_bar
from soundmind.system.files import file_sha256, flush_to_disk
from soundmind.task.schema import METADATA_KEY, SPLITS, Split

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_ROWS = 512
ROW_GROUP_BYTES = 16 << 20  # of embedded clips; one row group is read to get one clip out again


def write_parquet(scan: ScannedSplit, job: Job) -> Path:
    """Write the kept rows under a temporary name beside the final one; returns that name."""
    import pyarrow.parquet as pq

    split = scan.source.split
    temporary = job.folder / f".{split}.parquet.tmp"
    metadata = {
        "format": REPORT_FORMAT,
        "root": os.path.relpath(job.root, job.folder),
        "mode": job.options.mode,
        "task": job.options.task,
        "embedded": job.embed_audio,
        "tokenizer_sha256": job.options.tokenizer_sha256,
    }
    schema = row_schema().with_metadata(
        {METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()}
    )
    with (
        # no dictionaries: some readers of nested columns trip over them
        pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer,
        rows_bar(int(scan.keep.sum()), f"writing {split}") as bar,
    ):
        for group in _row_groups(scan, job.embed_audio):
            table = _with_audio(group, job) if job.embed_audio else group
            writer.write_table(
                table.select(row_schema().names).cast(schema), row_group_size=len(table)
            )
            bar.update(len(table))
    flush_to_disk(temporary)
    return temporary


def _row_groups(scan: ScannedSplit, by_bytes: bool) -> Iterator[pa.Table]:
    """Kept rows, `index` filled in, in tables of one row group each."""
    import pyarrow as pa

    pending: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in _kept_tables(scan):
        sizes = table["_clip_bytes"].to_pylist() if by_bytes else [0] * len(table)
        start = 0
        for position, size in enumerate(sizes):
            full = num_rows >= ROW_GROUP_ROWS or num_bytes + size > ROW_GROUP_BYTES
            if num_rows and full:
                pending.append(table.slice(start, position - start))
                yield pa.concat_tables(pending).combine_chunks()
                pending, start, num_rows, num_bytes = [], position, 0, 0
            num_rows += 1
            num_bytes += size
        pending.append(table.slice(start))
    if num_rows:
        yield pa.concat_tables(pending).combine_chunks()


def _kept_tables(scan: ScannedSplit) -> Iterator[pa.Table]:
    import pyarrow as pa

    offset = num_kept = 0
    for part in scan.parts:
        table, _ = read_part(part)
        keep = scan.keep[offset : offset + len(table)]
        offset += len(table)
        table = table.filter(pa.array(keep)).replace_schema_metadata(None)
        if not len(table):
            continue
        info = table["extra_info"].combine_chunks()
        columns = info.flatten()
        position = info.type.get_field_index("index")
        columns[position] = pa.array(range(num_kept, num_kept + len(table)), pa.int64())
        num_kept += len(table)
        info = pa.StructArray.from_arrays(columns, fields=list(info.type))
        place = part_schema().get_field_index("extra_info")
        yield table.set_column(place, "extra_info", info)


def _with_audio(table: pa.Table, job: Job) -> pa.Table:
    """Put the clips' own bytes into the audio column."""
    import pyarrow as pa

    paths = table["audio"].combine_chunks().field("path").to_pylist()
    clips = []
    for path, size in zip(paths, table["_clip_bytes"].to_pylist(), strict=True):
        clip = (job.root / path).read_bytes()
        if len(clip) != size:
            raise SourceError(f"{path} changed while it was read; run the same command again")
        clips.append(clip)
    fields = list(row_schema().field("audio").type)
    audio = pa.StructArray.from_arrays(
        [pa.array(clips, pa.binary()), pa.array(paths, pa.string())], fields=fields
    )
    return table.set_column(table.schema.get_field_index("audio"), "audio", audio)


def build_report(
    scanned: dict[Split, ScannedSplit],
    outputs: dict[Split, Path],
    job: Job,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """The report: no clock, no machine, so that equal inputs give an equal file."""
    import pyarrow as pa

    kept = {split: scan.rows.filter(pa.array(scan.keep)) for split, scan in scanned.items()}
    splits = carried_over(job, earlier)
    for split, scan in scanned.items():
        splits[split] = _report_split(scan, kept[split], outputs[split], job)
    return {
        "format": REPORT_FORMAT,
        "options": report_options(job),
        "tokenizer": (
            {"name": job.tokenizer, "sha256": job.options.tokenizer_sha256}
            if job.tokenizer
            else None
        ),
        "versions": versions_of_rows(),
        "splits": {split: splits[split] for split in SPLITS if split in splits},
        "overlap": {
            f"{first}, {second}": statistics.overlap(kept[first], kept[second])
            for first, second in combinations(scanned, 2)
        },
    }


def _report_split(scan: ScannedSplit, kept: pa.Table, output: Path, job: Job) -> dict[str, Any]:
    skipped = {fault.where for fault in scan.faults}
    missing = all(scan.rows["_answer_missing"].to_pylist())
    return {
        **statistics.describe_split(kept),
        "annotations": scan.num_lines,
        "skipped": {
            "rows": len(skipped),
            "faults": statistics.count_faults(scan.faults),
            "list": [asdict(fault) for fault in scan.faults],
        },
        "overlap_dropped": scan.overlap_dropped,
        "answer_recordings": (
            "not read" if not job.options.with_answers else "none" if missing else "all"
        ),
        "input": {
            "annotations": scan.source.name,
            "layout": scan.source.layout,
            "sha256": _annotations_sha256(scan.source),
            "question_bytes": sum(kept["_clip_bytes"].to_pylist()),
            "fingerprint": scan.fingerprint,  # of annotations, clip sizes and times, and options
        },
        "output": {
            "file": job.parquet(scan.source.split).name,
            "sha256": file_sha256(output),
            "bytes": output.stat().st_size,
        },
    }


def publish_rows(report: dict[str, Any], outputs: dict[Split, Path], job: Job) -> None:
    """Give everything its final name, the report last: it vouches for the others."""
    temporary = job.folder / ".report.json.tmp"
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    flush_to_disk(temporary)
    for split, output in outputs.items():
        os.replace(output, job.parquet(split))
    os.replace(temporary, job.folder / "report.json")


def carried_over(job: Job, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What an earlier run said of splits that this one leaves alone and that are still there."""
    known = (earlier or {}).get("splits", {})
    return {
        split: said
        for split, said in known.items()
        if split not in job.splits and is_intact(job, said)
    }


def is_intact(job: Job, known: dict[str, Any]) -> bool:
    path, output = job.folder / known["output"]["file"], known["output"]
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        return False
    return bool(file_sha256(path) == output["sha256"])


def report_options(job: Job) -> dict[str, Any]:
    compared = [split for split in SPLITS[1:] if job.drop_overlap and split not in job.splits]
    return {
        "mode": job.options.mode,
        "task": job.options.task,
        "data_root": os.path.relpath(job.root, job.folder),
        "on_error": job.on_error,
        "embed_audio": job.embed_audio,
        "drop_overlap": job.drop_overlap,
        "compared_only": {s: _annotations_sha256(find_split(job.root, s)) for s in compared},
        "questions_only": not job.options.with_answers and job.options.mode != "text",
    }


def versions_of_rows() -> dict[str, str]:
    packages = ("soundmind", "numpy", "pyarrow", "soundfile", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _annotations_sha256(source: SplitSource) -> str:
    if source.layout != "folders":
        return file_sha256(source.annotations)
    digest = hashlib.sha256()
    for line in read_lines(source):
        digest.update(line.data)
    return digest.hexdigest()
