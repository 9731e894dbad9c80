"""The prepared rows that a configuration names: there, enough for a batch, of the reward's labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from soundmind.data.pass_rates import PassRateError, curriculum
from soundmind.data.rows import read_rows
from soundmind.planning.setup import rows_of


def data_files(config: DictConfig) -> Iterator[str]:
    """The Parquet files are there."""
    for key in ("train_files", "val_files"):
        for path in paths_of(config.data[key]):
            if not Path(path).is_file():
                command = _prepare_command(config, path)
                yield f"data.{key}: {path} not found. Make it with: {command}"
    if all(Path(path).is_file() for path in paths_of(config.data.train_files)):
        yield from filled_batches(config)


def filled_batches(config: DictConfig) -> Iterator[str]:
    """A step's prompts are there; verl's data loader drops an incomplete batch, and then has none."""
    rows, _ = rows_of(config.data.train_files, "train")
    limit = int(config.data.get("train_max_samples", -1))
    used = min(rows, limit) if limit > 0 else rows
    batch = config.data.train_batch_size
    if isinstance(batch, int) and used < batch:
        yield (
            f"data.train_batch_size={batch} and there are {used} training rows: no step could be "
            f"filled; set it to at most {used}"
        )


def ground_truths(config: DictConfig) -> Iterator[str]:
    """Every ground truth of the data is a verdict of the label set that the reward reads."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    from soundmind.task.reward_settings import resolve

    function = config.reward.custom_reward_function
    if function.path != "pkg://soundmind.rewards":
        return
    keywords: Any = OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create({}))
    try:
        reward = resolve(**keywords)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError):
        return  # `reward_settings` says so
    known = list(reward.labels.labels)
    for key in ("train_files", "val_files"):
        for path in filter(lambda path: Path(path).is_file(), paths_of(config.data[key])):
            table = parquet.read_table(path, columns=["reward_model"])
            column = compute.struct_field(table["reward_model"], "ground_truth")
            strange = sorted(set(map(str, column.unique().to_pylist())) - set(known))
            if strange:
                yield (
                    f"data.{key}: {path} has the ground truth {strange[0]!r}, which is no label of the "
                    f"reward ({', '.join(known)}); no response could be right. Set reward_kwargs.labels "
                    "to the labels of this data"
                )


def curriculum_rows(config: DictConfig) -> Iterator[str]:
    """The saved evaluation that orders the rows is one of these rows, and nothing shuffles them."""
    if not config.data.get("curriculum"):
        return
    if config.data.shuffle:
        yield "data.curriculum is set and data.shuffle=true would undo its order; set data.shuffle=false"
    infos = [
        info
        for path in filter(lambda path: Path(path).is_file(), paths_of(config.data.train_files))
        for info in read_rows(path, root=config.data.audio_root)["extra_info"].to_pylist()
    ]
    try:
        curriculum(Path(config.data.curriculum), infos, config.data.curriculum_order)
    except PassRateError as error:
        yield str(error)


def paths_of(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, ListConfig)) else [value]


def _prepare_command(config: DictConfig, path: str) -> str:
    if config.run.prepare == "practice":
        return "python -m soundmind.prepare --config-name grpo_tiny_cpu"
    mode = Path(path).parent.name
    mode = mode if mode in ("audio", "text", "dual") else "audio"
    return f"bash scripts/download_data.sh && python -m soundmind.preprocess --mode {mode}"


def counted_lengths(config: DictConfig) -> Iterator[str]:
    """Rows know the reference's tokens where the reward pays for length in tokens."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    from soundmind.task.reward import resolve

    function = config.reward.custom_reward_function
    if function.path != "pkg://soundmind.rewards":
        return
    keywords: Any = OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create({}))
    try:
        unit = resolve(**keywords).length_unit
    except (ValueError, TypeError, KeyError, ImportError, AttributeError):
        return  # `reward_settings` says so
    if unit != "tokens":
        return
    for path in filter(lambda path: Path(path).is_file(), paths_of(config.data.train_files)):
        column = parquet.read_table(path, columns=["extra_info"])["extra_info"]
        tokens = compute.struct_field(column, "reference_tokens")
        words = compute.struct_field(column, "reference_words")
        bare = compute.sum(compute.and_(compute.is_null(tokens), compute.is_valid(words))).as_py()
        if bare:
            yield (
                f"data.train_files: {path} has {bare} rows whose reference was counted in words alone, "
                "and reward_kwargs.length_unit is tokens. Prepare it again with the policy's tokenizer: "
                f"python -m soundmind.preprocess --tokenizer {config.actor_rollout_ref.model.path} ..., "
                "or set length_unit=words"
            )
