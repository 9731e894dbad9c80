"""How fast the reward is, and that nothing breaks it.

    python benchmarks/reward.py                      # all four parts, about two minutes
    python benchmarks/reward.py --fuzz 10000         # fewer random inputs
    python benchmarks/reward.py --annotations DIR    # real response lengths from DIR/*.jsonl

    throughput   responses per second on one core, best of five passes. Responses have the length
                 of annotated reasoning: real ones if annotations are at hand (--annotations or
                 SOUNDMIND_ALR_DIR), else generated text of 200 to 3,000 words. Target 20,000/s
                 with the default preset and the token count given.
    worst case   slowest of the adversarial megabytes, CPU time, best of five. Target 50 ms.
    linearity    CPU time of each adversarial kind from 1 kB to 1 MB; the exponent is the slope of
                 log time over log size between 100 kB and 1 MB, 1.0 being linear.
    fuzz         random inputs through every preset; counts exceptions, values outside [0, 1],
                 scores off their weighted sum, and keys that changed. Target none in a million.

Prints the figures and exits with 1 if a target is missed. Reads annotations, writes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soundmind.task.labels import VERDICTS, answer_line
from soundmind.task.reward import compute_score
from soundmind.task.reward_settings import PRESETS

TARGET_THROUGHPUT = 20_000  # responses per second
TARGET_WORST = 0.050  # seconds of CPU time for a megabyte
TARGET_EXPONENT = 1.25  # room for timer noise above linear
ROW = {"reference_tokens": 1100, "reference_words": 700, "response_tokens": 1000}

ADVERSARIAL: dict[str, Callable[[int], str]] = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "words": lambda n: "ab " * (n // 3),
    "random words": lambda n: "".join(random.Random(0).choices("abcdefg ", k=n)),
    "open brackets": lambda n: "<" * n,
    "half tags": lambda n: "</think" * (n // 7),
    "opening tags": lambda n: "<think>" * (n // 7),
    "closing tags": lambda n: "</think>" * (n // 8),
    "answer": lambda n: "answer" * (n // 6),
    "answer and stars": lambda n: "answer*********" * (n // 15),
    "markers": lambda n: "Answer:" * (n // 7),
    "marker lines": lambda n: "Answer:\n" * (n // 8),
    "verdict lines": lambda n: "Answer: entailed\n" * (n // 17),
    "stars after a marker": lambda n: "Answer:" + "*" * n,
    "spaces in a verdict": lambda n: "<think>a</think>\nAnswer: not" + " " * n + "entailed",
    "spaces after a verdict": lambda n: "<think>a</think>\nAnswer: entailed" + " " * n,
    "a megabyte of thinking": lambda n: f"<think>{'so ' * (n // 3)}</think>\nAnswer: entailed",
    "thinking of dots": lambda n: f"<think>{'.' * n}</think>\nAnswer: entailed",
    "dotted capital i": lambda n: "\u0130" * n,
}  # fmt: skip

FRAGMENTS = (
    "<think>", "</think>", "<THINK>", "<think", "Answer:", "answer :", "**Answer:**", " entailed",
    " not entailed", " not-entailed", "not", "or", ".", "?", "!", "*", "_", "`", '"', "'", "\n",
    "\r\n", "\t", " ", "because the premises say so ", "\u200f", "\u202e", "\u0435ntailed",
    "\u0130", "\u00a0", "\ud800", "\x00", "\U0001f914", "Answer: entailed", "Answer: not-entailed",
)  # fmt: skip
QUANTITIES: tuple[Any, ...] = (
    None,
    0,
    1,
    7,
    700,
    -1,
    0.5,
    math.nan,
    math.inf,
    10**400,
    "12",
    "x",
    [],
    True,
)


def annotated_lengths(folder: Path | None) -> list[str]:
    """Well-formed responses of real length, from annotations if there are any."""
    paths = sorted(folder.glob("*.jsonl")) if folder and folder.is_dir() else []
    rows = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    texts = [row["answer"] for row in rows if "answer" in row]
    if not texts:
        rng = random.Random(0)
        words = ["premise", "the", "conclusion", "follows", "since", "every", "some", "and", "no"]
        texts = [" ".join(rng.choices(words, k=rng.randint(200, 1500))) for _ in range(600)]
    return [
        f"<think>{text}</think>\n{answer_line(VERDICTS[i % 2])}" for i, text in enumerate(texts)
    ]


def throughput(responses: list[str], **reward_kwargs: Any) -> float:
    """Responses per second of CPU time, best of five passes over the list."""
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        for response in responses:
            compute_score("soundmind/alr", response, VERDICTS[1], ROW, **reward_kwargs)
        best = min(best, time.process_time() - start)
    return len(responses) / best


def seconds(text: str, **reward_kwargs: Any) -> float:
    """CPU seconds to grade one text, best of five."""
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        compute_score("soundmind/alr", text, VERDICTS[1], ROW, **reward_kwargs)
        best = min(best, time.process_time() - start)
    return best


def exponent(small: float, large: float, factor: float = 10.0) -> float:
    """Slope of log time over log size; times below a tenth of a millisecond count as that."""
    floor = 1e-4
    return math.log(max(large, floor) / max(small, floor)) / math.log(factor)


def random_row(rng: random.Random) -> dict[str, Any]:
    keys = ("reference_tokens", "reference_words", "response_tokens", "speech_seconds",
            "reference_seconds", "speech_tokens", "reference_speech_tokens")  # fmt: skip
    row: dict[str, Any] = {key: rng.choice(QUANTITIES) for key in keys if rng.random() < 0.6}
    if rng.random() < 0.3:
        row["speech_transcript"] = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 6)))
    return row


def problems_of(result: dict[str, Any], preset: str) -> list[str]:
    """What is wrong with a result, by the reward's own contract."""
    weights = PRESETS[preset]
    keys = [
        "score",
        *weights,
        "acc",
        "pred",
        "parsed",
        "response_tokens",
        "reward_error",
        "reward_error_cause",
    ]
    found = [] if list(result) == keys else ["keys"]
    if not all(0.0 <= result[name] <= 1.0 for name in (*weights, "acc", "parsed", "reward_error")):
        found.append("range")
    total = sum(weight * result[name] for name, weight in weights.items())
    if not math.isclose(result["score"], total, abs_tol=1e-9):
        found.append("sum")
    if result["answer"] and not (result["text_format"] and result["acc"]):
        found.append("answer without format")
    return found


def fuzz(num_inputs: int, seed: int = 0) -> tuple[Counter[str], Counter[str]]:
    """(problems, what the inputs reached) over random responses, rows, truths and presets."""
    rng = random.Random(seed)
    problems: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    presets = list(PRESETS)
    for _ in range(num_inputs):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12)))
        if rng.random() < 0.3:
            text = f"<think>{text}</think>\n{answer_line(rng.choice(VERDICTS))}"
        elif rng.random() < 0.2:
            text += "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 8)))
        truth = rng.choice((*VERDICTS, *VERDICTS, "not entailed", "", "x"))
        preset = rng.choice(presets)
        try:
            result = compute_score("fuzz", text, truth, random_row(rng), preset=preset)
        except Exception as error:  # the figure this benchmark is for
            problems[f"{type(error).__name__}: {error}"] += 1
            continue
        problems.update(problems_of(result, preset))
        reached.update(k for k in ("text_format", "answer", "acc", "parsed") if result[k] == 1.0)
    return problems, reached


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and robustness of the reward.")
    default = os.environ.get("SOUNDMIND_ALR_DIR")
    parser.add_argument("--annotations", type=Path, default=Path(default) if default else None)
    parser.add_argument("--fuzz", type=int, default=1_000_000, help="number of random inputs")
    options = parser.parse_args()
    logging.getLogger("soundmind").setLevel(logging.CRITICAL)
    missed = []

    responses = annotated_lengths(options.annotations)
    words = sum(len(response.split()) for response in responses) / len(responses)
    print(f"throughput, {len(responses)} responses of {words:.0f} words on average, one core")
    for title, kwargs in {
        "paper, tokens given": {},
        "paper, words": {"length_unit": "words"},
        "guarded, tokens given": {"preset": "guarded"},
    }.items():
        rate = throughput(responses, **kwargs)
        print(f"  {title:<24}{rate:>10,.0f} responses/s")
        if not kwargs and rate < TARGET_THROUGHPUT:
            missed.append(f"throughput {rate:,.0f} < {TARGET_THROUGHPUT:,}")

    sizes = (1_000, 10_000, 100_000, 1_000_000)
    header = "".join(f"{size // 1000:>7} kB" for size in sizes)
    for preset in ("paper", "guarded"):
        print(f"adversarial input, preset {preset}, milliseconds{'exponent':>{len(header) + 1}}")
        print(f"  {'':<24}{header}")
        for kind, make in ADVERSARIAL.items():
            times = [seconds(make(size), preset=preset) for size in sizes]
            slope = exponent(times[-2], times[-1])
            print(f"  {kind:<24}{''.join(f'{t * 1e3:>10.2f}' for t in times)}{slope:>10.2f}")
            if times[-1] > TARGET_WORST:
                missed.append(f"{preset}, {kind}: {times[-1] * 1e3:.0f} ms for a megabyte")
            if slope > TARGET_EXPONENT:
                missed.append(f"{preset}, {kind}: time grows with exponent {slope:.2f}")

    start = time.perf_counter()
    problems, reached = fuzz(options.fuzz)
    print(f"fuzz, {options.fuzz:,} inputs in {time.perf_counter() - start:.0f} s")
    print(f"  {sum(problems.values())} problems {dict(problems) or ''}")
    print("  reached: " + ", ".join(f"{name} {count:,}" for name, count in reached.items()))
    if problems:
        missed.append(f"fuzz: {sum(problems.values())} problems")

    print("every target met" if not missed else "missed: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
