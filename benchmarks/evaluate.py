"""Measure evaluation: overhead over plain vLLM, grading, report, and five kills.

    python benchmarks/evaluate.py --model checkpoints/tiny --data data/practice/parquet/audio/test.parquet
    python benchmarks/evaluate.py ... --only overhead --rows 256

    overhead   rows/s of the command's own loop (decode, render, generate, grade, save) against one
               `LLM.generate` over all prompts, which are prepared outside its time. Same process,
               engine, prompts and feature extraction, in turns, caches emptied before each; medians
    grading    wall and processor seconds of `evaluate grade` on 656 answers of published length
    report     its size, and the time until a headless Chromium shows all rows
    resume     the command killed with SIGKILL at five random moments and run to its end, against an
               undisturbed run: every field but the seconds must be equal

Prints a table; `--json FILE` writes it too. Nothing is asserted: read the numbers.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.evaluation import evaluate
from soundmind.evaluation.examples import read_examples
from soundmind.evaluation.models import open_model
from soundmind.evaluation.store import Store, read_predictions
from soundmind.evaluation.text import Prompt
from soundmind.system.files import write_json
from soundmind.system.machine import hardware

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
from saved_evaluation import alr_test_lines, save

Figure = tuple[str, str, str]  # claim, measured, wanted
KILLS = 5


@dataclass(frozen=True)
class Speed:
    """Rows per second of the clock, and of this process's processor time.

    The second is what a machine that others use as well can still tell; on GPUs read the first.
    """

    wall: float
    cpu: float


class Stopwatch:
    """`with Stopwatch(rows) as watch: ...`, then `watch.speed`."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        self.speed = Speed(self._rows / wall, self._rows / cpu)


def measure_overhead(options: argparse.Namespace, scratch: Path) -> list[Figure]:
    """The command's loop against one call of vLLM, in turns on one engine."""
    run = evaluate.Options(
        model=options.model,
        data=options.data,
        limit=options.rows,
        max_tokens=options.max_tokens,
        batch_rows=options.batch_rows,
    )
    examples = read_examples(run.data, run.limit)
    model, settings = open_model(run.model), evaluate.settle(run)
    backend = evaluate.TextBackend(model, examples, settings, scratch)
    engine = backend._engine
    prompts = [prompt for prompt in engine.prepare(examples) if isinstance(prompt, Prompt)]
    parameters = [engine._sampling(example) for example in examples]

    def forget() -> None:
        engine._forget(0)
        engine.llm.reset_mm_cache()

    def direct() -> Speed:
        forget()
        with Stopwatch(len(examples)) as watch:
            engine.llm.generate([p.for_vllm() for p in prompts], parameters, use_tqdm=False)
        return watch.speed

    def ours(turn: int) -> Speed:
        forget()
        config = evaluate.describe_settings(run, model, examples, settings)
        store = Store.open(scratch / f"turn{turn}", config)
        backend._output = store.path
        evaluate.make_backend = lambda *_: backend  # type: ignore[assignment]
        with Stopwatch(len(examples)) as watch:
            evaluate.predict_all(store, examples, model, settings, run)
        return watch.speed

    direct()  # both sides find everything compiled and loaded
    pairs = [(direct(), ours(turn)) for turn in range(options.turns)]
    figures = [
        (f"vLLM directly, {len(examples)} rows at once", median_text(p[0] for p in pairs), ""),
        (f"the command, batches of {settings.batch_rows}", median_text(p[1] for p in pairs), ""),
    ]
    for name, unit in (("wall", "of the clock"), ("cpu", "of the processor")):
        ratios = sorted(getattr(ours, name) / getattr(plain, name) for plain, ours in pairs)
        middle = 100 * statistics.median(ratios)
        spread = f"{middle:.1f} % ({100 * ratios[0]:.0f} to {100 * ratios[-1]:.0f})"
        figures.append((f"share of vLLM's throughput, by time {unit}", spread, "at least 95 %"))
    return figures


def median_text(speeds: Iterable[Speed]) -> str:
    """Median rows a second by both clocks."""
    known = list(speeds)
    wall, cpu = (statistics.median(getattr(s, name) for s in known) for name in ("wall", "cpu"))
    return f"{wall:.2f} rows/s, {cpu:.2f} rows/CPU s"


def measure_grading(scratch: Path) -> list[Figure]:
    """`grade` on 656 saved answers in a process of its own, and the page it writes."""
    folder = save(scratch / "graded", alr_test_lines())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "soundmind.evaluate", "grade", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (folder / "report.html").stat().st_size
    figures = [
        ("656 answers graded, tabled, rendered", f"{wall:.1f} s (CPU {cpu:.1f} s)", "under 10 s"),
        ("report.html", f"{size / 1e6:.2f} MB", "under 3 MB"),
    ]
    return figures + measure_opening(folder / "report.html")


def measure_opening(page: Path) -> list[Figure]:
    """Seconds from navigation until every row is on the page; nothing without a browser."""
    try:
        from webdriver import browser
    except ImportError:
        return []
    import pytest

    try:
        with browser() as window:
            seconds = []
            for _ in range(3):
                started = time.monotonic()
                window.open(page)
                window.wait_for("return document.body.dataset.ready === 'yes'", True)
                seconds.append(time.monotonic() - started)
    except pytest.skip.Exception as error:
        return [("report.html opens", str(error), "under 2 s")]
    return [
        ("report.html opens, all rows shown", f"{statistics.median(seconds):.2f} s", "under 2 s")
    ]


def measure_resume(options: argparse.Namespace, scratch: Path) -> list[Figure]:
    """Five kills at random moments of the generation, then a run to the end."""
    generator = random.Random(options.seed)
    undisturbed, killed = scratch / "undisturbed", scratch / "killed"
    launch(options, undisturbed).wait()
    path, kept = killed / "predictions.jsonl", []

    def saved() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for kill in range(KILLS):
        target = int(options.rows * (kill + generator.random()) / (KILLS + 1))
        process = launch(options, killed)
        while process.poll() is None and saved() < target:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.1))  # anywhere within a batch or its saving
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(saved())
    launch(options, killed).wait()
    ours, theirs = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_predictions(folder)]
        for folder in (killed, undisturbed)
    )
    rows = len({line["index"] for line in ours})
    return [
        (f"rows saved after each of {KILLS} kills", ", ".join(map(str, kept)), ""),
        ("rows at the end, each once", f"{rows} of {len(theirs)} ({len(ours)} lines)", "all, once"),
        ("equal to the undisturbed run", "yes" if ours == theirs else "NO", "yes"),
    ]


def launch(options: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "soundmind.evaluate", "--model", options.model]
    where = ["--data", str(options.data), "--output-dir", str(output)]
    limits = ["--limit", str(options.rows), "--max-tokens", str(options.max_tokens)]
    return subprocess.Popen(
        [*command, *where, *limits, "--batch-rows", "8"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements asked for and print the table."""
    parser = argparse.ArgumentParser(description="Measure evaluation.")
    parser.add_argument("--model", default="checkpoints/tiny")
    parser.add_argument(
        "--data", type=Path, default=Path("data/practice/parquet/audio/test.parquet")
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, help="default: the command's own")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=("overhead", "grading", "resume"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    wanted = options.only or ("grading", "resume", "overhead")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "grading" in wanted:
            figures += measure_grading(scratch)
        if "resume" in wanted:
            figures += measure_resume(options, scratch)
        if "overhead" in wanted:  # last: the engine stays in this process
            figures += measure_overhead(options, scratch)
    for claim, measured, target in figures:
        print(f"{claim:<50}{measured:<36}{target}")
    machine: dict[str, Any] = hardware()
    print(f"{machine['cores']} cores, {machine['processor']}, GPUs: {machine['gpus'] or 'none'}")
    if options.json:
        write_json(options.json, {"figures": figures, "hardware": machine})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # past vLLM's leak warnings
