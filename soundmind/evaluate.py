"""Evaluate a checkpoint on one prepared split, compare evaluations, grade saved answers again.

    python -m soundmind.evaluate --model checkpoints/ours --data data/alr/parquet/audio/test.parquet
    python -m soundmind.evaluate --model SoundMind-RL/SoundMindModel --data ... \\
        --output-modality speech --recogniser openai/whisper-large-v3
    python -m soundmind.evaluate compare outputs/eval/base outputs/eval/ours
    python -m soundmind.evaluate grade outputs/eval/ours          # no model, no GPU, seconds

Written answers come from vLLM (soundmind.evaluation.text), spoken ones from transformers' complete model
and are transcribed by Whisper (soundmind.evaluation.speech). Prompt, audio, placeholder rules, verdict
parser and reward components are those of training, imported. Greedy unless told otherwise.

Reads   a Parquet file of `soundmind.preprocess`, a model folder or Hub id
Writes  the output folder, described in soundmind.evaluation.store; definitions of every metric are in
        soundmind.evaluation.metrics. Run again after an interruption, it continues and ends the same.

Exit status: 0 done (single failed rows are counted and listed), 2 bad input, no room, or no row
that could be asked.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from soundmind.evaluation import tables
from soundmind.evaluation.compare import compare
from soundmind.evaluation.evaluate import evaluate, finish_evaluation
from soundmind.evaluation.identity import (
    CPU_BATCH,
    DEFAULT_RECOGNISER,
    GPU_BATCH,
    MAX_TOKENS,
    Options,
)
from soundmind.evaluation.models import known_models
from soundmind.evaluation.text import OutOfMemory, TextDone
from soundmind.system.errors import command
from soundmind.system.files import write_json

# --- commands -------------------------------------------------------------------------------------


@command
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
            evaluate(options)
        except OutOfMemory as error:
            return start_over(arguments, error)
        except TextDone:
            in_a_fresh_process(arguments)
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
    asked = parse_options(arguments).asked_num_seqs or error.max_num_seqs
    again = [*arguments, "--asked-num-seqs", str(asked)]  # so that it stays the same evaluation
    again += ["--max-num-seqs", str(smaller)]  # the last one given holds
    in_a_fresh_process(again)


def in_a_fresh_process(arguments: Sequence[str]) -> NoReturn:
    """Run the command again with nothing of this process left; what is saved stays."""
    os.execv(sys.executable, [sys.executable, "-m", "soundmind.evaluate", *arguments])


def compare_command(arguments: Sequence[str]) -> int:
    """`compare A B [C ...]`."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.evaluate compare",
        description="Compare finished evaluations with the first one, on the rows they share.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, help="write the comparison as JSON here")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument(
        "--across-settings",
        action="store_true",
        help="also where input, data or generation settings differ; they are listed first",
    )
    parsed = parser.parse_args(arguments)
    comparison = compare(parsed.folders, seed=parsed.seed, across_settings=parsed.across_settings)
    tables.print_comparison(comparison)
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
        finish_evaluation(folder)
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
    parser.add_argument("--asked-num-seqs", type=_positive, help=argparse.SUPPRESS)
    parser.add_argument("--max-model-len", type=_positive, help="default: longest prompt + answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tensor-parallel", type=_positive, default=1, help="GPUs per model")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--audio-root", help="folder of the clips, instead of the recorded one")
    parser.add_argument(
        "--recogniser",
        default=DEFAULT_RECOGNISER,
        help="a Whisper folder or Hub id, or a folder with grammar.json for pocketsphinx",
    )
    parser.add_argument("--speaker", default="Chelsie", help="a voice of spk_dict.pt")
    parser.add_argument("--max-speech-seconds", type=_duration, default=600.0)
    parser.add_argument(
        "--speech-engine",
        choices=("batched", "reference"),
        default="batched",
        help="reference: transformers' own generate, one row at a time (61 h instead of 1)",
    )
    parser.add_argument("--speech-rows", type=_positive, help="answers spoken at once")
    parser.add_argument("--talker-temperature", type=float, default=0.9, help="0 is greedy")
    return Options(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 0.04 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} s is not a length of speech")
    return value


if __name__ == "__main__":
    status = main()
    # The compiler libraries that vLLM loads print a page of leak warnings while Python shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
