"""configs/<name>.yaml composed over verl's `ppo_trainer`, and refusals in one line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from soundmind.run.quoting import quoting_hint
from soundmind.system.errors import UserError
from soundmind.system.files import REPOSITORY

CONFIG_DIR = REPOSITORY / "configs"
if not CONFIG_DIR.is_dir():  # installed as a wheel, which brings its own
    CONFIG_DIR = Path(sys.prefix) / "share/soundmind/configs"


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the key and the next step."""


def config_names(config_dir: Path = CONFIG_DIR, stage: str = "train") -> list[str]:
    """Experiments in `config_dir`, by name: of soundmind.train, of soundmind.sft, or of `all`."""
    names = sorted(path.stem for path in config_dir.glob("*.yaml"))
    found = {name: "sft" if name.startswith("sft_") else "train" for name in names}
    return [name for name in names if stage in ("all", found[name])]


def compose_config(
    name: str, overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """configs/<name>.yaml over verl's `ppo_trainer`, with Hydra `overrides` applied."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException, HydraException

    if name not in config_names(config_dir, "all"):
        raise ConfigError(
            f"no configuration {name!r} in {config_dir}; there are: "
            + ", ".join(config_names(config_dir, "all"))
        )
    _known_words(overrides, config_dir)
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base=None):
            config = compose(config_name=name, overrides=list(overrides))
    except ConfigCompositionException as error:
        hint = quoting_hint(overrides)
        raise ConfigError(hint or _explain_override(error, name, config_dir)) from error
    except HydraException as error:
        hint = quoting_hint(overrides)
        raise ConfigError(hint or f"{name}: {' '.join(str(error).split())}") from error
    if "run" not in config:
        raise ConfigError(
            f"{config_dir / name}.yaml stands alone, without the keys of verl and of this project; "
            "begin it with the lines `hydra:` and `defaults:` of configs/grpo_tiny_cpu.yaml"
        )
    _expand_home(config)
    return config


# Keys that name places on this disk.
PATH_KEYS = (
    *(f"run.{key}" for key in ("root", "resume", "practice_dir", "alr_dir")),
    *(f"data.{key}" for key in ("train_files", "val_files", "audio_root")),
    *(f"actor_rollout_ref.model.{key}" for key in ("path", "lora_adapter_path")),
)


def _expand_home(config: DictConfig) -> None:
    """`~` at the start of a place is the home folder, for whoever reads the key."""
    for key in PATH_KEYS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(config, key, str(Path(value).expanduser()))
        elif OmegaConf.is_list(value):
            places = [
                str(Path(place).expanduser()) if place[:1] == "~" else place for place in value
            ]
            OmegaConf.update(config, key, places)


def _known_words(overrides: Sequence[str], config_dir: Path) -> None:
    """Every `<group>=<word>` of one of our groups names a file of it; the nearest is shown."""
    for override in overrides:
        group, _, word = override.partition("=")
        words = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
        if group.isidentifier() and group != "base" and words and word not in (*words, "null"):
            close = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
            hint = f" Did you mean {group}={close[0]}?" if close else ""
            raise ConfigError(f"no {group} {word!r}.{hint} There are: {', '.join(words)}")


def _explain_override(error: Exception, name: str, config_dir: Path) -> str:
    """Hydra's refusal in one line, with the existing keys that look alike."""
    message = " ".join(str(part) for part in (error, error.__cause__) if part)
    match = re.search(r"Could not override '([^']+)'", message)
    if match is None:
        return f"{name}: {message}"
    unknown = match.group(1)
    known = list(_keys(compose_config(name, config_dir=config_dir)))
    close = difflib.get_close_matches(unknown, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"unknown override {unknown!r}: neither verl nor {name}.yaml has this key.{hint} "
        f"To add a key on purpose write +{unknown}=..."
    )


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        path = f"{prefix}{key}"
        yield path
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key):
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_interpolation():
                yield from _keys(child, path + ".")
