"""Measure the making of data: clips a second, the host work of asking, 500 rows from end to end.

    python benchmarks/making.py speech                # espeak-ng on the cores there are
    python benchmarks/making.py teacher               # 1,000 requests a minute, for a minute
    python benchmarks/making.py end                   # 500 rows: triples to Parquet
    python benchmarks/making.py end --train checkpoints/tiny   # and two training steps on them

The teacher is a script on this machine, in a process of its own: no model is measured. Triples are of
invented words. CPU seconds beside the wall time hardly change when the machine is busy with something
else; clips a second "by CPU" are what the cores would make if they had nothing else to do. Nothing is
asserted: read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests/support"))

from own_triples import own_triples, write_triples

from soundmind.making.engines import Espeak
from soundmind.making.sound import Utterance
from soundmind.making.speech import make_all
from soundmind.making.words import Wording
from soundmind.system.chat import Client, run_all
from soundmind.system.journal import Journal
from soundmind.system.machine import cores


def cpu_seconds() -> float:
    """Of this process and of those that ended under it."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


@contextlib.contextmanager
def scripted_teacher(folder: Path, seconds: float) -> Iterator[str]:
    """Address of a teacher that takes `seconds` for an answer."""
    place = folder / "address"
    script = REPOSITORY / "tests/support/scripted_server.py"
    process = subprocess.Popen([sys.executable, str(script), str(place), str(seconds)])
    try:
        while not place.exists():
            time.sleep(0.05)
        yield place.read_text()
    finally:
        process.kill()
        process.wait()


def measure_speech(count: int, workers: int) -> None:
    """Clips of a whole question, and of two sentences."""
    wording = Wording.load()
    triples = own_triples(count)
    questions = [
        wording.question((row["major"], row["minor"], row["conclusion"])) for row in triples
    ]
    sentences = [f"{row['major']}. {row['minor']}." for row in triples]
    print(f"{count} clips by espeak-ng, {workers} workers, start of the workers included")
    print("text            mean s   wall s   clips/s   CPU ms/clip   clips/s by CPU")
    for title, texts in (("question", questions), ("two sentences", sentences)):
        engine = Espeak(repeated=wording.repeated())
        utterances = [Utterance(wording.spoken(t), "en-us", engine.describe()) for t in texts]
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.monotonic(), cpu_seconds()
            with Journal(Path(folder, "clips.jsonl")) as journal:
                make_all(utterances, engine, Path(folder, "clips"), journal, workers)
                lengths = [entry["seconds"] for entry in journal.entries.values()]
            wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
        print(
            f"{title:<14} {sum(lengths) / count:7.1f} {wall:8.1f} {count / wall:9.1f} "
            f"{1000 * cpu / count:13.1f} {workers * count / cpu:16.1f}"
        )


def measure_teacher(per_minute: float, seconds: float) -> None:
    """Share of one core that asking takes, this process alone."""
    wording = Wording.load()
    questions = [
        wording.question((row["major"], row["minor"], row["conclusion"]))
        for row in own_triples(round(per_minute * seconds / 60))
    ]

    async def ask(client: Client) -> None:
        async def one(question: str) -> None:
            messages = [
                {"role": "system", "content": wording.teacher},
                {"role": "user", "content": question},
            ]
            answer = await client.chat(messages, max_tokens=8192)
            assert answer.error is None, answer.error

        async with client:
            await run_all(one, questions, client.concurrency)

    with (
        tempfile.TemporaryDirectory() as folder,
        scripted_teacher(Path(folder), 2.0) as url,
        Journal(Path(folder, "teacher.jsonl")) as journal,
    ):
        client = Client(url, "m", journal=journal, concurrency=64, per_minute=per_minute)
        wall, cpu = time.monotonic(), time.process_time()
        asyncio.run(ask(client))
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    rate = 60 * len(questions) / wall
    print(
        f"{len(questions)} requests in {wall:.1f} s ({rate:.0f} a minute, 2 s each, up to 64 at once): "
        f"{cpu:.2f} s of CPU, {100 * cpu / wall:.1f} % of one core"
    )


def measure_end(rows: int, workers: int, model: str | None) -> None:
    """The command on `rows` triples, as a process of its own; two training steps with a model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_triples(folder / "triples.jsonl", own_triples(rows))
        with scripted_teacher(folder, 0.5) as url:
            options = ["--source", str(source), "--output", str(folder / "set"), "--workers"]
            options += [str(workers), "--teacher-url", url, "--teacher-model", "scripted"]
            options += ["--split", "train=0.9", "dev=0.1", "--tokenizer", model or "none"]
            command = [sys.executable, "-m", "soundmind.make_data", *options]
            wall, cpu = time.monotonic(), cpu_seconds()
            subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
            wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
        print(f"{rows} rows, questions and answers spoken: {wall:.1f} s, {cpu:.1f} s of CPU")
        if model:
            train_two_steps(folder, model)


def train_two_steps(folder: Path, model: str) -> None:
    """Two GRPO steps of the stand-in on the rows that were made."""
    parquet = folder / "set/parquet/audio"
    command = [
        *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
        f"run.root='{folder / 'outputs'}'",
        f"data.train_files='{parquet / 'train.parquet'}'",
        f"data.val_files='{parquet / 'dev.parquet'}'",
        f"actor_rollout_ref.model.path='{model}'",
        *("data.max_prompt_length=2048", "actor_rollout_ref.rollout.max_model_len=2112"),
        *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
        *("actor_rollout_ref.rollout.n=2", "trainer.total_training_steps=2"),
        *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1"),
    ]
    started = time.monotonic()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    metrics = next((folder / "outputs").rglob("metrics.jsonl"))
    print(
        f"two training steps: {time.monotonic() - started:.1f} s in all; "
        f"{len(metrics.read_text().splitlines())} lines of metrics"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the making of data.")
    parser.add_argument("what", choices=("speech", "teacher", "end"))
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--per-minute", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument(
        "--train", metavar="MODEL", help="a stand-in's folder: two steps on the rows"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.what == "speech":
        measure_speech(arguments.clips, arguments.workers)
    elif arguments.what == "teacher":
        measure_teacher(arguments.per_minute, arguments.seconds)
    else:
        measure_end(arguments.rows, arguments.workers, arguments.train)


if __name__ == "__main__":
    main()
