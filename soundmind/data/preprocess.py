"""Annotations and clips to Parquet: scan in parallel, judge every row, publish whole or not at all.

The work behind `python -m soundmind.preprocess`; its command line says what is read and written.
In the order of a run: `sources` (lines, fields, clips), `scan` on `workers`, `judge`, `write`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundmind.data import statistics
from soundmind.data.fetch import fetch_dataset
from soundmind.data.job import FAULTS_SHOWN, REPORT_FORMAT, BadInput, Job, counts_text
from soundmind.data.judge import drop_overlap, judge
from soundmind.data.scan import RowOptions
from soundmind.data.sources import SourceError, SplitSource, find_split
from soundmind.data.token_count import find_tokenizer_file
from soundmind.data.workers import scan_splits
from soundmind.data.write import (
    build_report,
    is_intact,
    publish_rows,
    report_options,
    versions_of_rows,
    write_parquet,
)
from soundmind.system.files import file_sha256, locked
from soundmind.system.hub import is_hub_id
from soundmind.system.machine import cores
from soundmind.task.schema import SPLITS, Mode, Split, Task

BASE_MODEL = "Qwen/Qwen2.5-Omni-7B"


def make_job(
    *,
    mode: Mode,
    task: Task = "alr",
    data_dir: str | None = None,
    output_dir: Path | None = None,
    splits: Sequence[Split] = SPLITS,
    on_error: str = "fail",
    embed_audio: bool = False,
    workers: int | None = None,
    drop_overlap: str | None = None,
    tokenizer: str | None = None,
    questions_only: bool = False,
    list_all: bool = False,
) -> Job:
    """Turn the command's options into a Job; fetches from the Hub where a data set id was given."""
    splits = tuple(split for split in SPLITS if split in splits)
    with_answers = mode != "text" and not questions_only
    name = data_dir or f"data/{task}"
    if data_dir and is_hub_id(name):
        target = Path("data") / name.rpartition("/")[2]
        root = fetch_dataset(name, target, list(splits), mode, with_answers)
    else:
        root = Path(name)
    if not root.is_dir():
        fetch = (
            "Fetch it with: bash scripts/download_data.sh, or name a Hub data set id"
            if task == "alr"
            else "Make it with: python -m soundmind.practice"
        )
        raise SourceError(f"data folder {root} not found. {fetch}")
    root = root.resolve()
    tokenizer, tokenizer_file = choose_tokenizer(tokenizer, task)
    sha256 = file_sha256(tokenizer_file) if tokenizer_file else None
    output = (output_dir or root / "parquet").resolve()
    return Job(
        root=root,
        folder=output / mode,
        splits=splits,
        options=RowOptions(mode, task, with_answers, tokenizer_file, sha256),
        tokenizer=tokenizer,
        on_error=on_error,
        embed_audio=embed_audio,
        drop_overlap=drop_overlap,
        workers=workers or min(8, cores()),
        list_all=list_all,
    )


def choose_tokenizer(name: str | None, task: str) -> tuple[str | None, Path | None]:
    """Name and tokenizer.json of the tokenizer to count with; without a name, what is at hand.

    A named tokenizer that cannot be had is an error. The default one is not: counts are then left
    empty, and the report says so.
    """
    if name is not None:
        return (None, None) if name == "none" else (name, find_tokenizer_file(name))
    local = "checkpoints/tiny" if task == "practice" else "checkpoints/Qwen2.5-Omni-7B"
    for candidate in (local,) if task == "practice" else (local, BASE_MODEL):
        with contextlib.suppress(FileNotFoundError):
            return candidate, find_tokenizer_file(candidate)
    print(
        f"note: no tokenizer at hand ({local}, {BASE_MODEL}); words are counted, tokens are not. "
        "Name one with --tokenizer DIR_OR_HUB_ID",
        file=sys.stderr,
    )
    return None, None


def make_parquet(job: Job) -> int:
    """Scan, judge, write. Returns the exit status; raises BadInput, SourceError, OSError."""
    sources = [find_split(job.root, split) for split in job.splits]
    job.work.mkdir(parents=True, exist_ok=True)
    with locked(job.work / "lock", job.folder):
        return _run_locked(job, sources)


def _run_locked(job: Job, sources: Sequence[SplitSource]) -> int:
    for name in (*(f"{split}.parquet" for split in SPLITS), "report.json"):
        (job.folder / f".{name}.tmp").unlink(missing_ok=True)  # of a run that was killed
    earlier = _read_report(job.folder / "report.json")
    if earlier is not None and _is_up_to_date(job, sources, earlier):
        _remove_work(job)
        print(statistics.report_tables(earlier))
        print(f"\n{job.folder}: up to date, nothing to do")
        print(_last_line(earlier, job))
        return 0
    started = time.monotonic()
    scanned = scan_splits(job, sources, job.work)
    faults = judge(scanned, job)
    if faults and job.on_error == "fail":
        _remove_work(job)
        raise BadInput(faults)
    if job.drop_overlap:
        drop_overlap(scanned, job)
    for split, scan in scanned.items():
        if not scan.keep.any():
            _remove_work(job)
            raise SourceError(
                f"no row of split {split} is left ({scan.num_lines} annotations, "
                f"{counts_text(statistics.count_faults(scan.faults)) or 'no faults'}, "
                f"{len(scan.overlap_dropped)} dropped as overlap); nothing written"
            )
    outputs = {split: write_parquet(scan, job) for split, scan in scanned.items()}
    report = build_report(scanned, outputs, job, earlier)
    publish_rows(report, outputs, job)
    _remove_work(job)
    print(statistics.report_tables(report))
    rows = sum(int(scan.keep.sum()) for scan in scanned.values())
    seconds = time.monotonic() - started
    print(f"\n{job.folder}: {rows} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)")
    if job.on_error == "skip" and faults:
        print(statistics.fault_table(faults, None if job.list_all else FAULTS_SHOWN))
    print(_last_line(report, job))
    return 0


def _is_up_to_date(job: Job, sources: Sequence[SplitSource], report: dict[str, Any]) -> bool:
    """Whether the report describes exactly what this run would make, and the files are intact."""
    if report.get("options") != report_options(job) or report.get("versions") != versions_of_rows():
        return False
    splits = report.get("splits", {})
    for source in sources:
        known = splits.get(source.split)
        if known is None or not is_intact(job, known):
            return False
        if job.on_error == "fail" and known["skipped"]["rows"]:
            return False
    scanned = scan_splits(job, sources, None)
    return all(
        scan.fingerprint == splits[split]["input"]["fingerprint"] for split, scan in scanned.items()
    )


def _read_report(path: Path) -> dict[str, Any] | None:
    """The report of an earlier run; None where there is none, or one that says other things."""
    try:
        report = json.loads(path.read_text("utf-8"))
        statistics.report_tables(report)  # reads nearly all of it
        for said in report["splits"].values():
            said["output"]["file"], said["output"]["bytes"], said["output"]["sha256"]
            said["input"]["fingerprint"], said["annotations"], said["skipped"]["faults"].items()
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if report.get("format") == REPORT_FORMAT else None


def _last_line(report: dict[str, Any], job: Job) -> str:
    splits = [report["splits"][split] for split in job.splits]
    skipped = sum(split["skipped"]["rows"] for split in splits)
    total = sum(split["annotations"] for split in splits)
    counts: dict[str, int] = {}
    for split in splits:
        for kind, count in split["skipped"]["faults"].items():
            counts[kind] = counts.get(kind, 0) + count
    return f"skipped {skipped} of {total} rows" + (f": {counts_text(counts)}" if counts else "")


def _remove_work(job: Job) -> None:
    """Remove the work folder, and the output folders if nothing else is in them."""
    shutil.rmtree(job.work, ignore_errors=True)
    for folder in (job.folder, job.folder.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()
