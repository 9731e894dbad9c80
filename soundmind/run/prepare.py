"""Make ready what a configuration trains on: the practice set, or the published data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from soundmind.run.config import ConfigError
from soundmind.task.schema import MODES


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
    from soundmind.standin import practice, tiny

    data = Path(config.run.practice_dir)
    model = Path(config.actor_rollout_ref.model.path)
    practice.build_practice(data)
    tiny.build_stand_in(model, seed=int(config.run.stand_in_seed), data=data)
    for mode in modes_of(parquet_files(config)):
        _make_parquet(mode=mode, task="practice", data_dir=str(data), tokenizer=str(model))


def prepare_alr(config: DictConfig) -> None:
    """Parquet from downloaded annotations and clips; a plain message where they are not there."""
    from soundmind.run import checks

    missing = [path for path in parquet_files(config) if not path.is_file()]
    data, model = Path(config.run.alr_dir), Path(config.actor_rollout_ref.model.path)
    needed = []
    # The model first: its tokenizer counts the lengths that the rows keep.
    if not model.is_dir() and model.parts[0] == "checkpoints":
        needed.append(
            f"{model} not found. Fetch it (7B: about 22 GB): {checks.model_command(config)}"
        )
    if missing and not data.is_dir():
        text_alone = modes_of(missing) == ["text"]
        needed.append(
            f"{missing[0]} not found and no data in {data}. Fetch it ("
            + (
                "40 MB"
                if text_alone
                else "20 GB of questions; PARTS=all, 200 GB, brings recorded answers"
            )
            + f"): PARTS={'text' if text_alone else 'questions'} bash scripts/download_data.sh"
        )
    if needed:
        raise ConfigError("\n  ".join(needed))
    for mode in modes_of(missing):
        _make_parquet(mode=mode, data_dir=str(data))


def _make_parquet(**options: Any) -> None:
    """`soundmind.preprocess` in this process; its error ends the preparation."""
    from soundmind.data import preprocess
    from soundmind.data.job import BadInput
    from soundmind.data.sources import SourceError

    try:
        preprocess.make_parquet(preprocess.make_job(**options))
    except BadInput as error:
        print(error.report())
        raise ConfigError(f"{options['data_dir']} has faults, see above") from None
    except SourceError as error:
        raise ConfigError(str(error)) from error
