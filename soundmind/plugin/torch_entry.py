"""Lets `import torchvision` succeed beside a CPU-only PyTorch. Runs at `import torch` everywhere.

PyPI's torchvision wheel for Linux x86-64 links CUDA. Beside a CPU-only torch its compiled operators
cannot load, and `import torchvision` itself dies with "operator torchvision::nms does not exist",
because it registers Python kernels for operators that were never declared. transformers imports
torchvision wherever it finds it, and vLLM's Qwen2.5-Omni file needs the image processor behind it.
Nothing here ever calls those operators, so declaring their two schemas is enough.

The `torch.backends` entry-point group is the one hook that runs in every process, spawned vLLM
workers included. Where the pair fits (a CUDA torch, a torchvision from PyTorch's own CPU index,
another operating system or processor) this module does nothing.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# The registration lives as long as this object does.
_library: Any = None


def torchvision_lacks_operators(torch_cuda: str | None) -> bool:
    """True when the installed torchvision is the CUDA wheel and torch has no CUDA "
    "(`torch_cuda`)."""
    if torch_cuda is not None or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        # Wheels from PyTorch's CPU index carry a local version such as 0.28.0+cpu.
        return "+" not in version("torchvision")
    except PackageNotFoundError:
        return False


def load_backend() -> None:
    """Entry point: declare the operator schemas that `import torchvision` expects, if missing."""
    global _library
    import torch

    if _library is not None or not torchvision_lacks_operators(torch.version.cuda):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
