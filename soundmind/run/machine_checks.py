"""What a configuration asks of the machine and of verl's fixed sizes, checked before Ray starts."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from soundmind.planning.disk import RAY_FULL, disk_space, steps_of
from soundmind.planning.plan import host_memory
from soundmind.planning.setup import GB, assumptions, dtype_bytes, training_setup
from soundmind.planning.sizes import SizeError, model_size
from soundmind.system import machine

# verl reserves so many processors a rank (`ResourcePoolManager.max_colocate_count`).
PROCESSORS_A_RANK = 3
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
BUCKET = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
DRIVER = (
    580  # the least major version of NVIDIA's driver that runs CUDA 13, as the GPU set is built
)


def processors_wanted(config: DictConfig) -> int:
    """Processors that verl and TransferQueue reserve on a machine before anything can run.

    A storage unit and the controller take one each, a rank three; what is not there is waited for,
    for ever.
    """
    units = int(config.transfer_queue.backend.SimpleStorage.num_data_storage_units)
    return units + 1 + PROCESSORS_A_RANK * int(config.trainer.n_gpus_per_node)


def processors(config: DictConfig) -> Iterator[str]:
    """Ray has the processors that will be reserved; a cluster's are its own."""
    init = config.ray_kwargs.ray_init
    if init.get("address"):
        return
    wanted, there = processors_wanted(config), int(init.get("num_cpus") or machine.cores())
    if wanted <= there:
        return
    units = int(config.transfer_queue.backend.SimpleStorage.num_data_storage_units)
    fewer = max(1, units - (wanted - there))
    mend = f"{UNITS}={fewer}" if wanted - units + fewer <= there else ""
    count = f"ray_kwargs.ray_init.num_cpus={wanted}, which Ray does not check"
    yield (
        f"{wanted} processors are reserved ({units} storage units, a controller and "
        f"{PROCESSORS_A_RANK} a rank) and there are {there}: the run would wait for ever. Set "
        + (f"{mend}, or {count}" if mend else count)
    )


def weight_bucket(config: DictConfig) -> Iterator[str]:
    """The largest tensor on its way to vLLM fits verl's bucket."""
    bucket = int(config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes)
    try:
        text = model_size(str(config.actor_rollout_ref.model.path)).text
    except SizeError:
        return  # the model's own check says so
    bytes_each = dtype_bytes(config.actor_rollout_ref.actor.fsdp_config.model_dtype)
    needed = math.ceil(text.embedding_parameters * bytes_each / 2**20)
    if needed > bucket:
        yield (
            f"{BUCKET}={bucket}: the embedding table alone has {needed} MiB ({text.vocab:,} x "
            f"{text.hidden} values of {bytes_each} bytes) and goes to vLLM in one piece; set it to at "
            f"least {needed}"
        )


def attention(config: DictConfig) -> Iterator[str]:
    """flash-attention is installed where the configuration runs it."""
    if config.run.device == "cpu" or config.ray_kwargs.ray_init.get("address"):
        return
    model = config.actor_rollout_ref.model
    chosen = model.override_config.get("attn_implementation", "flash_attention_2")
    if chosen != "flash_attention_2" or has_flash_attention():
        return
    yield (
        "flash-attn is not installed (FLASH_ATTN=<folder or address of wheels> bash scripts/setup.sh "
        "gpu). Without it add +actor_rollout_ref.model.override_config.attn_implementation=sdpa "
        "train.share_prompts=true actor_rollout_ref.model.use_remove_padding=false: the same values, "
        "with a mask of length x length a row"
    )


def has_flash_attention() -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec("flash_attn") is not None


def driver(config: DictConfig) -> Iterator[str]:
    """NVIDIA's driver runs the CUDA that the GPU set is built for."""
    if config.run.device == "cpu" or config.ray_kwargs.ray_init.get("address"):
        return
    found = machine.driver_version()
    if found and int(found.split(".")[0]) < DRIVER:
        yield driver_too_old(found)


def driver_too_old(found: str) -> str:
    """The one sentence about a driver that is too old."""
    return (
        f"NVIDIA's driver is {found} and PyTorch 2.11 for CUDA 13 needs {DRIVER} or newer: update the "
        "driver, or take a machine image with CUDA 13"
    )


def host_memory_fits(config: DictConfig) -> Iterator[str]:
    """This process's share of the machine's memory holds what `soundmind.plan` counts for a node."""
    if config.ray_kwargs.ray_init.get("address"):
        return  # the machines are the cluster's
    try:
        setup = training_setup(config, model_size(str(config.actor_rollout_ref.model.path)))
    except SizeError:
        return  # the model's own check says so
    parts, there = host_memory(config, setup, assumptions(config)), machine.memory_bytes()
    if (need := sum(parts.values())) > there:
        largest = sorted(parts, key=lambda name: -parts[name])[:3]
        listed = ", ".join(f"{name} {parts[name] / GB:.0f}" for name in largest)
        yield (
            f"host memory: about {need / GB:.0f} GB are needed ({listed} ...) and this process may use "
            f"{there / GB:.0f} GB. Use a machine or a job with more, fewer ranks, or less offloading "
            "(actor.fsdp_config.param_offload, optimizer_offload)"
        )


def disk_fits(config: DictConfig) -> Iterator[str]:
    """The disks of `run.root` and of Ray's folder hold what `soundmind.plan` counts for the run."""
    try:
        setup = training_setup(config, model_size(str(config.actor_rollout_ref.model.path)))
    except SizeError:
        return  # the model's own check says so
    parts = disk_space(config, setup, assumptions(config), steps_of(config))
    *ours, ray = parts.values()
    root, temporary = existing(Path(str(config.run.root))), existing(Path(ray_folder()))
    same = root.stat().st_dev == temporary.stat().st_dev
    need = sum(ours) + (ray if same else 0) - held_checkpoints(config)
    free = shutil.disk_usage(root).free
    if need > free:
        listed = ", ".join(
            f"{name} {size / GB:.0f}" for name, size in parts.items() if size > GB / 2
        )
        yield (
            f"disk: the run needs about {need / GB:.0f} GB in {root} ({listed}) and {free / GB:.0f} GB "
            "are free. Set run.root to a larger disk, trainer.max_actor_ckpt_to_keep to fewer "
            "checkpoints, or free some space"
        )
    if config.ray_kwargs.ray_init.get("address"):
        return  # the cluster has a folder of its own
    usage = shutil.disk_usage(temporary)
    left = usage.free - (0 if not same else max(0, need - ray))
    if left - ray < (1 - RAY_FULL) * usage.total and need <= free:
        yield (
            f"disk: Ray stops where {temporary}'s disk is {RAY_FULL:.0%} full, and about "
            f"{max(0, left) / GB:.0f} GB of {usage.total / GB:.0f} GB will be free; free some space there"
        )


def ray_folder() -> str:
    """Where Ray's temporary folders go: short, since a socket's path has 107 characters at most."""
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()


def existing(path: Path) -> Path:
    """The nearest folder of `path` that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def held_checkpoints(config: DictConfig) -> int:
    """Bytes of checkpoints that a continued run has on the disk already."""
    named = str(config.run.resume)
    if named == "new":
        return 0
    runs = [Path(named)] if named != "auto" else Path(str(config.run.root)).glob("*/*")
    sizes = [
        sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
        for run in runs
        if named != "auto" or not (run / "summary.json").exists()
    ]
    return max(sizes, default=0)
