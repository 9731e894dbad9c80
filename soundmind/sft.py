"""Supervised fine-tuning on the annotated reasoning, through verl's SFT trainer.

    python -m soundmind.sft --config-name sft_tiny_cpu
    python -m soundmind.sft --config-name sft_7b_8gpu modality=mixed --dry-run

Reads   configs/sft_*.yaml, composed over verl's `sft_trainer_engine`, the Parquet files it names, and
        the annotations those were made from
Writes  outputs/<name>/<timestamp>/ (see soundmind.run.folder); the last line printed is `run:
<folder>`, and <folder>/export is a model that soundmind.train, soundmind.evaluate and vLLM take

The annotated chain is taught as `<think>...</think>` and the closing line, with the loss on the response
alone. Rows whose annotation contradicts the label, or cannot be taught, are left out and counted
(rows.json). Resume, checkpoints and exit status are those of soundmind.train.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.run.config import CONFIG_DIR, compose_config
from soundmind.run.sft import fine_tune, sft_dry_run
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True, help="a sft_* experiment in --config-dir")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument(
        "--dry-run", action="store_true", help="everything up to the first rank, then stop"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.dry_run:
        print(sft_dry_run(config, arguments.config_name))
        return 0
    folder = fine_tune(config, arguments.config_name)
    print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
