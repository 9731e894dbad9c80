"""Turn a training checkpoint into a complete Qwen2.5-Omni folder that transformers and vLLM load.

    python -m soundmind.export outputs/grpo_tiny_cpu/<timestamp>              # last step ->
    .../export python -m soundmind.export outputs/grpo_7b_8gpu/<timestamp> --step 300 --output
    checkpoints/ours

A checkpoint holds the thinker alone, in one shard a rank. The result is the base folder with the
trained thinker in it: weights under the names `thinker.*` in the base's files and data types, and
talker, vocoder, speakers, tokenizer and processor as they were.

(verl's own merger writes a thinker-only folder in bfloat16 without a processor, which vLLM cannot
load.)

Reads   <run>/checkpoints/global_step_N/actor, <run>/config.yaml for the base model
Writes  the output folder, under its name only when complete, with `export.json` saying what went in
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

THINKER_PREFIX = "thinker."
WEIGHTS_INDEX = "model.safetensors.index.json"
RECORD = "export.json"


class ExportError(ValueError):
    """A checkpoint or base folder that cannot be exported, with what to do about it."""


def export(checkpoint: Path, base: Path, output: Path) -> Path:
    """Write the trained thinker of `checkpoint` into a copy of the folder `base`; returns `output`.

    `checkpoint` is a `global_step_N` folder. Tensors keep the base's data type; a trained tensor
    that the base lacks, or one of another shape, is an error, and so is a thinker tensor left
    untrained.
    """
    if not (base / "config.json").is_file():
        raise ExportError(f"{base} is not a complete Qwen2.5-Omni folder (no config.json)")
    trained = load_sharded_state(checkpoint / "actor")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    used = _write_weights(base, partial, trained)
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy2(path, partial / path.name)
    record = {"checkpoint": str(checkpoint), "base": str(base), "thinker_tensors": used}
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)
    return output


def load_sharded_state(actor: Path) -> dict[str, torch.Tensor]:
    """Full tensors of an FSDP checkpoint, by the thinker's own parameter names."""
    import torch

    if not (actor / "fsdp_config.json").is_file():
        raise ExportError(f"{actor} is not an FSDP checkpoint (no fsdp_config.json)")
    ranks = json.loads((actor / "fsdp_config.json").read_text())["world_size"]
    shards = []
    for rank in range(ranks):
        path = actor / f"model_world_size_{ranks}_rank_{rank}.pt"
        if not path.is_file():
            raise ExportError(
                f"{path} is missing: the checkpoint is incomplete, use an earlier step"
            )
        # Our own training wrote this file; DTensors cannot be read with weights_only.
        shards.append(torch.load(path, map_location="cpu", weights_only=False))
    return {name: _join([shard[name] for shard in shards]) for name in shards[0]}


def _join(parts: list[Any]) -> torch.Tensor:
    """One tensor from its shards, one per rank, in rank order."""
    import torch
    from torch.distributed.tensor import DTensor

    first = parts[0]
    if not isinstance(first, DTensor):
        return first
    placement = first.placements[-1]  # the last mesh dimension shards; earlier ones replicate
    size = first.device_mesh.size(first.device_mesh.ndim - 1)
    local = [part.to_local() for part in parts[:size]]
    if placement.is_shard():
        return torch.cat(local, dim=placement.dim).contiguous()
    if placement.is_replicate():
        return local[0]
    raise ExportError(f"cannot join a tensor with placement {placement}")


def _write_weights(base: Path, output: Path, trained: dict[str, torch.Tensor]) -> int:
    """Copy the base's weight files with the thinker replaced; returns how many tensors were "
    "replaced."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{base} holds no *.safetensors weights")
    left = dict(trained)
    untrained: list[str] = []
    used = 0
    for path in files:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                tensor = file.get_tensor(name)
                if name.startswith(THINKER_PREFIX):
                    new = left.pop(name.removeprefix(THINKER_PREFIX), None)
                    if new is None:
                        untrained.append(name)
                    elif new.shape != tensor.shape:
                        raise ExportError(
                            f"{name}: {tuple(new.shape)} in the checkpoint, "
                            f"{tuple(tensor.shape)} in "
                            f"{base}; this is not the base that was trained"
                        )
                    else:
                        tensor = new.to(tensor.dtype).contiguous()
                        used += 1
                tensors[name] = tensor
        save_file(tensors, output / path.name, metadata=metadata or {"format": "pt"})
    if left:
        raise ExportError(f"{base} has no place for {len(left)} trained tensors, first {min(left)}")
    if untrained:
        raise ExportError(
            f"{len(untrained)} thinker tensors are not in the checkpoint, first {untrained[0]}"
        )
    return used


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """`global_step_N` of a run folder (the newest, unless `step` is given), or `run` if it is "
    "one."""
    if (run / "actor").is_dir():
        return run
    folders = {
        int(match.group(1)): path
        for path in (run / "checkpoints").glob("global_step_*")
        if (match := re.fullmatch(r"global_step_(\d+)", path.name)) and (path / "actor").is_dir()
    }
    if not folders:
        raise ExportError(
            f"{run} holds no checkpoints/global_step_*; was trainer.save_freq above 0?"
        )
    if step is not None and step not in folders:
        raise ExportError(f"{run} has no checkpoint of step {step}; there are {sorted(folders)}")
    return folders[max(folders) if step is None else step]


def base_of(run: Path) -> Path:
    """The base model that a run folder's configuration names."""
    from omegaconf import OmegaConf

    for folder in (run, *run.parents):
        if (folder / "config.yaml").is_file():
            config = OmegaConf.load(folder / "config.yaml")
            return Path(config.actor_rollout_ref.model.path)
    raise ExportError(f"{run}: no config.yaml beside it; name the base model with --base")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder, or a global_step_N folder")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--base", type=Path, help="the run's own base model by default")
    parser.add_argument("--output", type=Path, help="<run>/export by default")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = find_checkpoint(arguments.run, arguments.step)
        output = export(
            checkpoint,
            arguments.base or base_of(arguments.run),
            arguments.output or arguments.run / "export",
        )
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint.name} -> {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
