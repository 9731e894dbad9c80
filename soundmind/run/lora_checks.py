"""What LoRA may adapt, and whether an adapter fits the base: asked before Ray starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from soundmind.model import parts
from soundmind.model.folder import WeightFileError, folder_shapes, tensor_shapes
from soundmind.model.parts import ADAPTER_PREFIX, THINKER_PREFIX

# Linear layers of the audio tower, by their names in the thinker.
AUDIO_TOWER_LINEARS = (
    *(f"audio_tower.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
    "audio_tower.layers.0.self_attn.out_proj",
    "audio_tower.layers.0.fc1",
    "audio_tower.layers.0.fc2",
    "audio_tower.proj",
)


def lora_targets(config: DictConfig) -> Iterator[str]:
    """A LoRA adapter stays in the language model; vLLM could not take one in the audio tower."""
    model = config.actor_rollout_ref.model
    if OmegaConf.select(model, "lora.rank"):
        yield (
            f"actor_rollout_ref.model.lora.rank={model.lora.rank} is the key of verl's Megatron "
            "engine and makes no adapter here; set actor_rollout_ref.model.lora_rank"
        )
    if model.lora_rank == 0:
        return
    targets = parts.language_model_targets(
        OmegaConf.to_container(model.target_modules)
        if isinstance(model.target_modules, ListConfig)
        else model.target_modules
    )
    key = "actor_rollout_ref.model.target_modules"
    try:
        reached = [name for name in AUDIO_TOWER_LINEARS if re.fullmatch(targets, name)]
    except re.error as error:
        yield f"{key}={targets!r} is no regular expression: {error}"
        return
    if reached:
        yield (
            f"{key}={targets!r} reaches into the audio tower ({reached[0]}); PEFT matches the whole "
            "name, so open it with model\\.layers\\. or use all-linear"
        )


def part_problems(config: Any) -> Iterator[str]:
    """Problems of a run's configuration with what it trains; one sentence each.

    `config` is the composed configuration. Nothing is loaded; local folders are looked into.
    """
    model = config.actor_rollout_ref.model
    train = config.get("train") or {}
    folder = Path(str(model.path)).expanduser()
    adapter = model.get("lora_adapter_path")
    if model.lora_rank > 0:
        yield from _lora_problems(model, train)
    elif adapter:
        yield (
            f"actor_rollout_ref.model.lora_adapter_path={adapter} with lora_rank=0, where verl "
            "ignores it; set lora_rank to the adapter's rank"
        )
    if adapter:
        yield from adapter_problems(Path(str(adapter)).expanduser(), folder, int(model.lora_rank))


def _lora_problems(model: Any, train: Mapping[str, Any]) -> Iterator[str]:
    chosen = [name for name in ("audio_tower", "projector") if train.get(name, True)]
    if chosen:
        settings = " ".join(f"train.{name}=false" for name in chosen)
        yield (
            f"actor_rollout_ref.model.lora_rank={model.lora_rank} freezes the whole base, and "
            f"{' and '.join(f'train.{name}' for name in chosen)} would train a part of it; set "
            f"{settings}, or lora_rank=0"
        )
    if not (model.get("lora") or {}).get("merge", False):
        yield (
            "LoRA needs actor_rollout_ref.model.lora.merge=true: vLLM gets the merged weights, "
            "because names of separate adapters do not match its Qwen2.5-Omni"
        )
    if model.get("target_parameters") or model.get("exclude_modules"):
        yield (
            "actor_rollout_ref.model.target_parameters and exclude_modules are not supported; name "
            "the language model's layers in target_modules"
        )


def adapter_problems(adapter: Path, base: Path, rank: int) -> Iterator[str]:
    """Why the LoRA adapter in folder `adapter` cannot be continued on the model folder `base`."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            yield f"{adapter} is not a LoRA adapter: it has no {name}"
            return
    from soundmind.model import lora  # which builds on this module

    try:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        lora.scale_of(settings)
    except (ValueError, KeyError) as error:
        yield f"{adapter / 'adapter_config.json'}: {error}"
        return
    if settings["r"] != rank:
        yield f"{adapter} has rank {settings['r']} and lora_rank is {rank}; set it to the same"
    try:
        weights = tensor_shapes(adapter / "adapter_model.safetensors")
        shapes = folder_shapes(base) if base.is_dir() else None
    except WeightFileError as error:
        yield f"{error}; copy or download it again"
        return
    if shapes is None:
        yield (
            f"{adapter} is an adapter for {settings.get('base_model_name_or_path')}, and its base "
            f"is not at {base}; put the complete Qwen2.5-Omni folder there"
        )
        return
    yield from _mismatch(weights, shapes, adapter, base)


def _mismatch(
    weights: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    adapter: Path,
    base: Path,
) -> Iterator[str]:
    """One problem if a matrix of the adapter has no place in the base; the first one is named."""
    for name, shape in sorted(weights.items()):
        module, _, matrix = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
        beside = shapes.get(f"{THINKER_PREFIX}{module}.weight")
        side = 1 if matrix.startswith("A") else 0  # A reads the layer's input, B writes its output
        if beside is None or shape[side] != beside[side]:
            yield (
                f"{adapter} does not belong to {base}: {name} is {shape} beside "
                f"{beside or 'no such layer'}; use the base it was trained on"
            )
            return
