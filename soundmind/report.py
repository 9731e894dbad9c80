"""What a run came to: export, curves, `summary.json` and the table at its end.

    python -m soundmind.report outputs/grpo_tiny_cpu/<timestamp>    # make all of it again, no GPU

Numbers of a validation are recomputed from its dumped answers, so that every share has its count;
the first and the last validation are compared on the same rows with an exact McNemar test.

Reads   <run>/metrics.jsonl, <run>/validation/*.jsonl, <run>/config.yaml
Writes  <run>/plots/*.png, <run>/export/ and, last, <run>/summary.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from soundmind.run.folder import RunFolder
from soundmind.run.sft import complete_sft
from soundmind.run.summary import complete
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    arguments = parser.parse_args(argv)
    run = arguments.run
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        print(f"error: {run} is not a run folder (config.yaml, metrics.jsonl)", file=sys.stderr)
        return 2
    config = OmegaConf.load(run / "config.yaml")
    attempts = RunFolder(run, resumed=True).attempts()
    seconds = sum(a.get("ended", a["started"]) - a["started"] for a in attempts)
    assert isinstance(config, DictConfig)
    finish = complete_sft if "engine" in config else complete
    finish(run, config, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
