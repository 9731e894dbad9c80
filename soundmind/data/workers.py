"""Scanning annotations on several processes; results come in the order of the lines."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from soundmind.data import statistics
from soundmind.data.job import Job, ScannedSplit
from soundmind.data.scan import CHUNK_LINES, Chunk, RowOptions, ScannedChunk, read_part, scan_chunk
from soundmind.data.sources import Fault, SourceError, SplitSource, read_lines
from soundmind.data.token_count import TokenCounter
from soundmind.task.schema import Split

if TYPE_CHECKING:
    import pyarrow as pa


def scan_splits(
    job: Job, sources: Sequence[SplitSource], parts: Path | None
) -> dict[Split, ScannedSplit]:
    """Look at every line of every split. With `parts` None only fingerprints are made."""
    import pyarrow as pa

    scanned = {source.split: ScannedSplit(source) for source in sources}
    pieces: dict[Split, list[pa.Table]] = {source.split: [] for source in sources}
    total = sum(_num_lines(source) for source in sources)
    chunks = (chunk for source in sources for chunk in chunks_of(source))
    with rows_bar(total, "checking" if parts is None else "reading") as bar:
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
            bar.update(len(chunk.lines))
    for split, scan in scanned.items():
        if scan.num_lines == 0:
            raise SourceError(f"{scan.source.annotations}: no annotations in it")
        if parts is not None:
            scan.facts = pa.concat_tables(pieces[split])
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
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def die_with(parent: int) -> None:
    """End this worker when the process that started it was killed and cannot say so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: Chunk, options: RowOptions, parts: Path | None) -> ScannedChunk:
    return scan_chunk(chunk, options, parts, _worker_counter)


def _make_counter(options: RowOptions) -> TokenCounter | None:
    return TokenCounter(options.tokenizer_file) if options.tokenizer_file else None


def rows_bar(total: int, title: str) -> tqdm[Any]:
    """A progress bar on a terminal's error stream, nothing elsewhere."""
    return tqdm(total=total, desc=title, unit=" rows", leave=False, disable=None)


def _num_lines(source: SplitSource) -> int:
    if source.layout == "folders":
        return sum(1 for _ in source.annotations.glob("*/annotation.json"))
    with source.annotations.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
