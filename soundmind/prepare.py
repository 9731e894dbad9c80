"""Make ready what a configuration trains on: data as Parquet, and the stand-in where that is
trained.

    python -m soundmind.prepare --config-name grpo_tiny_cpu
    python -m soundmind.prepare --config-name grpo_7b_8gpu     # says what to download if it is not
    there

`run.prepare` says what: `practice` (spoken syllogisms and the stand-in model, both made here from
a seed) or `alr` (the published data, which has to be downloaded). What is up to date is left alone.
Exit status 2: something is missing that only a download can bring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.run.config import CONFIG_DIR, ConfigError, compose_config
from soundmind.run.prepare import prepare_alr, prepare_practice
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True)
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
    if config.run.prepare == "practice":
        prepare_practice(config)
    elif config.run.prepare == "alr":
        prepare_alr(config)
    else:
        raise ConfigError(f"run.prepare={config.run.prepare}: expected practice or alr")
    return 0


if __name__ == "__main__":
    sys.exit(main())
