"""What a reward is made of: components, presets, plugged-in terms, and the configuration of them.

`resolve` checks `reward_kwargs` of a configuration and loads what it names; what a response then
earns is soundmind.task.reward. Standard library only.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from soundmind.task.labels import ENTAILMENT, LabelSet

logger = logging.getLogger(__name__)

ComponentFn = Callable[[str, dict[str, Any]], float]

LengthUnit = Literal["tokens", "words"]

COMPONENTS = ("text_format", "audio_format", "answer", "text_length", "audio_length")

AUDIO_COMPONENTS = ("audio_format", "audio_length")

# Not summed; verl promotes `acc` to val-core and takes majority votes over `pred`.
RATE_KEYS = ("acc", "parsed", "reward_error")

OTHER_KEYS = ("score", "pred", "response_tokens", "reward_error_cause")


def _weights(*values: float, **others: float) -> dict[str, float]:
    return {**dict(zip(COMPONENTS, values, strict=True)), **others}


# Weights in the order of COMPONENTS. The ablations are the printed rows of table 7, also the
# second, which raises the audio weights to 1.0 while it removes the text terms.
PRESETS: dict[str, dict[str, float]] = {
    "paper": _weights(1.0, 0.5, 2.0, 1.0, 0.75),  # [paper] sec. 5.1
    "no_audio_rewards": _weights(1.0, 0.0, 2.0, 1.0, 0.0),  # [paper] table 7
    "no_text_rewards": _weights(0.0, 1.0, 2.0, 0.0, 1.0),  # [paper] table 7
    "no_answer_reward": _weights(1.0, 0.5, 0.0, 1.0, 0.75),  # [paper] table 7
    # [ours] the paper's weights, soundmind.task.guards, and a price on not committing to a verdict
    "guarded": _weights(1.0, 0.5, 2.0, 1.0, 0.75, no_verdict=-0.25),
}

# What the text's length earns. [ours] but the first: `capped` falls to 0 from twice the reference on
# (soundmind.task.guards), `correct_only` is paid for right answers alone.
LENGTHS = ("paper", "capped", "correct_only")

_PLUGIN_PREFIX = "pkg://"

_VERL_KWARGS = ("reward_router_address", "reward_model_tokenizer")  # sent with a reward model

_CONFIG_KEYS = ("preset", "weights", "length_unit", "length", "labels", "components")


@dataclass(frozen=True)
class Plugin:
    """A component from outside this module: `fn(response, row)`, in [0, 1], times `weight`."""

    name: str
    fn: ComponentFn
    weight: float


@dataclass(frozen=True)
class Reward:
    """A resolved reward: everything the configuration says, checked once."""

    preset: str
    weights: Mapping[str, float]  # built-in components first, then plug-ins, in log order
    length_unit: LengthUnit
    labels: LabelSet
    plugins: tuple[Plugin, ...]
    length: str = "paper"

    @property
    def guarded(self) -> bool:
        return self.preset == "guarded"

    def maximum(self, has_speech: bool = False) -> float:
        """The most a response can score: the positive weights of the terms it is graded on."""
        return sum(
            max(0.0, weight)
            for name, weight in self.weights.items()
            if has_speech or name not in AUDIO_COMPONENTS
        )


def resolve(**reward_kwargs: Any) -> Reward:
    """Check a configuration and load what it names; ValueError says which key is wrong.

    Takes `reward_kwargs` of the YAML as plain or OmegaConf containers. A trainer calls this before
    a run, so that a misspelt weight stops it at once and not in a worker.
    """
    return _build(_plain({k: v for k, v in reward_kwargs.items() if k not in _VERL_KWARGS}))


def component_names(**reward_kwargs: Any) -> tuple[str, ...]:
    """The components this configuration sums, in log order: built-in ones, then plug-ins."""
    return tuple(resolve(**reward_kwargs).weights)


def max_score(has_speech: bool = False, **reward_kwargs: Any) -> float:
    """The highest score under a configuration: 5.25 for the paper's with speech, 4.0 without."""
    return resolve(**reward_kwargs).maximum(has_speech)


def _plain(value: Any) -> Any:
    """Nested containers, OmegaConf's included, as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _build(config: dict[str, Any]) -> Reward:
    unknown = sorted(set(config) - set(_CONFIG_KEYS))
    if unknown:
        raise ValueError(
            f"reward_kwargs: unknown key {unknown[0]!r}; known: {_names(_CONFIG_KEYS)}"
        )
    preset = config.get("preset") or "paper"
    if preset not in PRESETS:
        raise ValueError(f"reward_kwargs.preset: {preset!r} is none of {_names(PRESETS)}")
    unit = config.get("length_unit") or "tokens"
    if unit not in ("tokens", "words"):
        raise ValueError(f"reward_kwargs.length_unit: {unit!r} is neither 'tokens' nor 'words'")
    length = config.get("length") or "paper"
    if length not in LENGTHS:
        raise ValueError(f"reward_kwargs.length: {length!r} is none of {_names(LENGTHS)}")

    weights = dict(PRESETS[preset])
    for name, weight in (config.get("weights") or {}).items():
        if name not in weights:
            raise ValueError(
                f"reward_kwargs.weights: {name!r} is no component of preset {preset!r}; "
                f"it has {_names(weights)} (a new one goes under reward_kwargs.components)"
            )
        weights[name] = _weight(weight, f"reward_kwargs.weights.{name}")
    plugins = tuple(_load_plugin(entry) for entry in config.get("components") or [])
    for plugin in plugins:
        if plugin.name in weights or plugin.name in (*RATE_KEYS, *OTHER_KEYS):
            raise ValueError(f"reward_kwargs.components: the name {plugin.name!r} is taken")
        weights[plugin.name] = plugin.weight
    labels = _load_labels(config.get("labels"))
    reward = Reward(preset, weights, cast(LengthUnit, unit), labels, plugins, length)
    logger.info(
        "reward preset %s: %s; at most %g, with speech %g",
        preset,
        " + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        reward.maximum(),
        reward.maximum(has_speech=True),
    )
    return reward


def _load_plugin(entry: Any) -> Plugin:
    """Load `{name, path, weight}`; the path names the function or defaults to the entry's name."""
    if not isinstance(entry, dict) or not {"name", "path"} <= set(entry):
        raise ValueError(
            "reward_kwargs.components: each entry is {name: ..., path: pkg://module:function, "
            f"weight: 1.0}}, got {entry!r}"
        )
    unknown = sorted(set(entry) - {"name", "path", "weight", "options"})
    if unknown:
        raise ValueError(f"reward_kwargs.components: unknown key {unknown[0]!r} in {entry!r}")
    name = str(entry["name"])
    where = f"reward_kwargs.components.{name}"
    fn = (
        _load_object(entry["path"], name, where)
        if isinstance(entry["path"], str)
        else entry["path"]
    )
    if not callable(fn):
        raise ValueError(f"{where}.path: {entry['path']!r} is not a function")
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}.options: {options!r} is no mapping of keyword arguments")
    fn = functools.partial(fn, **options) if options else fn
    return Plugin(name, fn, _weight(entry.get("weight", 1.0), f"{where}.weight"))


def _load_labels(spec: Any) -> LabelSet:
    """A label set from its name, a list of labels, {label: [spellings]}, or pkg://module:NAME."""
    if spec is None or spec == ENTAILMENT.name:
        return ENTAILMENT
    if isinstance(spec, LabelSet):
        return spec
    if isinstance(spec, (list, dict)):
        table = spec if isinstance(spec, dict) else dict.fromkeys(spec, ())
        if not all(isinstance(label, str) for label in table):
            raise ValueError(f"reward_kwargs.labels: quote the labels, YAML read {list(table)}")
        return LabelSet.build("/".join(table), {k: list(v or ()) for k, v in table.items()})
    where = "reward_kwargs.labels"
    loaded = _load_object(spec, "LABELS", where) if isinstance(spec, str) else None
    if not isinstance(loaded, LabelSet):
        raise ValueError(
            f"{where}: {spec!r} is no label set; give 'entailment', a list such as [A, B, C, D], "
            "{label: [spellings]}, or pkg://module:NAME of a soundmind.task.labels.LabelSet"
        )
    return loaded


def _load_object(path: str, default_name: str, where: str) -> Any:
    if not path.startswith(_PLUGIN_PREFIX):
        raise ValueError(f"{where}: {path!r} does not begin with {_PLUGIN_PREFIX}")
    module_name, _, attribute = path[len(_PLUGIN_PREFIX) :].replace("/", ".").partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{where}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?"
        ) from error
    attribute = attribute or default_name
    if not hasattr(module, attribute):
        raise ValueError(f"{where}: {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def _weight(value: Any, where: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{where}: {value!r} is not a finite number")
    return weight


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
