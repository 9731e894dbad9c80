"""What a step costs: seconds, their parts and memory over clip length, n, new tokens and ranks.

    python benchmarks/step.py                                   # all 24 corners, about 85 minutes
    python benchmarks/step.py --corners 60/8/64 5/2/16/2        # seconds/n/tokens, or .../ranks

Each corner is a training of its own, by `python -m soundmind.train` as any other, of the random
stand-in (no warm-up): 4 prompts a step, one clip of white noise each, n responses of exactly so
many tokens (the end token does not end them), KL to a reference, one update. Medians over the steps
after the first two. `rest` is what verl's parts leave of the step: reward, advantages, polling.

features  seconds from a clip's file to its stored features, summed over the prompts of a step, and
          their bytes; most of it overlaps with the first responses, so it lies within `generate`

memory    highest sum of proportional set sizes (shared pages counted once) over the processes of
          the run, Ray's included, read every half second

Writes outputs/benchmarks/step.json and step.png (--output). Nothing is asserted: read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training import REPOSITORY, run, train

from soundmind.data.statistics import text_table
from soundmind.system.files import write_json
from soundmind.system.machine import hardware

PROMPTS = 4  # a step
WARM_UP = 2  # steps left out of the medians
RATE = 16_000
INSTRUCTION_TOKENS = 128  # more than the written part of a prompt has
PARTS = {
    "generate": "gen",
    "old log-prob": "old_log_prob",
    "ref": "ref",
    "update": "update_actor",
    "weights": "update_weights",
}


@dataclass(frozen=True)
class Corner:
    """One cell of the table: clip seconds, rollouts a prompt, new tokens, FSDP ranks."""

    seconds: int
    n: int
    tokens: int
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.seconds} s / {self.n} / {self.tokens} / {self.ranks}"


ALL = [Corner(s, n, t, r) for r in (1, 2) for s in (5, 60, 120) for n in (2, 8) for t in (16, 64)]


def parse_corner(text: str) -> Corner:
    """`60/8/64` or `60/8/64/2`."""
    if not re.fullmatch(r"\d+/\d+/\d+(/\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write seconds/n/tokens or seconds/n/tokens/ranks"
        )
    return Corner(*map(int, text.split("/")))


def prepare(scratch: Path, seconds: int, steps: int) -> Path:
    """Noise clips of that length as a Parquet set; the folder of its splits."""
    import soundfile

    data, folder = scratch / f"data{seconds}", scratch / f"parquet{seconds}"
    if folder.exists():
        return folder / "audio"
    generator = np.random.default_rng(seconds)
    for split, count in (("train", PROMPTS * steps), ("dev", 1), ("test", PROMPTS)):
        lines = []
        for number in range(1, count + 1):
            clip_folder = data / split / f"{number:04d}"
            clip_folder.mkdir(parents=True)
            noise = (0.1 * generator.standard_normal(seconds * RATE)).astype(np.float32)
            soundfile.write(clip_folder / "question.wav", noise, RATE, subtype="PCM_16")
            row = {"id": f"{number:04d}", "user_content": f"clip {number}", "label": 1}
            lines.append(json.dumps({**row, "answer": "Answer: entailed"}) + "\n")
        (data / f"{split}.jsonl").write_text("".join(lines))
    run(
        *("soundmind.preprocess", "--mode", "audio", "--task", "practice"),
        *("--data-dir", str(data), "--output-dir", str(folder)),
        *("--tokenizer", str(scratch / "tiny"), "--questions-only"),
    )
    return folder / "audio"


class MemorySampler:
    """`with MemorySampler() as sampler: ...`, then `sampler.peak_bytes` of this process's children."""

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self.peak_bytes = 0
        self.peak_by_process: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            sizes: dict[str, int] = {}
            for child in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(child.cmdline()[:1])[:40] or child.name()
                    sizes[f"{title} {child.pid}"] = proportional_set_size(child.pid)
                except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                    continue  # it ended between listing and reading
            total = sum(sizes.values())
            if total > self.peak_bytes:
                self.peak_bytes = total
                largest = sorted(sizes.items(), key=lambda item: -item[1])
                self.peak_by_process = dict(largest[:8])


def proportional_set_size(pid: int) -> int:
    """Bytes of a process's memory, pages that several share divided among them."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measure(corner: Corner, scratch: Path, steps: int, extra: Sequence[str]) -> dict[str, Any]:
    """One training; medians of its steps and the peak of its memory."""
    data = prepare(scratch, corner.seconds, steps)
    prompt_tokens = 25 * corner.seconds + INSTRUCTION_TOKENS
    with MemorySampler() as sampler:
        folder, _, seconds = train(
            f"run.root={scratch}/outputs",
            "run.resume=new",
            "run.export=false",
            f"actor_rollout_ref.model.path={scratch}/tiny",
            f"data.train_files={data}/train.parquet",
            f"data.val_files={data}/test.parquet",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_prompt_length={prompt_tokens}",
            f"data.max_response_length={corner.tokens}",
            f"actor_rollout_ref.rollout.max_model_len={prompt_tokens + corner.tokens}",
            f"actor_rollout_ref.rollout.n={corner.n}",
            "actor_rollout_ref.rollout.ignore_eos=true",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
            "actor_rollout_ref.actor.use_kl_loss=true",
            f"trainer.n_gpus_per_node={corner.ranks}",
            f"trainer.total_training_steps={steps}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.save_freq=-1",
            *extra,
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    measured = [line for line in lines if line["step"] > WARM_UP]
    step = [line["timing_s/step"] for line in measured]
    parts = {
        name: statistics.median(line.get(f"timing_s/{key}", 0.0) for line in measured)
        for name, key in PARTS.items()
    }
    return {
        **asdict(corner),
        "step": statistics.median(step),
        "fastest": min(step),
        "slowest": max(step),
        **parts,
        "rest": statistics.median(step) - sum(parts.values()),
        "features": statistics.median(line["features/seconds"] for line in measured),
        "feature_bytes": statistics.median(line["features/bytes"] for line in measured),
        "peak_gb": sampler.peak_bytes / 1e9,
        "largest_gb": {name: size / 1e9 for name, size in sampler.peak_by_process.items()},
        "response_tokens": measured[-1]["response_length/mean"],
        "prompt_tokens": measured[-1]["prompt_length/mean"],
        "whole_run": seconds,
        "load": os.getloadavg()[0],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a corner."""
    rows = [
        [
            str(Corner(r["seconds"], r["n"], r["tokens"], r["ranks"])),
            f"{r['step']:.2f} ({r['fastest']:.2f} to {r['slowest']:.2f})",
            *(f"{r[name]:.2f}" for name in (*PARTS, "rest")),
            f"{r['features']:.2f}",
            f"{r['feature_bytes'] / 1e6:.1f}",
            f"{r['peak_gb']:.1f}",
        ]
        for r in results
    ]
    head = ["clip / n / tokens / ranks", "step, s", *PARTS, "rest"]
    head += ["features, s", "features, MB", "memory, GB"]
    return text_table(head, rows)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Stacked parts of the step and the memory, a bar a corner."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [str(Corner(r["seconds"], r["n"], r["tokens"], r["ranks"])) for r in results]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 1.5 + 0.35 * len(names)), sharey=True, width_ratios=(3, 1)
    )
    start = np.zeros(len(names))
    for part in (*PARTS, "rest"):
        width = np.array([max(0.0, r[part]) for r in results])
        left.barh(names, width, left=start, label=part)
        start += width
    left.set_xlabel("seconds a step")
    left.legend(frameon=False)
    right.barh(names, [r["peak_gb"] for r in results], color="0.6")
    right.set_xlabel("peak memory, GB")
    left.invert_yaxis()
    left.set_ylabel("clip / n / new tokens / ranks")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the corners asked for; print the table as it grows and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corners", type=parse_corner, nargs="+", default=ALL)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "outputs/benchmarks")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides of the configuration")
    options = parser.parse_args(argv)
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that warm up")
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        run("soundmind.tiny", "--no-warmup", "--output", str(scratch / "tiny"))
        for corner in options.corners:
            results.append(measure(corner, scratch, options.steps, options.set))
            print(table(results[-1:]), flush=True)
            report = {"corners": results, "overrides": options.set, "hardware": hardware()}
            write_json(options.output / "step.json", report)
    print(table(results))
    plot(results, options.output / "step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
