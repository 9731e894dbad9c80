"""Is SoundMind in charge of this process? One environment variable answers, set by our commands.

The package registers entry points that other people's programs load as well (`verl.plugins`,
`vllm.general_plugins`). Installed but not selected they must change nothing, so each of them asks
here first. The variable is inherited by every process that Ray and vLLM start, and the launcher
also puts it into Ray's runtime environment for other machines of a cluster.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib.metadata import entry_points

SELECTED = "SOUNDMIND_SELECTED"  # "1" in every process of a SoundMind run
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's; whole GiB
IN_ENGINE = "VLLM_ENABLE_V1_MULTIPROCESSING"  # vLLM's; "0" lets the model into the engine's process
PLATFORM = "VERL_PLATFORM"  # verl's own variable; "cpu" selects our CPU platform

# What pyproject.toml registers; another process finds us by these alone.
ENTRY_POINTS = {
    "verl.plugins": "soundmind.plugin.verl_entry:load",
    "vllm.general_plugins": "soundmind.plugin.vllm_entry:register",
    "torch.backends": "soundmind.plugin.torch_entry:load_backend",
}


def stale_installation() -> str | None:
    """What is wrong with the installed entry points, and the mend; None where they are this code's.

    An older version that stays installed beside this one (another checkout on PYTHONPATH, say) would
    send verl's and vLLM's processes to modules that are not there, and both only log that.
    """
    for group, wanted in ENTRY_POINTS.items():
        found = [point.value for point in entry_points(group=group, name="soundmind")]
        if wanted not in found:
            what = f"is {found[0]}, of another version" if found else "is missing"
            return (
                f"the installed soundmind's entry point {group} {what}; this code's is {wanted}. "
                "Install this code: bash scripts/setup.sh, or pip install --no-deps -e ."
            )
    return None


def is_selected() -> bool:
    """True in processes that belong to a SoundMind command."""
    return os.environ.get(SELECTED) == "1"


def is_cpu_platform() -> bool:
    """True where verl has been told to run without an accelerator."""
    return os.environ.get(PLATFORM, "").strip().lower() == "cpu"


# vLLM compiles FlashInfer's sampler at its start, which takes nvcc and ninja; only top-k and top-p
# would use it, and PyTorch's own code does them too.
GPU_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def cpu_environment() -> dict[str, str]:
    """What every process of a run without an accelerator needs, as environment variables."""
    return {
        PLATFORM: "cpu",
        "OMP_NUM_THREADS": "1",  # about ten processes share the cores; spinning threads cost 2-3x
        "MKL_NUM_THREADS": "1",
        KV_CACHE: "1",  # GiB; otherwise a share of the whole host memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding threads of several engines to one core
        # Ray would start a Python process for every CPU it is told of, 80 MB and a second each.
        "RAY_prestart_worker_first_driver": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQ_NUM_THREADS": "1",  # TransferQueue asks for 8 and warns of the difference at every step
        # vLLM's sampler would compile C++ on the fly: needs a compiler and a path without spaces.
        "TORCHDYNAMO_DISABLE": "1",
    }


def select(
    environment: MutableMapping[str, str], *, cpu: bool, training: bool = False
) -> dict[str, str]:
    """Mark `environment` as a SoundMind run; returns what was set, for Ray's runtime environment.

    Values that are already there win, so that a user can tune threads or cache size by hand. In
    `training` vLLM's engine is a process of its own whatever `IN_ENGINE` says, and configs/base/cpu
    has two keys that need other variables than a program that generates by itself: the model inside
    that process, and the size of the cache in bytes, which `KV_CACHE` would overrule in whole GiB.
    """
    wanted = {SELECTED: "1", **(cpu_environment() if cpu else GPU_ENVIRONMENT)}
    if training and cpu:
        wanted[IN_ENGINE] = "0"
        if KV_CACHE not in environment:
            wanted.pop(KV_CACHE)
    for name, value in wanted.items():
        environment.setdefault(name, value)
    environment[SELECTED] = "1"
    if cpu:
        environment[PLATFORM] = "cpu"
    return {name: environment[name] for name in wanted}
