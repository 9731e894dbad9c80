"""Evaluate a checkpoint on one prepared split, compare evaluations, grade saved answers again.

    python -m soundmind.evaluate --model checkpoints/ours --data data/alr/parquet/audio/test.parquet
    python -m soundmind.evaluate --model SoundMind-RL/SoundMindModel --data ... \\
        --output-modality speech --recogniser openai/whisper-large-v3
    python -m soundmind.evaluate compare outputs/eval/base outputs/eval/ours
    python -m soundmind.evaluate grade outputs/eval/ours          # no model, no GPU, seconds

Written answers come from vLLM (soundmind.eval_text), spoken ones from transformers' complete model
and are transcribed by Whisper (soundmind.eval_speech). Prompt, audio, placeholder rules, verdict
parser and reward components are those of training, imported. Greedy unless told otherwise.

Reads   a Parquet file of `soundmind.preprocess`, a model folder or Hub id
Writes  the output folder, described in soundmind.eval_store; definitions of every metric are in
        soundmind.metrics. Run again after an interruption, it continues and ends the same.

Exit status: 0 done (single failed rows are counted and listed), 2 bad input, no room, or no row
that could be asked.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from soundmind import eval_report
from soundmind.eval_compare import CompareError, compare
from soundmind.eval_data import DataError, Example, file_digest, read_examples
from soundmind.eval_grade import graded, prediction, summarise
from soundmind.eval_models import Model, ModelError, known_models, open_model
from soundmind.eval_store import Store, StoreError, fingerprint, read_config, read_predictions
from soundmind.eval_text import OutOfMemory, TextEngine, TextSettings, prepare_process
from soundmind.run_folder import gpu_names, versions, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_TOKENS = 4096  # [ours] 99 of 100 published reasonings are shorter; the released limit is 2048
CPU_BATCH, GPU_BATCH = 64, 256  # rows asked and saved together
CPU_SEQS, GPU_SEQS = 16, 128  # sequences generated at once
RECOGNISER = "openai/whisper-large-v3"


@dataclass(frozen=True)
class Options:
    """The command line of a run; None means "by the machine", see `settle`."""

    model: str
    data: Path
    output_modality: str = "text"
    output_dir: Path | None = None
    limit: int | None = None
    seed: int = 0
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int = MAX_TOKENS
    batch_rows: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    audio_root: str | None = None
    recogniser: str = RECOGNISER
    speaker: str = "Chelsie"
    max_speech_seconds: float = 600.0


class Backend(Protocol):
    """Asks a model about a batch of rows: lines of predictions, `samples` per row, in order."""

    def predict(
        self, batch: Sequence[Example], on_done: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """`on_done(rows)` is called as rows are answered."""


# --- one run --------------------------------------------------------------------------------------


def settle(options: Options) -> TextSettings:
    """Fill in what depends on the machine."""
    cpu = not gpu_names()
    speech = options.output_modality == "speech"
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.samples == 1 else 1.0  # [release] rollouts sample at 1.0
    if options.samples > 1 and temperature == 0:
        raise DataError("--samples above 1 with --temperature 0 would repeat one greedy answer")
    if options.samples > 1 and speech:
        raise DataError("--samples above 1 is for text output; spoken answers come one a row")
    return TextSettings(
        max_tokens=options.max_tokens,
        temperature=temperature,
        top_p=options.top_p,
        samples=options.samples,
        seed=options.seed,
        dtype=options.dtype or ("float32" if cpu else "bfloat16"),
        max_num_seqs=options.max_num_seqs or (CPU_SEQS if cpu else GPU_SEQS),
        batch_rows=1 if speech else options.batch_rows or (CPU_BATCH if cpu else GPU_BATCH),
        tensor_parallel=options.tensor_parallel,
        max_model_len=options.max_model_len,
        trust_remote_code=options.trust_remote_code,
    )


def describe(
    options: Options, model: Model, examples: Sequence[Example], settings: TextSettings
) -> dict[str, Any]:
    """The content of config.yaml: everything that defines the numbers, and nothing else.

    `max_num_seqs` is left to versions.json, since running out of memory may change it midway.
    """
    first = examples[0]
    speech = options.output_modality == "speech"
    generation = {
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "repetition_penalty": 1.0,
        "samples": settings.samples,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "batch_rows": settings.batch_rows,
        "engine": "transformers" if speech else "vllm",
        "max_model_len": settings.max_model_len,
    }
    config: dict[str, Any] = {
        "model": {
            "given": options.model,
            "type": model.model_type,
            "adapter": model.adapter.name,
            "digest": model.digest,
            "stand_in": model.stand_in,
        },
        "data": {
            "path": str(options.data),
            "digest": file_digest(options.data),
            "data_source": first.data_source,
            "split": first.info["split"],
            "mode": first.info["mode"],
            "rows": len(examples),
            "limit": options.limit,
        },
        "output_modality": options.output_modality,
        "generation": generation,
        "reward": {"preset": "paper", "length_unit": "tokens"},
    }
    if speech:
        config["speech"] = {
            "speaker": options.speaker,
            "max_speech_seconds": options.max_speech_seconds,
            "recogniser": options.recogniser,
        }
    return config


def default_output_dir(config: dict[str, Any]) -> Path:
    """outputs/eval/<model>_<input>-to-<output>_<split>_<digest>: one folder per set of settings."""
    name = Path(config["model"]["given"].rstrip("/")).name or "model"
    data = config["data"]
    what = f"{data['mode']}-to-{config['output_modality']}_{data['split']}"
    return Path("outputs/eval") / f"{name}_{what}_{fingerprint(config)[:8]}"


def run(options: Options) -> Path:
    """Evaluate, grade and render; returns the output folder."""
    examples = read_examples(options.data, options.limit, options.audio_root)
    model = open_model(options.model, speech=options.output_modality == "speech")
    settings = settle(options)
    config = describe(options, model, examples, settings)
    store = Store.open(options.output_dir or default_output_dir(config), config)
    print(f"{store.path}: {len(examples)} rows, {model.adapter.name} {model.given}", flush=True)
    if model.stand_in:
        print(f"practice output, no result: {model.stand_in}", flush=True)

    started = time.monotonic()
    done = predict_all(store, examples, model, settings, options)
    record_versions(store, options, settings, done, time.monotonic() - started)
    failed = finish(store.path)["failed_rows"]
    if failed["count"] == failed["n"]:
        raise StoreError(
            f"every row failed, the first with: {failed['rows'][0]['error']}. Mend that, then "
            f"evaluate into another --output-dir or remove {store.path}"
        )
    return store.path


def predict_all(
    store: Store,
    examples: Sequence[Example],
    model: Model,
    settings: TextSettings,
    options: Options,
) -> int:
    """Ask every row that has no prediction yet; returns how many rows that were."""
    rows, lines_per_row = store.config["generation"]["batch_rows"], settings.samples
    kept = store.resume(rows * lines_per_row, len(examples) * lines_per_row) // lines_per_row
    if kept == len(examples):
        return 0
    if kept:
        print(f"continuing: {kept} of {len(examples)} rows are there", flush=True)
    backend = make_backend(model, examples, settings, options, store.path)
    with Bar(len(examples), kept) as bar:
        for start in range(kept, len(examples), rows):
            store.append(backend.predict(examples[start : start + rows], bar.advance))
            bar.saved(min(start + rows, len(examples)))
    return len(examples) - kept


def make_backend(
    model: Model,
    examples: Sequence[Example],
    settings: TextSettings,
    options: Options,
    output: Path,
) -> Backend:
    """The backend of the output modality."""
    prepare_process()  # before soundmind.eval_speech imports torch
    if options.output_modality == "text":
        return TextBackend(model, examples, settings, output)
    from soundmind.eval_speech import SpeechBackend

    return SpeechBackend(
        model,
        settings,
        output,
        recogniser=options.recogniser,
        speaker=options.speaker,
        max_speech_seconds=options.max_speech_seconds,
    )


class TextBackend:
    """Written answers through vLLM."""

    def __init__(
        self, model: Model, examples: Sequence[Example], settings: TextSettings, output: Path
    ) -> None:
        self._output = output
        self._engine = TextEngine(model, examples, settings)

    def predict(
        self, batch: Sequence[Example], on_done: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        answers = self._engine.answer(batch, self._engine.prepare(batch), on_done)
        return [
            prediction(example, answer, sample, self._output)
            for example, samples in zip(batch, answers, strict=True)
            for sample, answer in enumerate(samples)
        ]


# --- after the predictions ------------------------------------------------------------------------


def finish(output: Path) -> dict[str, Any]:
    """Grade what is saved, write metrics.json, plots and report, print the table."""
    config = read_config(output)
    if config is None:
        raise StoreError(f"{output} holds no config.yaml; is it the folder of an evaluation?")
    predictions = read_predictions(output)
    if not predictions:
        raise StoreError(f"{output}/predictions.jsonl is empty; nothing to grade")
    try:
        for line in predictions:
            line |= graded(line)
        summary = summarise(predictions, config, output)
    except KeyError as error:
        raise StoreError(
            f"{output}/predictions.jsonl: a line lacks {error}; it was not written by this command"
        ) from error
    write_json(output / "metrics.json", summary)
    eval_report.write_plots(output / "plots", predictions, summary)
    eval_report.write_report(output, predictions, summary, config)
    eval_report.print_table(summary, config, output)
    return summary


def record_versions(
    store: Store, options: Options, settings: TextSettings, rows: int, seconds: float
) -> None:
    """versions.json, and in it how many rows this launch answered in how many seconds."""
    if rows == 0 and (store.path / "versions.json").is_file():
        return
    record = versions(options.seed, REPOSITORY)
    record["launch"] = {
        "rows": rows,
        "seconds": round(seconds, 1),
        "max_num_seqs": settings.max_num_seqs,
    }
    write_json(store.path / "versions.json", record)


# --- progress -------------------------------------------------------------------------------------


class Bar:
    """Progress with rows/s and time left; one line per batch where the output is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._total, self._first, self._started = total, done, time.monotonic()
        self._progress = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("rows", total=total, completed=done, speed="")
        self._count = done

    def __enter__(self) -> Bar:
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, rows: int) -> None:
        """`rows` more are answered, though not saved yet."""
        self._count = min(self._total, self._count + rows)
        self._progress.update(self._task, completed=self._count, speed=f"{self._speed:.2f} rows/s")

    def saved(self, count: int) -> None:
        """`count` rows are on disk."""
        self._count = count
        self.advance(0)
        if not self._progress.console.is_terminal:
            left = (self._total - count) / max(self._speed, 1e-9)
            print(
                f"{count}/{self._total} rows, {self._speed:.2f} rows/s, {left:.0f} s left",
                flush=True,
            )

    @property
    def _speed(self) -> float:
        return (self._count - self._first) / max(1e-9, time.monotonic() - self._started)


# --- commands -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module docstring."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    try:
        if arguments[:1] == ["compare"]:
            return compare_command(arguments[1:])
        if arguments[:1] == ["grade"]:
            return grade_command(arguments[1:])
        options = parse_options(arguments)
        try:
            run(options)
        except OutOfMemory as error:
            return start_over(arguments, error)
    except (DataError, ModelError, StoreError, CompareError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; what is saved stays, the same command continues from there",
            file=sys.stderr,
        )
        return 130
    return 0


def start_over(arguments: Sequence[str], error: OutOfMemory) -> int:
    """Run the command again in a fresh process with half the sequences; what is saved stays.

    A fresh process, because an engine that failed half-built keeps its memory.
    """
    smaller = error.max_num_seqs // 2
    if smaller < 1:
        print(
            f"error: {error}. One sequence at a time does not fit either: lower --max-tokens, or "
            "spread the model over more GPUs with --tensor-parallel",
            file=sys.stderr,
        )
        return 2
    print(f"{error}; starting over with --max-num-seqs {smaller}", file=sys.stderr, flush=True)
    again = [*arguments, "--max-num-seqs", str(smaller)]  # the last one given holds
    os.execv(sys.executable, [sys.executable, "-m", "soundmind.evaluate", *again])


def compare_command(arguments: Sequence[str]) -> int:
    """`compare A B [C ...]`."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.evaluate compare",
        description="Compare finished evaluations with the first one, on the rows they share.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, help="write the comparison as JSON here")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parsed = parser.parse_args(arguments)
    comparison = compare(parsed.folders, seed=parsed.seed)
    eval_report.print_comparison(comparison)
    if parsed.output:
        write_json(parsed.output, comparison)
    return 0


def grade_command(arguments: Sequence[str]) -> int:
    """`grade DIR ...`: metrics, plots and report again from saved predictions."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.evaluate grade",
        description="Grade saved predictions again: metrics.json, plots, report.html. No model.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    for folder in parser.parse_args(arguments).folders:
        finish(folder)
    return 0


def parse_options(arguments: Sequence[str]) -> Options:
    """Options of a run from its command line."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.evaluate",
        description=__doc__,
        epilog=f"known models (model_type of config.json):\n{known_models()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a complete model folder or a Hub id")
    parser.add_argument("--data", required=True, type=Path, help="Parquet of soundmind.preprocess")
    parser.add_argument("--output-modality", choices=("text", "speech"), default="text")
    parser.add_argument("--output-dir", type=Path, help="default: outputs/eval/<settings>")
    parser.add_argument("--limit", type=_positive, help="only the first N rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=_positive, default=1, help="answers per row")
    parser.add_argument("--temperature", type=float, help="default: 0, with --samples 1.0")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=_positive, default=MAX_TOKENS, help="per response")
    parser.add_argument(
        "--batch-rows",
        type=_positive,
        help="rows asked and saved together: what a kill can cost, and where the engine waits for "
        f"the longest answer; default {CPU_BATCH} on a CPU, {GPU_BATCH} on GPUs",
    )
    parser.add_argument("--max-num-seqs", type=_positive, help="sequences generated at once")
    parser.add_argument("--max-model-len", type=_positive, help="default: longest prompt + answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tensor-parallel", type=_positive, default=1, help="GPUs per model")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--audio-root", help="folder of the clips, instead of the recorded one")
    parser.add_argument("--recogniser", default=RECOGNISER, help="a Whisper folder or Hub id")
    parser.add_argument("--speaker", default="Chelsie", help="a voice of spk_dict.pt")
    parser.add_argument("--max-speech-seconds", type=float, default=600.0)
    return Options(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    status = main()
    # The compiler libraries that vLLM loads print a page of leak warnings while Python shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
