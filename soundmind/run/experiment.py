"""What makes two runs the same experiment, and in which keys two of them differ.

An experiment is every key of the configuration but those that change neither a rollout nor an update,
and the content of what the configuration names: base weights, tokenizer and templates, adapter,
Parquet rows, clips. Class paths count: a class that moved may have changed. [ours]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from soundmind.data.rows import CLIP_COLUMN, read_rows
from soundmind.system.digests import files_digest, joint_digest
from soundmind.system.files import file_digest

# Keys, and groups of keys, that may change when a run is continued.
FREE = (
    *(f"run.{key}" for key in ("resume", "root", "dir", "metrics_path", "export", "verbose")),
    *("run.poll_interval_seconds", "run.prepare", "run.practice_dir", "run.alr_dir"),
    *(f"trainer.{key}" for key in ("test_freq", "save_freq", "val_before_train", "logger")),
    *("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep"),
    "trainer.max_ckpt_to_keep",
    *("trainer.project_name", "trainer.experiment_name", "trainer.log_val_generations"),
    *("trainer.default_local_dir", "trainer.rollout_data_dir", "trainer.validation_data_dir"),
    "actor_rollout_ref.rollout.trace",
    "train.max_failed_share",  # when a run gives up, not what it trains
    "actor_rollout_ref.nccl_timeout",
    "ray_kwargs",  # which cluster it runs on: the next job's head node has another address
)
# Steps are free too where the learning rate does not depend on how many there will be.
STEPS = ("trainer.total_training_steps", "trainer.total_epochs")
_TEXT_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.py",
    "*.model",
)  # tokenizer, templates, processor, sizes
_SHOWN = 6


def experiment(config: DictConfig, contents: bool = True) -> dict[str, Any]:
    """Everything that makes a run this experiment, flat; `contents`: with digests of its inputs."""
    optim = OmegaConf.select(config, "actor_rollout_ref.actor.optim") or config.get("optim") or {}
    warmup = optim.get("lr_warmup_steps")
    share = 0 if warmup is not None and warmup >= 0 else optim.get("lr_warmup_steps_ratio")
    steady = optim.get("lr_scheduler_type", "constant") == "constant" and not share
    free = (*FREE, *STEPS) if steady else FREE
    plain = json.loads(json.dumps(OmegaConf.to_container(config, resolve=True), default=str))
    found = {
        key: value
        for key, value in _flat(plain)
        if not any(key == name or key.startswith(name + ".") for name in free)
    }
    return {**found, **dict(_contents(config))} if contents else found


def stored_experiment(run: Path) -> dict[str, Any] | None:
    """The experiment of a run folder; None where none was begun.

    Runs of earlier versions have their configuration alone.
    """
    record, config = run / "experiment.json", run / "config.yaml"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    if not config.is_file():
        return None
    loaded = OmegaConf.load(config)
    assert isinstance(loaded, DictConfig)
    return experiment(loaded, contents=False)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs from `old` to `new`, in one line; empty where nothing does.

    Contents are compared where both have them.
    """
    both = old.keys() & new.keys()
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    keys = [key for key in keys if " of " not in key or key in both]
    moved = [key for key in keys if _is_class_path(old.get(key)) and _is_class_path(new.get(key))]
    shown = moved or keys
    text = ", ".join(f"{key} {_short(old, key)} -> {_short(new, key)}" for key in shown[:_SHOWN])
    if len(keys) > len(shown[:_SHOWN]):
        text += f" and {len(keys) - len(shown[:_SHOWN])} more"
    if moved:
        return (
            f"it was begun by an earlier version of this package, and class paths are part of its "
            f"fingerprint ({text}); the commit in its versions.json continues it"
        )
    return text


def _is_class_path(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("pkg://").startswith("soundmind.")


def _short(values: dict[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "absent"
    return text if len(text) <= 80 else text[:77] + "..."


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contents(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Digests of what the configuration names and this disk has, as `<what> of <path>`."""
    model = config.actor_rollout_ref.model
    base = Path(str(model.path)).expanduser()
    if base.is_dir():
        yield f"weights of {model.path}", files_digest(sorted(base.glob("*.safetensors")))
        files = sorted({path for pattern in _TEXT_FILES for path in base.glob(pattern)})
        text = [f"{path.name} {file_digest(path)}" for path in files]
        yield f"tokenizer and settings of {model.path}", joint_digest(text)
    if model.get("lora_adapter_path"):
        adapter = Path(str(model.lora_adapter_path)).expanduser()
        yield f"adapter of {adapter}", files_digest(sorted(adapter.glob("adapter_*")))
    for key in ("train_files", "val_files"):
        files = config.data[key]
        for name in [files] if isinstance(files, str) else files:
            yield f"rows of {name}", file_digest(Path(name))
            clips = read_rows(name, root=config.data.audio_root)[CLIP_COLUMN].to_pylist()
            paths = [Path(clip) for clip in clips if clip and Path(clip).is_file()]
            yield f"clips of {name}", files_digest(paths)
