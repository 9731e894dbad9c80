"""What a Qwen2.5-Omni folder consists of, and which of it a run trains.

    language model   embeddings, layers, head           trained, or frozen under a LoRA adapter
    projector        the audio tower's last layer       train.projector
    audio tower      the rest of the ears               train.audio_tower
    vision           images and videos                  never loaded; exports take it from the base
    talker, vocoder  speech                             never loaded; exports take them from the base

verl trains whatever has a gradient and reads none of its own freezing flags; here the choice is two
keys, and a table of it is printed at every start. [ours]

Reads   a model folder's `*.safetensors` headers: names and shapes, no weights, no torch
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.model.folder import folder_shapes

PARTS = ("language_model", "projector", "audio_tower", "vision", "talker", "vocoder")
NOT_LOADED = ("vision", "talker", "vocoder")
THINKER_PREFIX = "thinker."
ADAPTER_PREFIX = "base_model.model."  # what PEFT puts before every name of the model it wraps

# First match counts; names without `thinker.`.
_PREFIXES = (
    ("audio_tower.proj.", "projector"),
    ("audio_tower.", "audio_tower"),
    ("visual.", "vision"),
    ("talker.", "talker"),
    ("token2wav.", "vocoder"),
    ("model.", "language_model"),
    ("lm_head.", "language_model"),
)
# Linear layers of the language model by their names in the thinker. The audio tower's layers have
# `q_proj`, `k_proj` and `v_proj` too, so PEFT's `all-linear` or a plain list would reach into it.
LANGUAGE_MODEL_LINEARS = (
    r"model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
)


def part_of(name: str) -> str:
    """Part that a tensor belongs to, one of `PARTS`.

    `name` as in a complete folder (`thinker.audio_tower.proj.weight`), in the thinker alone
    (`audio_tower.proj.weight`), or in the thinker under a PEFT adapter. Raises ValueError for a
    name that is in none of them.
    """
    bare = name.removeprefix(ADAPTER_PREFIX).removeprefix(THINKER_PREFIX)
    for prefix, part in _PREFIXES:
        if bare.startswith(prefix):
            return part
    raise ValueError(f"tensor {name!r} belongs to no part of Qwen2.5-Omni")


def trained_parts(train: Mapping[str, Any], lora_rank: int = 0) -> frozenset[str]:
    """Parts whose own weights are trained under the settings `train` (`audio_tower`, `projector`).

    Empty with LoRA: the adapter is trained, and no weight of the base is. [ours]
    """
    if lora_rank > 0:
        return frozenset()
    tower = bool(train.get("audio_tower", True))
    chosen = {
        "language_model": True,
        "projector": bool(train.get("projector", tower)),
        "audio_tower": tower,
    }
    return frozenset(part for part, wanted in chosen.items() if wanted)


@dataclass(frozen=True)
class TableLine:
    """A line of the table: parameters of a part in the base, and how many values are trained."""

    part: str
    parameters: int
    trained: int
    state: str  # "trained", "frozen", "LoRA rank N", "not loaded"


def rows(
    folder: Path, train: Mapping[str, Any], lora_rank: int = 0, target_modules: Any = "all-linear"
) -> list[TableLine]:
    """The table's lines for a complete model folder, from headers alone; parts it lacks left out.

    `train` has `audio_tower` and `projector`; `lora_rank` and `target_modules` are verl's keys.
    """
    shapes = folder_shapes(folder)
    parameters: Counter[str] = Counter()
    for name, shape in shapes.items():
        parameters[part_of(name)] += math.prod(shape)
    adapter = 0
    if lora_rank > 0:
        adapter = sum(
            lora_rank * sum(shapes[name]) for name in _adapted_weights(shapes, target_modules)
        )
    return table_rows(parameters, trained_parts(train, lora_rank), lora_rank, adapter)


def _adapted_weights(names: Iterable[str], target_modules: Any) -> Iterator[str]:
    """Weights of a complete folder that an adapter with these targets stands beside."""
    targets = re.compile(language_model_targets(target_modules))
    for name in names:
        module, _, kind = name.removeprefix(THINKER_PREFIX).rpartition(".")
        if name.startswith(THINKER_PREFIX) and kind == "weight" and targets.fullmatch(module):
            yield name


def table_rows(
    parameters: Mapping[str, int], trained: Iterable[str], lora_rank: int = 0, adapter: int = 0
) -> list[TableLine]:
    """Lines from parameters by part and the parts that are trained, in the order of `PARTS`."""
    trained = set(trained)
    found = []
    for part in PARTS:
        count = parameters.get(part, 0)
        if not count:
            continue
        if part in NOT_LOADED:
            found.append(TableLine(part, count, 0, "not loaded"))
        elif lora_rank > 0 and part == "language_model":
            found.append(TableLine(part, count, adapter, f"LoRA rank {lora_rank}"))
        elif part in trained:
            found.append(TableLine(part, count, count, "trained"))
        else:
            found.append(TableLine(part, count, 0, "frozen"))
    return found


def format_table(lines: Iterable[TableLine]) -> str:
    """The table as text, with a last line of sums."""
    lines = list(lines)
    total = TableLine(
        "total", sum(row.parameters for row in lines), sum(row.trained for row in lines), ""
    )
    cells = [("part", "parameters", "trained", "state")]
    cells += [
        (row.part.replace("_", " "), f"{row.parameters:,}", f"{row.trained:,}", row.state)
        for row in [*lines, total]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        f"{part:<{widths[0]}}  {count:>{widths[1]}}  {trained:>{widths[2]}}  {state}".rstrip()
        for part, count, trained, state in cells
    )


def language_model_targets(target_modules: Any) -> str:
    """A LoRA target for PEFT that can only hit the language model.

    `all-linear` (verl's default) becomes every linear layer of its decoder layers; a list of names
    becomes those names inside its decoder layers; a pattern is kept as it is, and whether it leaves
    the language model is seen when the adapter has been built. [ours]
    """
    if target_modules is None or target_modules == "all-linear":
        return LANGUAGE_MODEL_LINEARS
    if isinstance(target_modules, str):
        return target_modules
    names = "|".join(re.escape(str(name)) for name in target_modules)
    return rf"model\.layers\.\d+\.(?:.*\.)?(?:{names})"
