"""Annotations and clips to Parquet: scan in parallel, judge every row, publish whole or not at all.

The work behind `python -m soundmind.preprocess`; its command line says what is read and written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soundmind.data import statistics
from soundmind.data.rows import row_schema
from soundmind.data.scan import (
    CHUNK_LINES,
    Chunk,
    RowOptions,
    ScannedChunk,
    part_schema,
    read_part,
    scan_chunk,
    text_digest,
)
from soundmind.data.sources import (
    Fault,
    SourceError,
    SplitSource,
    fetch_dataset,
    find_split,
    read_candidate,
    read_lines,
)
from soundmind.data.statistics import Facts
from soundmind.data.token_count import TokenCounter, find_tokenizer_file
from soundmind.system.hub import is_hub_id
from soundmind.task.schema import METADATA_KEY, SPLITS, Mode, Split, Task

if TYPE_CHECKING:
    import pyarrow as pa
from soundmind.system.files import file_sha256, flush_to_disk, locked

BASE_MODEL = "Qwen/Qwen2.5-Omni-7B"


ROW_GROUP_ROWS = 512


ROW_GROUP_BYTES = 16 << 20  # of embedded clips; one row group is read to get one clip out again


FAULTS_SHOWN = 50  # of each kind; --list-all shows the rest


REPORT_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One run of the command, its arguments resolved."""

    root: Path
    folder: Path  # <output-dir>/<mode>
    splits: tuple[Split, ...]
    options: RowOptions
    tokenizer: str | None
    on_error: str
    embed_audio: bool
    drop_overlap: str | None  # "question" or "premise": what is compared
    workers: int
    list_all: bool

    @property
    def work(self) -> Path:
        """Unfinished work, and a lock; gone when a run has ended by itself."""
        return self.folder / ".work"

    def parquet(self, split: str) -> Path:
        """Final name of a split's rows."""
        return self.folder / f"{split}.parquet"


@dataclass
class ScannedSplit:
    """A split after every line was looked at; `keep` says which of the fault-free rows stay."""

    source: SplitSource
    parts: list[Path] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    facts: Facts | None = None
    faults: list[Fault] = field(default_factory=list)
    faulty: list[tuple[int, str, str]] = field(default_factory=list)  # line, place, id
    keep: Any = None  # bool array over facts
    overlap_dropped: list[str] = field(default_factory=list)
    num_lines: int = 0

    @property
    def fingerprint(self) -> str:
        """Hash of everything that goes into the split's rows."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()


class BadInput(Exception):
    """Faults were found and the run was told to fail on them."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults

    def report(self, list_all: bool = False) -> str:
        """The table of faults and what to do about them."""
        table = statistics.fault_table(self.faults, None if list_all else FAULTS_SHOWN)
        return (
            f"{table}\n\n{len(self.faults)} faults "
            f"({counts_text(statistics.count_faults(self.faults))}); nothing written. "
            "Mend the data, or leave these rows out with --on-error skip"
        )


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
    sha256 = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() if tokenizer_file else None
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
        workers=workers or min(8, len(_usable_cores())),
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
    job.work.mkdir(parents=True, exist_ok=True)
    with locked(job.work / "lock"):
        return _run_locked(job)


def _run_locked(job: Job) -> int:
    sources = [find_split(job.root, split) for split in job.splits]
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
    _publish(report, outputs, job)
    _remove_work(job)
    print(statistics.report_tables(report))
    rows = sum(int(scan.keep.sum()) for scan in scanned.values())
    seconds = time.monotonic() - started
    print(f"\n{job.folder}: {rows} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)")
    if job.on_error == "skip" and faults:
        print(statistics.fault_table(faults, None if job.list_all else FAULTS_SHOWN))
    print(_last_line(report, job))
    return 0


# -- scanning -----------------------------------------------------------------------------------


def scan_splits(
    job: Job, sources: Sequence[SplitSource], parts: Path | None
) -> dict[Split, ScannedSplit]:
    """Look at every line of every split. With `parts` None only fingerprints are made."""
    scanned = {source.split: ScannedSplit(source) for source in sources}
    pieces: dict[Split, list[Facts]] = {source.split: [] for source in sources}
    total = sum(_num_lines(source) for source in sources)
    chunks = (chunk for source in sources for chunk in chunks_of(source))
    with _progress(total, "checking" if parts is None else "reading") as advance:
        for chunk, result in scan_in_order(chunks, job, parts, total):
            scan = scanned[chunk.source.split]
            scan.keys.append(result.key)
            scan.num_lines += len(chunk.lines)
            if result.part is not None:
                scan.parts.append(result.part)
                table, notes = read_part(result.part)
                pieces[chunk.source.split].append(statistics.facts_of_part(table))
                scan.faults += [Fault(*values) for values in notes["faults"]]
                scan.faulty += [(line, where, row_id) for line, where, row_id in notes["faulty"]]
            advance(len(chunk.lines))
    for split, scan in scanned.items():
        if scan.num_lines == 0:
            raise SourceError(f"{scan.source.annotations}: no annotations in it")
        if parts is not None:
            scan.facts = statistics.join_facts(pieces[split])
    return scanned


def chunks_of(source: SplitSource) -> Iterator[Chunk]:
    """The split in chunks of a fixed number of annotations."""
    lines = read_lines(source)
    for index in range(sys.maxsize):
        piece = list(islice(lines, CHUNK_LINES))
        if not piece:
            return
        yield Chunk(source, index, piece)


def scan_in_order(
    chunks: Iterable[Chunk], job: Job, parts: Path | None, num_lines: int
) -> Iterator[tuple[Chunk, ScannedChunk]]:
    """Scan chunks on `job.workers` processes; results come in order, few chunks are in flight."""
    if job.workers == 1 or num_lines <= 2 * CHUNK_LINES:  # starting processes would cost more
        counter = _make_counter(job.options)
        for chunk in chunks:
            yield chunk, scan_chunk(chunk, job.options, parts, counter)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(
        job.workers,
        mp_context=multiprocessing.get_context("spawn"),  # fork is unsafe beside Arrow's threads
        initializer=_start_worker,
        initargs=(job.options, os.getpid()),
    )
    with pool:
        waiting: deque[tuple[Chunk, Future[ScannedChunk]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_work, chunk, job.options, parts)))
                if len(waiting) > 3 * job.workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise SourceError(
                "a worker process was killed, probably for want of memory; the same command goes "
                "on where this one stopped, with --workers 1 on a small machine"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_counter: TokenCounter | None = None


def _start_worker(options: RowOptions, parent: int) -> None:
    global _worker_counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _worker_counter = _make_counter(options)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """End this worker when the process that started it was killed and cannot say so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: Chunk, options: RowOptions, parts: Path | None) -> ScannedChunk:
    return scan_chunk(chunk, options, parts, _worker_counter)


def _make_counter(options: RowOptions) -> TokenCounter | None:
    return TokenCounter(options.tokenizer_file) if options.tokenizer_file else None


# -- judging ------------------------------------------------------------------------------------


def judge(scanned: dict[Split, ScannedSplit], job: Job) -> list[Fault]:
    """Add the faults that only show over a whole split, set `keep`; all faults in file order."""
    every = []
    for split, scan in scanned.items():
        facts = scan.facts
        assert facts is not None, split
        scan.keep = np.ones(len(facts), dtype=bool)
        _judge_duplicates(scan, facts)
        _judge_missing_answers(scan, facts)
        place = {where: line for line, where, _ in scan.faulty}
        place.update(zip(facts.wheres, facts.line.tolist(), strict=True))
        scan.faults.sort(key=lambda fault: (place[fault.where], fault.kind, fault.detail))
        every += scan.faults
    return every


def _judge_duplicates(scan: ScannedSplit, facts: Facts) -> None:
    """The second and later lines with an id are faults, whatever else is wrong with either."""
    good = zip(facts.line.tolist(), facts.wheres, facts.ids, strict=True)
    entries = [(line, where, row_id, index) for index, (line, where, row_id) in enumerate(good)]
    entries += [(line, where, row_id, -1) for line, where, row_id in scan.faulty if row_id]
    first: dict[str, str] = {}
    for _, where, row_id, index in sorted(entries):
        if row_id not in first:
            first[row_id] = where
            continue
        row = f"{scan.source.split}/{row_id}"
        scan.faults.append(Fault("duplicate-id", where, row, f"id is taken by {first[row_id]}"))
        if index >= 0:
            scan.keep[index] = False


def _judge_missing_answers(scan: ScannedSplit, facts: Facts) -> None:
    """A split has recorded answers or has none; with some, every row without one is a fault."""
    missing = np.flatnonzero(facts.answer_missing)
    if len(missing) in (0, len(facts)):
        return
    for index in missing:
        row_id, label = facts.ids[index], facts.label[index]
        scan.keep[index] = False
        scan.faults.append(
            Fault(
                "missing-clip",
                facts.wheres[index],
                f"{scan.source.split}/{row_id}",
                f"{scan.source.split}/{row_id}/answer_{label}.wav not found, though other rows "
                "have theirs (--questions-only does without)",
            )
        )


def drop_overlap(scanned: dict[Split, ScannedSplit], job: Job) -> None:
    """Leave out of train what is in dev or test, then out of dev what is in test."""
    for position, split in enumerate(SPLITS[:-1]):
        if split not in scanned:
            continue
        scan, facts = scanned[split], scanned[split].facts
        assert facts is not None, split
        mine = facts.question if job.drop_overlap == "question" else facts.premise
        for later in SPLITS[position + 1 :]:
            shared = np.isin(mine, _digests(scanned, later, job)) & scan.keep
            if job.drop_overlap == "premise":
                shared &= facts.has_premise
            scan.keep &= ~shared
            scan.overlap_dropped += [facts.ids[i] for i in np.flatnonzero(shared)]


def _digests(scanned: dict[Split, ScannedSplit], split: Split, job: Job) -> Any:
    """Digests of a split's texts; of the annotation file where the split is not in this run."""
    if split in scanned:
        facts = scanned[split].facts
        assert facts is not None, split
        return (
            facts.question if job.drop_overlap == "question" else facts.premise[facts.has_premise]
        )
    from soundmind.data.scan import major_premise

    source = find_split(job.root, split)  # a comparison that cannot be made is an error
    found = []
    for line in read_lines(source):
        annotation = read_candidate(line, source, "text", with_answers=False).annotation
        if annotation is not None:
            text: str | None = annotation["user_content"]
            if job.drop_overlap == "premise":
                text = major_premise(annotation["user_content"])
            found += [text_digest(text)] if text is not None else []
    return np.array(found, dtype="S16")


# -- writing ------------------------------------------------------------------------------------


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
        _progress(int(scan.keep.sum()), f"writing {split}") as advance,
    ):
        for group in _row_groups(scan, job.embed_audio):
            table = _with_audio(group, job) if job.embed_audio else group
            writer.write_table(
                table.select(row_schema().names).cast(schema), row_group_size=len(table)
            )
            advance(len(table))
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
    kept = {}
    for split, scan in scanned.items():
        assert scan.facts is not None, split
        kept[split] = scan.facts.keep(scan.keep)
    splits = _carried_over(job, earlier)
    for split, scan in scanned.items():
        splits[split] = _report_split(scan, kept[split], outputs[split], job)
    return {
        "format": REPORT_FORMAT,
        "options": _report_options(job),
        "tokenizer": (
            {"name": job.tokenizer, "sha256": job.options.tokenizer_sha256}
            if job.tokenizer
            else None
        ),
        "versions": _versions(),
        "splits": {split: splits[split] for split in SPLITS if split in splits},
        "overlap": {
            f"{first}, {second}": statistics.overlap(kept[first], kept[second])
            for first, second in combinations(scanned, 2)
        },
    }


def _report_split(scan: ScannedSplit, kept: Facts, output: Path, job: Job) -> dict[str, Any]:
    facts = scan.facts
    assert facts is not None, scan.source.split
    skipped = {fault.where for fault in scan.faults}
    missing = bool(facts.answer_missing.all())
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
            "question_bytes": int(kept.clip_bytes.sum()),
            "fingerprint": scan.fingerprint,  # of annotations, clip sizes and times, and options
        },
        "output": {
            "file": job.parquet(scan.source.split).name,
            "sha256": file_sha256(output),
            "bytes": output.stat().st_size,
        },
    }


def _publish(report: dict[str, Any], outputs: dict[Split, Path], job: Job) -> None:
    """Give everything its final name, the report last: it vouches for the others."""
    temporary = job.folder / ".report.json.tmp"
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    flush_to_disk(temporary)
    for split, output in outputs.items():
        os.replace(output, job.parquet(split))
    os.replace(temporary, job.folder / "report.json")


# -- finished work --------------------------------------------------------------------------------


def _is_up_to_date(job: Job, sources: Sequence[SplitSource], report: dict[str, Any]) -> bool:
    """Whether the report describes exactly what this run would make, and the files are intact."""
    if report.get("options") != _report_options(job) or report.get("versions") != _versions():
        return False
    splits = report.get("splits", {})
    for source in sources:
        known = splits.get(source.split)
        if known is None or not _is_intact(job, known):
            return False
        if job.on_error == "fail" and known["skipped"]["rows"]:
            return False
    scanned = scan_splits(job, sources, None)
    return all(
        scan.fingerprint == splits[split]["input"]["fingerprint"] for split, scan in scanned.items()
    )


def _carried_over(job: Job, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What an earlier run said of splits that this one leaves alone and that are still there."""
    known = (earlier or {}).get("splits", {})
    return {
        split: said
        for split, said in known.items()
        if split not in job.splits and _is_intact(job, said)
    }


def _is_intact(job: Job, known: dict[str, Any]) -> bool:
    path, output = job.folder / known["output"]["file"], known["output"]
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        return False
    return bool(file_sha256(path) == output["sha256"])


def _report_options(job: Job) -> dict[str, Any]:
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


def _read_report(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("format") == REPORT_FORMAT else None


def _versions() -> dict[str, str]:
    packages = ("soundmind", "numpy", "pyarrow", "soundfile", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


# -- small things ---------------------------------------------------------------------------------


def _last_line(report: dict[str, Any], job: Job) -> str:
    splits = [report["splits"][split] for split in job.splits]
    skipped = sum(split["skipped"]["rows"] for split in splits)
    total = sum(split["annotations"] for split in splits)
    counts: dict[str, int] = {}
    for split in splits:
        for kind, count in split["skipped"]["faults"].items():
            counts[kind] = counts.get(kind, 0) + count
    return f"skipped {skipped} of {total} rows" + (f": {counts_text(counts)}" if counts else "")


def counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _num_lines(source: SplitSource) -> int:
    if source.layout == "folders":
        return sum(1 for _ in source.annotations.glob("*/annotation.json"))
    with source.annotations.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _annotations_sha256(source: SplitSource) -> str:
    if source.layout != "folders":
        return file_sha256(source.annotations)
    digest = hashlib.sha256()
    for line in read_lines(source):
        digest.update(line.data)
    return digest.hexdigest()


def _remove_work(job: Job) -> None:
    """Remove the work folder, and the output folders if nothing else is in them."""
    shutil.rmtree(job.work, ignore_errors=True)
    for folder in (job.folder, job.folder.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Any]:
    """A progress bar on a terminal's error stream, nothing elsewhere; yields advance(count)."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (title.ljust(14), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
