"""An evaluation from options to a finished folder: settle, ask, grade, report."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from soundmind.evaluation import page, plots, tables
from soundmind.evaluation.examples import Example, read_examples
from soundmind.evaluation.grade import graded, prediction, summarise_answers
from soundmind.evaluation.identity import Options, describe_settings, settle
from soundmind.evaluation.models import Model, open_model
from soundmind.evaluation.store import (
    Store,
    StoreError,
    identity_changes,
    read_config,
    read_predictions,
    settings_fingerprint,
)
from soundmind.evaluation.text import TextEngine, TextSettings, prepare_process
from soundmind.system.files import REPOSITORY, write_json
from soundmind.system.machine import versions


class Backend(Protocol):
    """Asks a model about a batch of rows: lines of predictions, `samples` per row, in order."""

    def predict(
        self, batch: Sequence[Example], on_done: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """`on_done(rows)` is called as rows are answered."""


# --- one run --------------------------------------------------------------------------------------


def default_output_dir(config: dict[str, Any]) -> Path:
    """outputs/eval/<model>_<input>-to-<output>_<split>_<digest>: one folder per set of settings."""
    name = Path(config["model"]["given"].rstrip("/")).name or "model"
    data = config["data"]
    what = f"{data['mode']}-to-{config['output_modality']}_{data['split']}"
    return Path("outputs/eval") / f"{name}_{what}_{settings_fingerprint(config)[:8]}"


def evaluate(options: Options) -> Path:
    """Evaluate, grade and render; returns the output folder."""
    examples = read_examples(options.data, options.limit, options.audio_root)
    model = open_model(options.model, speech=options.output_modality == "speech")
    settings = settle(options)
    config = describe_settings(options, model, examples, settings)
    store = Store.open(options.output_dir or default_output_dir(config), config)
    print(f"{store.path}: {len(examples)} rows, {model.adapter.name} {model.given}", flush=True)
    if model.stand_in:
        print(f"practice output, no result: {model.stand_in}", flush=True)

    started = time.monotonic()
    done = predict_all(store, examples, model, settings, options)
    if done:
        require_unchanged(store, options, examples)
    record_versions(store, options, settings, done, time.monotonic() - started)
    failed = finish_evaluation(store.path)["failed_rows"]
    if failed["count"] == failed["n"]:
        raise StoreError(
            f"every row failed, the first with: {failed['rows'][0]['error']}. Mend that, then "
            f"evaluate into another --output-dir or remove {store.path}"
        )
    return store.path


def require_unchanged(store: Store, options: Options, examples: Sequence[Example]) -> None:
    """StoreError if model, rows or clips are others than when the evaluation began."""
    model = open_model(options.model, speech=options.output_modality == "speech")
    now = describe_settings(options, model, examples, settle(options))
    if changed := identity_changes(store.config, now):
        raise StoreError(
            f"{store.path}: what was evaluated changed while it ran ({changed}), so its answers mix "
            "two; remove the folder and run the same command again"
        )


def predict_all(
    store: Store,
    examples: Sequence[Example],
    model: Model,
    settings: TextSettings,
    options: Options,
) -> int:
    """Ask every row that has no prediction yet; returns how many rows that were."""
    if options.output_modality == "speech":
        return speak_all(store, examples, model, settings, options)
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
    """What answers in text."""
    prepare_process()
    return TextBackend(model, examples, settings, output)


def speak_all(
    store: Store,
    examples: Sequence[Example],
    model: Model,
    settings: TextSettings,
    options: Options,
) -> int:
    """The stages of a spoken evaluation; returns how many rows got their line."""
    prepare_process()  # before torch is imported
    from soundmind.evaluation.speech import SpokenEvaluation
    from soundmind.speech.talker import SpeechSettings

    def stage(name: str, total: int, kept: int) -> Bar:
        print(f"{name}: {kept} of {total} rows are there", flush=True)
        return Bar(total, kept)

    spoken = SpokenEvaluation(
        store,
        examples,
        model,
        settings,
        engine=options.speech_engine,
        recogniser=options.recogniser,
        voice=options.speaker,
        speech=SpeechSettings(
            temperature=options.talker_temperature, max_seconds=options.max_speech_seconds
        ),
        rows=options.speech_rows,
    )
    return spoken.run(stage)


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


def finish_evaluation(output: Path) -> dict[str, Any]:
    """Grade what is saved, write metrics.json, plots and report, print the table."""
    config = read_config(output)
    if config is None:
        raise StoreError(f"{output} holds no config.yaml; is it the folder of an evaluation?")
    absent = {"model", "data", "generation", "output_modality"} - config.keys()
    if absent:
        raise StoreError(
            f"{output}/config.yaml lacks {', '.join(sorted(absent))}; it was not written by this command"
        )
    predictions = read_predictions(output)
    if not predictions:
        raise StoreError(f"{output}/predictions.jsonl is empty; nothing to grade")
    try:
        for line in predictions:
            line |= graded(line)
        summary = summarise_answers(predictions, config, output)
    except KeyError as error:
        raise StoreError(
            f"{output}/predictions.jsonl or its config.yaml lacks {error}; it was not written by this "
            "command"
        ) from error
    write_json(output / "metrics.json", summary)
    plots.write_plots(output / "plots", predictions, summary)
    page.write_report(output, predictions, summary, config)
    tables.print_evaluation(summary, config, output)
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


class Bar(tqdm):
    """Progress with rows/s and time left; one line per batch where the output is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        self._terminal = sys.stdout.isatty()
        sink = sys.stdout if self._terminal else io.StringIO()
        super().__init__(total=total, initial=done, unit=" rows", file=sink, leave=False)

    def advance(self, rows: int) -> None:
        """`rows` more are answered, though not saved yet."""
        self.update(min(rows, self.total - self.n))

    def saved(self, count: int) -> None:
        """`count` rows are on disk."""
        self.update(count - self.n)
        speed = (self.n - self.initial) / max(self.format_dict["elapsed"], 1e-9)
        if not self._terminal:
            left = (self.total - count) / max(speed, 1e-9)
            print(f"{count}/{self.total} rows, {speed:.2f} rows/s, {left:.0f} s left", flush=True)
