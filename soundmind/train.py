"""Train: compose a configuration, check it, then run verl's trainer on it.

    python -m soundmind.train --config-name grpo_tiny_cpu
    python -m soundmind.train --config-name grpo_7b_8gpu actor_rollout_ref.rollout.n=8
    python -m soundmind.train --config-name grpo_7b_8gpu modality=text --dry-run

Reads   configs/<name>.yaml, composed over verl's `ppo_trainer`, and the files it points at
Writes  outputs/<name>/<timestamp>/ (see soundmind.run.folder); the last line printed is `run:
<folder>`

An interrupted run of the same configuration is continued from its last checkpoint; `run.resume=new`
starts another one. Nothing heavy starts before every check has passed; `--dry-run` does all of that,
prints what would be trained and where it would go, and starts and writes nothing. Exit status 2: a
check failed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from soundmind.run.config import CONFIG_DIR, compose_config
from soundmind.run.dry_run import dry_run
from soundmind.run.sft_checks import require_stage
from soundmind.run.train import NodeLostError, train
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True, help="an experiment in --config-dir")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument(
        "--dry-run", action="store_true", help="everything up to the start of Ray, then stop"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
    require_stage(config, arguments.config_name, "train")
    if arguments.dry_run:
        print(dry_run(config, arguments.config_name))
        return 0
    try:
        folder = train(config, arguments.config_name)
    except NodeLostError as error:
        traceback.print_exception(error.__cause__)
        raise
    print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
