"""LoRA for the language model: names, the merge, and which adapters are supported.

A PEFT model calls its weights `base_model.model.<name>`, puts `.base_layer` into the names of the
layers it adapts, and keeps two matrices beside each of them:

    model.layers.0.self_attn.q_proj.base_layer.weight          W  (out, in), frozen
    model.layers.0.self_attn.q_proj.lora_A.default.weight      A  (rank, in)
    model.layers.0.self_attn.q_proj.lora_B.default.weight      B  (out, rank), zero at the start

What the layer computes is W x + scale B A x; the merged weight is W + scale B A. Rollouts and
exports get merged weights under the base's own names. verl's merge writes into the training
weights, keeps a copy of the whole base meanwhile and rounds every weight to bfloat16; the one here
touches nothing and keeps the data type. [ours]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from soundmind.model.parts import ADAPTER_PREFIX, part_of
from soundmind.system.errors import UserError

if TYPE_CHECKING:
    import torch


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MATRIX = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")
# Settings of PEFT under which a layer computes something else than W x + alpha / r B A x.
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
_EMPTY = ("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")


class LoraError(UserError, ValueError):
    """An adapter that cannot be trained or merged here; the message says what to change."""


def base_name(name: str) -> str:
    """A weight's name in the thinker, from its name in the PEFT model around it."""
    return name.removeprefix(ADAPTER_PREFIX).replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a tensor of a PEFT model belongs to the adapter."""
    return ".lora_" in name


def adapter_name(name: str) -> str:
    """An adapter tensor's name in `adapter_model.safetensors`: without the adapter's own name."""
    return name.replace(".default.", ".")


def pairs(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each adapted weight, by its name in the thinker, the names of its matrices A and B.

    Raises `LoraError` for an adapter tensor of another kind or without its partner.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if not is_adapter(name):
            continue
        match = _MATRIX.search(name)
        if match is None:
            raise LoraError(f"{name} is no LoRA matrix of a linear layer")
        weight = base_name(name[: match.start()] + ".weight")
        found.setdefault(weight, {})[match[1]] = name
    for weight, matrices in found.items():
        if matrices.keys() != {"A", "B"}:
            raise LoraError(f"{weight}: only matrix {''.join(matrices)} of its LoRA pair is there")
    return found


def merge(
    weight: torch.Tensor, matrix_a: torch.Tensor, matrix_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale B A in `weight`'s data type, computed in float32; a new tensor.

    `weight` (out, in), `matrix_a` (rank, in), `matrix_b` (out, rank).
    """
    update = matrix_b.float() @ matrix_a.float()
    return (weight.float() + scale * update).to(weight.dtype)


def merged_weights(
    state: Mapping[str, Any], scale: float, whole: Callable[[Any], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the thinker under its own name, adapted ones merged, one at a time.

    `state` is a PEFT model's state; `whole` turns one of its values into the full tensor, and with
    sharded values every rank has to take every item.
    """
    matrices = pairs(state)
    for name, value in state.items():
        if is_adapter(name):
            continue
        own = base_name(name)
        weight = whole(value)
        if own in matrices:
            pair = matrices[own]
            weight = merge(weight, whole(state[pair["A"]]), whole(state[pair["B"]]), scale)
        yield own, weight


def scale_of(settings: Mapping[str, Any]) -> float:
    """alpha / r of an adapter's settings; raises `LoraError` unless it is plain LoRA."""
    for key, value in _PLAIN.items():
        if settings.get(key, value) != value:
            raise LoraError(f"LoRA with {key}={settings[key]!r} is not supported; use {value!r}")
    for key in _EMPTY:
        if settings.get(key):
            raise LoraError(f"LoRA with {key}={settings[key]!r} is not supported; leave it out")
    return float(settings["lora_alpha"]) / float(settings["r"])


def require_language_model(names: Iterable[str], target_modules: Any) -> None:
    """Raise `LoraError` unless adapter tensors among `names` are there, all in the language model."""
    adapters = [name for name in names if is_adapter(name)]
    if not adapters:
        raise LoraError(
            f"actor_rollout_ref.model.target_modules={target_modules!r} matches no layer; leave it "
            "at all-linear for every linear layer of the language model"
        )
    outside = sorted(name for name in adapters if part_of(name) != "language_model")
    if outside:
        raise LoraError(
            f"actor_rollout_ref.model.target_modules={target_modules!r} reaches into the "
            f"{part_of(outside[0]).replace('_', ' ')} ({base_name(outside[0])}); LoRA is for the "
            r"language model alone, e.g. 'model\.layers\.\d+\.self_attn\.(q|v)_proj'"
        )
