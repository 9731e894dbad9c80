"""Stage 4: questions and answers as clips, several at once.

What was made is in a journal with its length, its faults too. The bytes do not depend on how many are
made at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy.typing as npt

from soundmind.data.workers import die_with
from soundmind.making.engines import Engine, Espeak, Server
from soundmind.making.near import words_of
from soundmind.making.sound import RATE, ClipFault, Utterance, even, save
from soundmind.system.chat import run_all
from soundmind.system.errors import UserError
from soundmind.system.journal import Journal


def finish(
    utterance: Utterance, folder: Path, sound: Callable[[], tuple[npt.NDArray[Any], int]]
) -> dict[str, Any]:
    """Make one clip; its line in the journal."""
    try:
        samples, rate = sound()
        wave = even(samples, rate, len(words_of(utterance.text)))
    except ClipFault as fault:
        return {"fault": fault.reason, "detail": str(fault)[:300], "seconds": 0.0, "bytes": 0}
    size = save(utterance.path(folder), wave)
    return {"fault": None, "detail": "", "seconds": round(wave.size / RATE, 3), "bytes": size}


def _make(engine: Engine, utterance: Utterance, folder: Path) -> dict[str, Any]:
    return finish(utterance, folder, lambda: engine.sound(utterance))


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def is_made(entry: dict[str, Any] | None, utterance: Utterance, folder: Path) -> bool:
    """Whether the journal's entry holds and the file is there, whole."""
    if entry is None or entry["fault"] in ("timeout", "no-speech"):
        return False  # trouble of a server or a command may have passed
    path = utterance.path(folder)
    return entry["fault"] is not None or (path.is_file() and path.stat().st_size == entry["bytes"])


def make_all(
    utterances: Sequence[Utterance],
    engine: Engine,
    folder: Path,
    journal: Journal,
    workers: int,
    on_done: Callable[[], object] = lambda: None,
    patience: int = 50,
) -> None:
    """Make what is not made yet; every clip is in `journal.entries` then. UserError, OSError.

    Gives up after `patience` faults in a row.
    """
    wanted = {u.key: u for u in utterances if not is_made(journal.entries.get(u.key), u, folder)}
    in_vain = 0

    def note(utterance: Utterance, entry: dict[str, Any]) -> None:
        nonlocal in_vain
        journal.append(utterance.key, flush=False, **entry)
        in_vain = in_vain + 1 if entry["fault"] else 0
        if in_vain >= patience:
            raise UserError(
                f"{in_vain} clips in a row cannot be used; the last, in voice {utterance.voice!r}: "
                f"{entry['fault']}, {entry['detail']}. Mend engine or voice; what was made is kept"
            )
        on_done()

    if isinstance(engine, Server):
        asyncio.run(_ask_all(engine, list(wanted.values()), folder, note))
    elif wanted:
        for utterance, entry in _spread(engine, list(wanted.values()), folder, workers):
            note(utterance, entry)


def _spread(
    engine: Engine, utterances: Sequence[Utterance], folder: Path, workers: int
) -> Iterator[tuple[Utterance, dict[str, Any]]]:
    pool: Executor
    if isinstance(engine, Espeak):
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
        )
    else:
        pool = ThreadPoolExecutor(workers)
    with pool:
        left = {
            pool.submit(_make, engine, utterance, folder): utterance for utterance in utterances
        }
        try:
            for future in as_completed(list(left)):
                yield left.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably for want of memory; the same command goes on "
                "where this one stopped, with --workers 1 on a small machine"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


async def _ask_all(
    engine: Server,
    utterances: Sequence[Utterance],
    folder: Path,
    note: Callable[[Utterance, dict[str, Any]], None],
) -> None:
    async def ask(utterance: Utterance) -> None:
        try:
            samples, rate = await engine.request(utterance, folder)
        except ClipFault as fault:
            failed = fault

            def sound() -> tuple[npt.NDArray[Any], int]:
                raise failed
        else:

            def sound() -> tuple[npt.NDArray[Any], int]:
                return samples, rate

        note(utterance, await asyncio.to_thread(finish, utterance, folder, sound))

    async with engine.client:
        await run_all(ask, utterances, engine.client.concurrency)
