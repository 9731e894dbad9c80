"""Everything about supervised fine-tuning that can be known before a rank starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from soundmind.data.chains import LONG_CHAINS, ChainError, Chains
from soundmind.data.sources import SourceError
from soundmind.run import checks, data_checks, lora_checks
from soundmind.run.config import ConfigError


def find_sft_problems(config: DictConfig) -> Iterator[str]:
    """Problems of an SFT configuration, cheap checks first."""
    config = config.copy()
    if not config.data.val_files:
        config.data.val_files = []
    for check in (
        checks.installed_versions,
        checks.device,
        sft_settings,
        lora_checks.lora_targets,
        checks.resume,
        data_checks.data_files,
        checks.model_folder,
        lora_checks.part_problems,
    ):
        yield from check(config)


def sft_settings(config: DictConfig) -> Iterator[str]:
    """Batches divide over the ranks, one sequence fits a micro-batch, and frequencies are ones."""
    data, trainer = config.data, config.trainer
    ranks = trainer.n_gpus_per_node
    if trainer.nnodes != 1:
        yield f"trainer.nnodes={trainer.nnodes}: supervised fine-tuning runs on one node; set it to 1"
    if config.engine.strategy != "fsdp2":
        yield f"engine.strategy={config.engine.strategy}: this model's engine needs fsdp2"
    if config.engine.ulysses_sequence_parallel_size != 1:
        yield "engine.ulysses_sequence_parallel_size must be 1: verl has no input slicing for this model"
    if data.pad_mode != "no_padding":
        yield f"data.pad_mode={data.pad_mode}: ranks exchange sequences of their own length; set no_padding"
    if data.train_batch_size % ranks:
        yield (
            f"data.train_batch_size={data.train_batch_size} does not divide over {ranks} ranks; set "
            f"it to {max(1, round(data.train_batch_size / ranks)) * ranks}"
        )
    elif not data.use_dynamic_bsz and (
        data.train_batch_size // ranks % data.micro_batch_size_per_gpu
    ):
        yield (
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} does not divide the "
            f"{data.train_batch_size // ranks} rows of a rank; set data.use_dynamic_bsz=true, or a divisor"
        )
    longest = data.max_prompt_length + data.max_response_length
    if data.use_dynamic_bsz and data.max_token_len_per_gpu < longest:
        yield (
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu} is below one sequence of "
            f"{longest} tokens; set it to at least {longest}"
        )
    if data.long_chains not in LONG_CHAINS:
        yield f"data.long_chains={data.long_chains}: one of {', '.join(LONG_CHAINS)}"
    for name in ("test_freq", "save_freq"):
        value = trainer[name]
        if value != "after_each_epoch" and not (isinstance(value, int) and value != 0):
            yield f"trainer.{name}={value}: a number of steps, after_each_epoch, or -1 for never"
    if trainer.test_freq != -1 and not data.val_files:
        yield "data.val_files is empty; name a file, or set trainer.test_freq=-1"


def require_sft(config: DictConfig) -> tuple[list[Chains], list[Chains]]:
    """Chains of training and validation files; raises `CheckError` with every problem found.

    What cannot be looked at before data and model are there is looked at once they are.
    """
    problems = list(find_sft_problems(config)) or list(_settings_classes(config))
    if not problems:
        problems = list(checks.processor_and_prompts(_with_validation(config)))
    if problems:
        raise checks.CheckError(problems)
    try:
        train, validation = _chains(config, "train"), _chains(config, "val")
    except (ChainError, SourceError) as error:
        raise checks.CheckError([str(error)]) from error
    if problems := list(enough_rows(config, train, validation)):
        raise checks.CheckError(problems)
    return train, validation


def _with_validation(config: DictConfig) -> DictConfig:
    config = config.copy()
    config.data.val_files = config.data.val_files or []
    return config


def _chains(config: DictConfig, which: str) -> list[Chains]:
    from transformers import AutoTokenizer

    from soundmind.data.chains import chains_of

    tokenizer = AutoTokenizer.from_pretrained(str(config.model.path))
    limit = int(config.data.get(f"{which}_max_samples", -1))
    return chains_of(config.data[f"{which}_files"], config.data, tokenizer, limit)


def enough_rows(config: DictConfig, train: list[Chains], validation: list[Chains]) -> Iterator[str]:
    """There is a step to make, the epochs hold the steps asked for, and a batch to validate on."""
    batch, steps = config.data.train_batch_size, config.trainer.total_training_steps
    rows = sum(len(chains.rows) for chains in train)
    epoch = steps_of_an_epoch(rows, batch, config.trainer.n_gpus_per_node)
    if not epoch:
        yield f"{rows} rows to teach do not make one batch of data.train_batch_size={batch}; lower it"
    elif steps and steps > epoch * config.trainer.total_epochs:
        # verl would end with the last epoch, without a checkpoint.
        yield (
            f"trainer.total_training_steps={steps} and {config.trainer.total_epochs} epochs of {epoch} "
            f"steps end before; set trainer.total_epochs={-(-steps // epoch)}"
        )
    held_out = sum(len(chains.rows) for chains in validation)
    if validation and held_out < batch:
        yield (
            f"{held_out} validation rows do not fill one batch of data.train_batch_size={batch}, in "
            "which verl validates; name more in data.val_files, or set trainer.test_freq=-1 and "
            "data.val_files=null"
        )


def steps_of_an_epoch(rows: int, batch: int, ranks: int) -> int:
    """Whole batches of an epoch, as verl's sampler deals rows to ranks."""
    return (rows // ranks) // (batch // ranks)


def _settings_classes(config: DictConfig) -> Iterator[str]:
    """What verl's settings classes refuse."""
    from soundmind.plugin.verl_entry import require_loaded

    require_loaded()
    from verl.utils.config import omega_conf_to_dataclass

    for name in ("model", "engine", "optim", "checkpoint"):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Failed to create processor")
                omega_conf_to_dataclass(config.copy()[name])
        except Exception as error:  # whatever a settings class raises is a problem to report
            yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


def require_stage(config: DictConfig, name: str, stage: str) -> None:
    """Raise `ConfigError` for a configuration of the other command."""
    found: Any = "sft" if OmegaConf.select(config, "engine") is not None else "train"
    if found != stage:
        raise ConfigError(
            f"{name} is a configuration of python -m soundmind.{found}; run that command instead"
        )
