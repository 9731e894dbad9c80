"""The figures of the practice run: does it learn, does it hear. What a step costs: step.py.

    python benchmarks/training.py learn --seeds 0 1 2     # about 10 minutes a seed on two quiet cores
    python benchmarks/training.py swapped outputs/grpo_tiny_cpu/<timestamp>

`learn` trains the stand-in from its own warm-up for every seed (another seed, another model, data order
and rollouts), through `soundmind.prepare` and `soundmind.train` as main_grpo.sh does, and prints accuracy
on the 800 held-out clips before and after, with exact McNemar tests. `swapped` plays the same held-out
rows with each other's clips to the exported policy: whoever follows the sound is right in half of them.
Machines are noisy: medians are printed, with the load at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "grpo_tiny_cpu"


def run(*arguments: str) -> tuple[str, float]:
    """Run one of our commands; its output and wall-clock seconds."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = list(process.stdout)
    if process.wait():
        sys.exit("".join(lines[-40:]))
    return "".join(lines), time.monotonic() - started


def train(*overrides: str) -> tuple[Path, dict[str, Any], float]:
    """One run; its folder, summary and seconds."""
    output, seconds = run("soundmind.train", "--config-name", CONFIG, *overrides)
    folder = REPOSITORY / output.strip().splitlines()[-1].removeprefix("run: ")
    return folder, json.loads((folder / "summary.json").read_text()), seconds


def learn(seeds: Sequence[int], extra: Sequence[str]) -> None:
    """Prepare and train every seed; one line of figures each."""
    print(f"load {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores")
    for seed in seeds:
        overrides = [
            f"run.seed={seed}",
            f"run.stand_in_seed={seed}",
            f"actor_rollout_ref.model.path=checkpoints/tiny-{seed}",
            "run.resume=new",
            *extra,
        ]
        _, prepared = run("soundmind.prepare", "--config-name", CONFIG, *overrides)
        folder, summary, seconds = train(*overrides)
        first, last = summary["components_first"], summary["components_last"]
        test = summary["val_mcnemar"]
        print(
            f"seed {seed}: greedy {summary['val_acc_first']:.2%} -> {summary['val_acc_last']:.2%} of "
            f"{summary['val_n']}; won {test['won']}, lost {test['lost']}, p {test['p']:.1e}; sampled "
            f"format {first['text_format']:.3f} -> {last['text_format']:.3f}, accuracy "
            f"{first['accuracy']:.3f} -> {last['accuracy']:.3f}; correlation at least "
            f"{summary['rollout_actor_corr_min']:.7f}; {summary['seconds_per_step_median']} s a step; "
            f"prepare {prepared:.0f} s, train {seconds:.0f} s; {folder}",
            flush=True,
        )


def swapped(folder: Path) -> None:
    """Greedy accuracy of a run's export when held-out rows get each other's clips."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from soundmind.standin.controls import swapped_partners

    source = REPOSITORY / "data/practice/parquet/audio/test.parquet"
    table = parquet.read_table(source)
    rows = table.to_pylist()
    labels = [row["extra_info"]["label"] for row in rows]
    partners = swapped_partners(labels)
    for row, partner in zip(rows, partners, strict=True):
        row["clip"] = rows[partner]["audio"]
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        path = Path(scratch).parent / "test-swapped.parquet"
        try:
            clips = [row["clip"] for row in rows]
            column = pa.array(clips, type=table.schema.field("audio").type)
            index = table.schema.get_field_index("audio")
            swapped_table = table.set_column(index, table.schema.field("audio"), column)
            parquet.write_table(swapped_table, path)
            for name, file in (("own clips", source), ("swapped clips", path)):
                output = Path(scratch) / name.replace(" ", "-")
                run(
                    *("soundmind.evaluate", "--model", str(folder / "export")),
                    *("--data", str(file), "--output-dir", str(output)),
                )
                metrics = json.loads((output / "metrics.json").read_text())
                accuracy = metrics["accuracy"]
                print(f"{name}: {json.dumps(accuracy)}")
        finally:
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    learning = commands.add_parser("learn")
    learning.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    learning.add_argument("overrides", nargs="*")
    commands.add_parser("swapped").add_argument("run", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "learn":
        learn(arguments.seeds, arguments.overrides)
    else:
        swapped(arguments.run)


if __name__ == "__main__":
    main()
