"""A GPU and host memory on a machine without a GPU: who mixes them is found out.

PyTorch's fake tensors know devices but hold no values, and this engine reads lengths and offsets
out of its tensors; its CPU build cannot run a backward of fake CUDA tensors either. Here tensors
stay real, and each storage carries a label, `GPU` or `HOST`:

* asking a tensor for its device answers with the label, and `device=` or `.to()` sets it;
* an operation on both raises `DeviceMismatch`, as CUDA would, in forward and backward. What CUDA
  allows is allowed: copies, a host scalar beside GPU tensors, host indices into a GPU tensor;
* FSDP2's own code is trusted; what it gathers is on the GPU, what it keeps is where it was put.

Everything that was not put on the GPU is in host memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
_labels: dict[int, tuple[StorageWeakRef, torch.device]] = {}
_place = HOST  # of what is made out of nothing: the device asked for, or that of a call's tensors


class DeviceMismatch(RuntimeError):
    """An operation on tensors of two devices."""


def plain(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that `tensor` is made of: itself, or those inside a nested or sharded one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    return [leaf for part in inner if isinstance(part, torch.Tensor) for leaf in plain(part)]


def label_of(tensor: torch.Tensor) -> torch.device:
    inner = plain(tensor)[0]
    found = _labels.get(inner.untyped_storage()._cdata)
    return HOST if found is None or found[0].expired() else found[1]


def put(tensor: torch.Tensor, device: torch.device) -> None:
    """Say that `tensor`, with all that shares its memory, lies on `device`."""
    for inner in plain(tensor):
        storage = inner.untyped_storage()
        _labels[storage._cdata] = (StorageWeakRef(storage), device)


def _within_fsdp() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class _Operations(TorchDispatchMode):
    """Checks the labels of every operation and hands them on to its results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in given):
            return NotImplemented  # its own operations on plain tensors come here
        out = func(*args, **kwargs)
        name = func._schema.name
        counted = given[:1] if name in (*_COPIES, *_INDEXED) else given
        places = {label_of(t) for t in counted if t.dim() or label_of(t) == GPU}
        if len(places) > 1 and not _within_fsdp():
            shapes = ", ".join(f"{tuple(t.shape)} on {label_of(t)}" for t in counted)
            raise DeviceMismatch(f"{name}: {shapes}")
        place = (GPU if GPU in places else HOST) if counted else _place
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for leaf in tree_leaves(out):
            fresh = isinstance(leaf, torch.Tensor) and not is_traceable_wrapper_subclass(leaf)
            if fresh and leaf.untyped_storage()._cdata not in known:
                put(leaf, place)
        return out


class _Calls(TorchFunctionMode):
    """Answers for devices, and carries out what names one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            caller = sys._getframe(1).f_code.co_filename
            return HOST if "torch/distributed/" in caller else label_of(args[0])
        global _place
        wanted = [value for value in (*args[1:], kwargs.get("device")) if _is_device(value)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = _place
        if wanted:
            _place = HOST if torch.device(wanted[0]).type == "cpu" else GPU
        else:
            _place = GPU if any(label_of(tensor) == GPU for tensor in given) else HOST
        try:
            if func is torch.Tensor.backward:
                with self:  # layers that are run again for their gradient ask for devices too
                    return torch.autograd.backward(args[0], retain_graph=kwargs["retain_graph"])
            if not wanted:
                return func(*args, **kwargs)
            args = tuple("cpu" if _is_device(value) else value for value in args)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            out = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and label_of(out) != _place:
                out = out.clone() if args and out is args[0] else out
                put(out, _place)
            return out
        finally:
            _place = before


def _is_device(value: Any) -> bool:
    named = isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")
    return named or isinstance(value, torch.device)


@contextmanager
def two_devices() -> Iterator[None]:
    """Within it a GPU exists, as far as labels go, and verl's current device is that GPU."""
    from soundmind.plugin.platform_cpu import PlatformCPU

    unsharded = _fsdp_param.FSDPParam.to_unsharded

    def to_unsharded(self: Any) -> None:
        unsharded(self)
        put(self._unsharded_param, GPU)

    with (
        mock.patch.object(_fsdp_param.FSDPParam, "to_unsharded", to_unsharded),
        mock.patch.object(PlatformCPU, "current_device", lambda self: "cuda:0"),
        _Operations(),
        _Calls(),
    ):
        yield


def place_module(module: torch.nn.Module, weights: torch.device) -> None:
    """Put the shards of `module` on `weights`; what FSDP2 holds gathered and buffers are on the GPU."""
    for parameter in module.parameters():
        put(parameter, weights if is_traceable_wrapper_subclass(parameter) else GPU)
    for buffer in module.buffers():
        put(buffer, GPU)
