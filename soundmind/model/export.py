"""A training checkpoint and its base joined into a complete Qwen2.5-Omni folder."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.model import checkpoints, lora
from soundmind.model.folder import folder_shapes, weight_faults, weight_files
from soundmind.model.parts import NOT_LOADED, THINKER_PREFIX, part_of
from soundmind.system.errors import UserError
from soundmind.system.files import replace_folder

if TYPE_CHECKING:
    import torch


EXPORT_RECORD = "export.json"
ADAPTER_FOLDER = "adapter"


class ExportError(UserError, ValueError):
    """A checkpoint or base folder that cannot be exported, with what to do about it."""


@dataclass
class TrainedWeights:
    """What a checkpoint holds, by the thinker's own names (`model.layers.0...`)."""

    weights: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)  # under PEFT's names
    settings: dict[str, Any] = field(default_factory=dict)  # PEFT's, of the adapter

    @property
    def matrices(self) -> dict[str, dict[str, str]]:
        """For each adapted weight the names of its matrices in `adapter`."""
        return lora.pairs(self.adapter)


def export(checkpoint: Path, base: Path, output: Path) -> Path:
    """Write the trained thinker of `checkpoint` into a copy of the folder `base`; returns `output`.

    `checkpoint` is a complete `global_step_N` folder. Tensors keep the base's data type. Raises
    `ExportError` if the checkpoint is incomplete, the base is incomplete or another one than was
    trained, or `output` is something else than an earlier export.
    """
    _require_complete(checkpoint)
    _require_base(base, checkpoint)
    _require_free(output, base)
    trained = load_trained(checkpoint / "actor")
    _require_fit(trained, base)

    def fill(folder: Path) -> None:
        used = _write_weights(base, folder, trained)
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        record = {"checkpoint": str(checkpoint), "base": str(base), "thinker_tensors": used}
        if trained.adapter:
            _write_adapter(folder / ADAPTER_FOLDER, base, trained)
            record["adapter"] = ADAPTER_FOLDER
        (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n")

    replace_folder(output, fill)
    return output


def _require_complete(checkpoint: Path) -> None:
    if faults := checkpoints.faults(checkpoint):
        raise ExportError(
            f"{checkpoint.name} is incomplete: {'; '.join(faults[:3])}. Use another step "
            "(--step N), or copy the checkpoint again"
        )


def _require_base(base: Path, checkpoint: Path) -> None:
    """The base is a complete folder, and the one that training started from."""
    if not (base / "config.json").is_file():
        raise ExportError(
            f"{base} is not a complete Qwen2.5-Omni folder (no config.json); name the base that was "
            "trained with --base"
        )
    if faults := weight_faults(base):
        raise ExportError(f"the base is incomplete: {'; '.join(faults[:3])}; download it again")
    wanted = checkpoints.recorded_base(checkpoint)
    if wanted is not None and checkpoints.weights_fingerprint(base) != wanted:
        raise ExportError(
            f"{base} holds other weights than {checkpoint} was trained from; name the base that was "
            "trained with --base"
        )


def _require_free(output: Path, base: Path) -> None:
    """`output` is new, empty, or an earlier export that may be replaced."""
    if output.resolve() == base.resolve():
        raise ExportError(f"{output} is the base itself; choose another --output")
    if output.exists() and any(output.iterdir()) and not (output / EXPORT_RECORD).is_file():
        raise ExportError(
            f"{output} exists and is no export (no {EXPORT_RECORD}); choose another --output"
        )


def load_trained(actor: Path) -> TrainedWeights:
    """A checkpoint's weights, and its LoRA adapter if it has one."""
    state = load_sharded_state(actor)
    adapter = {name: tensor for name, tensor in state.items() if lora.is_adapter(name)}
    if not adapter:
        return TrainedWeights(state)
    settings = actor / lora.ADAPTER_CONFIG
    if not settings.is_file():
        raise ExportError(
            f"{settings} is missing, which says how the adapter is scaled; copy it again"
        )
    weights = {
        lora.base_name(name): tensor for name, tensor in state.items() if name not in adapter
    }
    return TrainedWeights(weights, adapter, json.loads(settings.read_text()))


def _require_fit(trained: TrainedWeights, base: Path) -> None:
    """Every trained tensor has a place of its shape in the base, and none is missing."""
    shapes = {
        name.removeprefix(THINKER_PREFIX): shape
        for name, shape in folder_shapes(base).items()
        if name.startswith(THINKER_PREFIX)
    }
    found = {name: tuple(tensor.shape) for name, tensor in trained.weights.items()}
    for weight, pair in trained.matrices.items():
        rows, columns = trained.adapter[pair["B"]].shape[0], trained.adapter[pair["A"]].shape[1]
        found.setdefault(weight, (rows, columns))
    left = sorted(found.keys() - shapes.keys())
    if left:
        raise ExportError(f"{base} has no place for {len(left)} trained tensors, first {left[0]}")
    for name, shape in found.items():
        if shape != shapes[name]:
            raise ExportError(
                f"{THINKER_PREFIX}{name}: {shape} in the checkpoint, {shapes[name]} in {base}; this "
                "is not the base that was trained"
            )
    lacking = sorted(n for n in shapes.keys() - found.keys() if part_of(n) not in NOT_LOADED)
    if lacking and trained.weights:  # a checkpoint of the adapter alone has no weights at all
        raise ExportError(
            f"{len(lacking)} thinker tensors are not in the checkpoint, first "
            f"{THINKER_PREFIX}{lacking[0]}"
        )


def load_sharded_state(actor: Path) -> dict[str, torch.Tensor]:
    """Full tensors of an FSDP checkpoint, under the names of the module that was trained."""
    import torch
    import torch.distributed.tensor  # lets DTensors be read without running anything

    if not (actor / "fsdp_config.json").is_file():
        raise ExportError(f"{actor} is not an FSDP checkpoint (no fsdp_config.json)")
    ranks = json.loads((actor / "fsdp_config.json").read_text())["world_size"]
    paths = [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ExportError(
            f"{missing[0]} is missing: {len(missing)} of {ranks} shards of the checkpoint are not "
            "there; copy them from the machine that wrote them, or use an earlier step"
        )
    shards = []
    for path in paths:
        try:
            # Nothing in the file is run: a checkpoint may come from somebody else's machine.
            shards.append(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise ExportError(
                f"{path} cannot be read ({error}); copy it again, or use an earlier step"
            ) from error
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


def _write_weights(base: Path, output: Path, trained: TrainedWeights) -> int:
    """Copy the base's weight files with the trained tensors put in; returns how many they are."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    matrices = trained.matrices
    scale = lora.scale_of(trained.settings) if matrices else 0.0
    used = 0
    for path in weight_files(base):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                tensor = file.get_tensor(name)
                own = name.removeprefix(THINKER_PREFIX)
                if name.startswith(THINKER_PREFIX) and matrices:
                    if own in trained.weights:
                        _require_same(name, trained.weights[own], tensor, base)
                    if pair := matrices.get(own):
                        tensor = lora.merge(
                            tensor, trained.adapter[pair["A"]], trained.adapter[pair["B"]], scale
                        )
                        used += 1
                elif name.startswith(THINKER_PREFIX) and own in trained.weights:
                    tensor = trained.weights[own].to(tensor.dtype).contiguous()
                    used += 1
                tensors[name] = tensor
        save_file(tensors, output / path.name, metadata=metadata or {"format": "pt"})
    return used


def _require_same(name: str, kept: torch.Tensor, tensor: torch.Tensor, base: Path) -> None:
    """LoRA leaves the base as it is: a difference means that it is another base."""
    # One of the two may have been rounded to the other's data type.
    if not (kept.to(tensor.dtype).equal(tensor) or tensor.to(kept.dtype).equal(kept)):
        raise ExportError(
            f"{name} in {base} differs from the frozen weight in the checkpoint; this is not the "
            "base that was trained"
        )


def _write_adapter(folder: Path, base: Path, trained: TrainedWeights) -> None:
    """The adapter as PEFT saves one, to be loaded onto the thinker of `base`."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {
        lora.adapter_name(name): tensor.contiguous() for name, tensor in trained.adapter.items()
    }
    save_file(tensors, folder / lora.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = {
        **trained.settings,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
    }
    (folder / lora.ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """`global_step_N` of a run folder: the newest complete one, or that of `step`.

    `run` may be a `global_step_N` folder itself. Raises `ExportError` if there is none.
    """
    if (run / "actor").is_dir():
        return run
    root = run / "checkpoints"
    there = checkpoints.steps(root)
    if not there:
        raise ExportError(
            f"{run} holds no checkpoints/global_step_*; was trainer.save_freq above 0?"
        )
    if step is None:
        step = checkpoints.newest(root)
        if step is None:
            newest = there[max(there)]
            raise ExportError(f"no checkpoint is complete; {checkpoints.faults(newest)[0]}")
    if step not in there:
        raise ExportError(f"{run} has no checkpoint of step {step}; there are {sorted(there)}")
    return there[step]


def base_of(run: Path) -> Path:
    """The base model that a run folder's configuration names."""
    from omegaconf import OmegaConf

    for folder in (run, *run.parents):
        if (folder / "config.yaml").is_file():
            config = OmegaConf.load(folder / "config.yaml")
            return Path(config.actor_rollout_ref.model.path)
    raise ExportError(f"{run}: no config.yaml beside it; name the base model with --base")
