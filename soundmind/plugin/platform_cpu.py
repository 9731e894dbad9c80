"""verl's platform for a machine without an accelerator.

verl 0.9.1 has CUDA and NPU platforms and falls back to "nvidia" when it finds neither. This one
makes every rank a CPU process: collectives over gloo, weights handed over by shared memory, and
`GPU` as the name of Ray's resource, because the launcher declares as many of them as there are
ranks (Ray does not check hardware). Memory statistics are zero: there is no device memory.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _device_module() -> types.ModuleType:
    """A module with the members of `torch.cuda` that verl touches, for the CPU."""
    module = types.ModuleType("soundmind_cpu_device")
    for name in ("synchronize", "current_stream", "stream", "Stream", "device_count", "set_device"):
        setattr(module, name, getattr(torch.cpu, name))
    members: dict[str, Any] = {
        "is_available": lambda: False,  # skips verl's device-memory code
        "current_device": lambda: "cpu",
        "get_device_name": lambda *_: "CPU",
        "mem_get_info": lambda *_: (0, 0),
        # verl saves and restores the generator state with every checkpoint.
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }
    for name in (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
    ):
        members[name] = lambda *_, **__: 0
    for name in (
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
    ):
        members[name] = lambda *_, **__: None
    for name, member in members.items():
        setattr(module, name, member)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """CPU ranks over gloo; selected by `VERL_PLATFORM=cpu`, never detected by itself."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never preferred over a real accelerator

    def current_device(self) -> str:
        return "cpu"  # handed to `Tensor.to`

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return (None, None)

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # selects shared memory for the weight transfer

    def cudart(self) -> None:
        return None
