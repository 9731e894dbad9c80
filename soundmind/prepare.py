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

from omegaconf import DictConfig, ListConfig

from soundmind.train import CONFIG_DIR, ConfigError, compose_config

MODES = ("audio", "text", "dual")


def parquet_files(config: DictConfig) -> list[Path]:
    """Every Parquet file the configuration names."""
    files: list[Path] = []
    for key in ("train_files", "val_files"):
        value = config.data[key]
        files += [Path(path) for path in (value if isinstance(value, ListConfig) else [value])]
    return files


def modes_of(files: Sequence[Path]) -> list[str]:
    """The prompt modes among `.../<mode>/<split>.parquet`, in a fixed order."""
    named = {path.parent.name for path in files}
    return [mode for mode in MODES if mode in named]


def prepare_practice(config: DictConfig) -> None:
    """Practice clips, then the stand-in warmed up on them, then Parquet with its token counts."""
    from soundmind import practice, preprocess, tiny

    data = str(config.run.practice_dir)
    model = str(config.actor_rollout_ref.model.path)
    _run(practice.main, ["--output", data])
    seed = str(config.run.stand_in_seed)
    _run(tiny.main, ["--output", model, "--data", data, "--seed", seed])
    for mode in modes_of(parquet_files(config)):
        arguments = ["--mode", mode, "--task", "practice", "--data-dir", data]
        _run(preprocess.main, [*arguments, "--tokenizer", model])


def prepare_alr(config: DictConfig) -> None:
    """Parquet from downloaded annotations and clips; a plain message where they are not there."""
    from soundmind import checks, preprocess

    missing = [path for path in parquet_files(config) if not path.is_file()]
    data = Path(config.run.alr_dir)
    if missing and not data.is_dir():
        raise ConfigError(
            f"{missing[0]} not found and no data in {data}. Fetch it (about 200 GB with audio): "
            "bash scripts/download_data.sh"
        )
    for mode in modes_of(missing):
        _run(preprocess.main, ["--mode", mode, "--data-dir", str(data)])
    model = Path(config.actor_rollout_ref.model.path)
    if not model.is_dir() and model.parts[0] == "checkpoints":
        raise ConfigError(
            f"{model} not found. Fetch it (7B: about 22 GB): {checks.model_command(config)}"
        )


def _run(command: object, arguments: list[str]) -> None:
    """Run one of our commands in this process; its error ends the preparation."""
    assert callable(command)
    status = command(arguments)
    if status:
        name = getattr(command, "__module__", "command")
        raise ConfigError(f"`python -m {name} {' '.join(arguments)}` failed (exit status {status})")


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
    try:
        config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
        if config.run.prepare == "practice":
            prepare_practice(config)
        elif config.run.prepare == "alr":
            prepare_alr(config)
        else:
            raise ConfigError(f"run.prepare={config.run.prepare}: expected practice or alr")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
