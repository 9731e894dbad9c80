"""Make audio logical reasoning data of one's own: triples, words, reasoning, speech, check, publish.

    python -m soundmind.make_data --source triples.jsonl --output data/own \\
        --teacher-url http://localhost:8000/v1 --teacher-model my-model

Reads   JSON lines of LogiQA 2.0 NLI, ConTRoL, FOLIO, plain triples or released rows
Writes  OUTPUT in both published layouts, report.json, README.md, dropped.jsonl and the Parquet;
        OUTPUT/work keeps what each stage made

Stopped at any moment, the same command goes on; nothing that was answered is asked again, over all
runs in the folder, and the budget holds over all of them. `--stages` runs some of them alone. What is
left out is counted and listed with its place. docs/making_data.md tells more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundmind import preprocess
from soundmind.making.check import Listener, ListeningCommand, ListeningModel
from soundmind.making.engines import Command, Engine, Espeak, Server
from soundmind.making.reasoning import Settings
from soundmind.making.stages import STAGE_NAMES, Making, opened, run_stage
from soundmind.making.words import RELEASED, Wording
from soundmind.system.chat import Budget, Client, Prices
from soundmind.system.errors import UserError, command
from soundmind.system.machine import cores
from soundmind.task.schema import MODES, SPLITS

DEFAULT_VOICES = [
    "en-us",
    "en-us+m3",
    "en-us+f2",
    "en-us+f4",
    "en-gb",
    "en-gb+m1",
    "en-gb+f3",
    "en-gb+m7",
]


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `python -m soundmind.make_data`."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.make_data",
        description="Make audio logical reasoning data of your own.",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the data folder to make or to go on with")
    add("--stages", nargs="+", choices=STAGE_NAMES, default=list(STAGE_NAMES), help="default: all")
    add(
        "--workers",
        type=int,
        default=cores(),
        help="clips made at once (default: one a core)",
    )
    add("--seed", type=int, default=0, help="of splits, voices, balance and the teacher's sampling")
    add(
        "--wording",
        type=Path,
        default=RELEASED,
        help=f"templates and spoken forms (default: {RELEASED.name})",
    )

    add = parser.add_argument_group("triples").add_argument
    add("--source", type=Path, nargs="+", default=[], help="JSON lines files with triples")
    add(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        help="files (dev, test) whose questions and premises stay out",
    )
    add(
        "--split",
        nargs="+",
        default=["train=1"],
        metavar="NAME=SHARE",
        help="e.g. train=0.8 dev=0.1 test=0.1",
    )
    add(
        "--balance",
        action="store_true",
        help="as many entailed as not-entailed rows in every split",
    )
    add("--limit", type=int, help="at most this many rows, drawn by seed")

    add = parser.add_argument_group("reasoning").add_argument
    add("--teacher-url", help="server of the OpenAI chat protocol, up to /v1")
    add("--teacher-model", help="the model's name there")
    add(
        "--teacher-key-env",
        default="OPENAI_API_KEY",
        help="variable that holds the key (default: OPENAI_API_KEY)",
    )
    add("--reported-model", help="how the server calls the model (default: as in its first answer)")
    add("--tries", type=int, default=3, help="of a row (default: 3)")
    add("--max-tokens", type=int, default=8192, help="of one answer (default: 8192)")
    add(
        "--teacher-body", default="{}", help='more of the request, e.g. {"reasoning_effort": "low"}'
    )
    add("--temperature", type=float, default=0.6)
    add("--answer-words", type=int, nargs=2, default=[50, 6000], metavar=("MIN", "MAX"))
    add("--concurrency", type=int, default=16, help="requests under way at once (default: 16)")
    add("--per-minute", type=float, help="requests a minute at most")
    add(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds for a request or a command (default: 600)",
    )
    add(
        "--price",
        type=float,
        nargs=2,
        default=[0.0, 0.0],
        metavar=("PROMPT", "COMPLETION"),
        help="of a million tokens",
    )
    add("--max-cost", type=float, help="stop before this is passed")
    add("--max-total-tokens", type=int, help="stop before this is passed")
    add(
        "--patience",
        type=int,
        default=50,
        help="stop after so many answers in a row that are not kept",
    )

    add = parser.add_argument_group("speech").add_argument
    add("--voices", nargs="+", help="names the engine knows (default: eight of espeak-ng's)")
    add("--separate-voices", action="store_true", help="no voice in train that is in dev or test")
    add("--questions-only", action="store_true", help="do not speak answers")
    add(
        "--speed",
        type=int,
        default=165,
        help="words a minute, of espeak-ng (default: 165, as published)",
    )
    add("--speech-url", help="server of the OpenAI speech protocol, up to /v1")
    add("--speech-model", default="tts", help="the model's name there")
    add("--speech-key-env", default="OPENAI_API_KEY", help="variable that holds its key")
    add(
        "--speech-command",
        help="a command of your own with {voice}, {output} and, if it likes, {text}",
    )

    add = parser.add_argument_group("check").add_argument
    add("--recogniser", help="Whisper folder or Hub id that hears every clip")
    add("--recogniser-command", help="a command that prints what is said in {audio}")
    add("--max-wer", type=float, default=0.2, help="word error rate of a clip (default: 0.2)")
    add(
        "--again",
        type=int,
        default=1,
        help="times a clip is said anew before it is dropped (default: 1)",
    )

    add = parser.add_argument_group("publish").add_argument
    add("--name", default=Making.name, help="title of the data card")
    add("--licence", default="", help="of the whole set, as the Hub knows it, e.g. cc-by-nc-sa-4.0")
    add(
        "--modes",
        nargs="*",
        choices=MODES,
        default=["audio"],
        help="Parquet to make (default: audio)",
    )
    add("--tokenizer", help="as in soundmind.preprocess")
    return parser.parse_args(argv)


def _resolve(arguments: argparse.Namespace) -> Making:
    """Turn arguments into a Making; UserError for what cannot work."""
    for name in ("workers", "tries", "concurrency", "max_tokens", "patience"):
        if getattr(arguments, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}"
            )
    for name in ("per_minute", "timeout", "max_cost", "max_total_tokens", "limit"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if min(arguments.price) < 0 or arguments.max_wer < 0 or arguments.again < 0:
        raise UserError("--price, --max-wer and --again cannot be negative")
    if arguments.max_cost is not None and max(arguments.price) == 0:
        raise UserError("--max-cost needs --price: without it everything costs nothing")
    if not 0 <= arguments.answer_words[0] <= arguments.answer_words[1]:
        raise UserError(f"--answer-words: {arguments.answer_words} is no range")
    if "triples" in arguments.stages and not arguments.source:
        raise UserError("the stage triples reads files: name them with --source")
    if "reasoning" in arguments.stages and not arguments.teacher_url:
        raise UserError("the stage reasoning asks a teacher: name its server with --teacher-url")
    if bool(arguments.teacher_url) != bool(arguments.teacher_model):
        raise UserError("--teacher-url and --teacher-model belong together")
    if arguments.speech_url and arguments.speech_command:
        raise UserError("--speech-url and --speech-command exclude each other")
    if arguments.recogniser and arguments.recogniser_command:
        raise UserError("--recogniser and --recogniser-command exclude each other")
    if not arguments.voices and (arguments.speech_url or arguments.speech_command):
        raise UserError("name the engine's voices with --voices")
    shares = dict(_share(text) for text in arguments.split)

    def client(url: str, model: str, key_env: str) -> Client:
        return Client(
            url,
            model,
            api_key=os.environ.get(key_env),
            concurrency=arguments.concurrency,
            per_minute=arguments.per_minute,
            timeout=arguments.timeout,
            budget=Budget(arguments.max_cost, arguments.max_total_tokens),
            prices=Prices(*arguments.price),
        )

    wording = Wording.load(arguments.wording)
    engine: Engine = Espeak(arguments.speed, wording.repeated())
    if arguments.speech_url:
        engine = Server(
            client(arguments.speech_url, arguments.speech_model, arguments.speech_key_env)
        )
    elif arguments.speech_command:
        engine = Command(arguments.speech_command, arguments.timeout)
    listener: Listener | None = None
    if arguments.recogniser_command:
        listener = ListeningCommand(
            arguments.recogniser_command, arguments.workers, arguments.timeout
        )
    elif arguments.recogniser and "check" in arguments.stages:
        listener = ListeningModel(arguments.recogniser)
    voices = list(dict.fromkeys(arguments.voices or DEFAULT_VOICES))
    teacher = None
    if arguments.teacher_url:
        teacher = client(arguments.teacher_url, arguments.teacher_model, arguments.teacher_key_env)
    return Making(
        output=arguments.output,
        sources=arguments.source,
        exclude=arguments.exclude,
        wording=wording,
        shares=shares,
        balanced=arguments.balance,
        limit=arguments.limit,
        seed=arguments.seed,
        teacher=teacher,
        asking=Settings(
            tries=arguments.tries,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            min_words=arguments.answer_words[0],
            max_words=arguments.answer_words[1],
            reported_model=arguments.reported_model,
            extra=_extra(arguments.teacher_body),
            patience=arguments.patience,
        ),
        engine=engine,
        voices=voices,
        separate_voices=arguments.separate_voices,
        speak_answers=not arguments.questions_only,
        listener=listener,
        max_error_rate=arguments.max_wer,
        again=arguments.again,
        name=arguments.name,
        licence=arguments.licence,
        workers=arguments.workers,
    )


def _extra(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or {"model", "messages"} & value.keys():
        raise UserError(f"--teacher-body {text!r}: write a JSON object, without model and messages")
    return value


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if name not in SPLITS or not 0 < value < float("inf"):
        raise UserError(
            f"--split {text!r}: write NAME=SHARE with {', '.join(SPLITS)} and a share above 0"
        )
    return name, value


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for what a person can mend."""
    arguments = _parse_arguments(argv)
    making = _resolve(arguments)
    if "speech" in arguments.stages:  # before anything is paid for
        making.check_voices()
    with opened(making):
        for stage in (stage for stage in STAGE_NAMES if stage in arguments.stages):
            record = run_stage(stage, making)
            dropped = ", ".join(f"{count} {why}" for why, count in record["dropped"].items())
            print(f"{stage}: {record['rows']} rows; dropped: {dropped or 'none'}", flush=True)
    if "publish" not in arguments.stages:
        return 0
    splits = [split for split in SPLITS if (making.output / f"{split}.jsonl").is_file()]
    for mode in arguments.modes:
        options = ["--mode", mode, "--data-dir", str(making.output), "--splits", *splits]
        options += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
        options += ["--questions-only"] if arguments.questions_only else []
        status = preprocess.main(options)
        if status != 0:
            return status
    print(f"{making.output}: done; report.json counts, README.md is the data card to complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
