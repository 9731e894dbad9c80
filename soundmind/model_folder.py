"""Is a model folder complete? Read from file names and headers alone, without loading a weight.

A download that broke off leaves a folder that looks like a model: shards missing, a shard cut
short, or partial files beside them. transformers notices inside a worker, minutes after the start,
and an export would copy the fault. `weight_faults` names every such file and the next step.

Only the standard library: a *.safetensors file opens with the length of its header (8 bytes, little
endian), then the header (JSON: name -> dtype, shape, data_offsets), then the tensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

WEIGHTS_INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


class WeightFileError(ValueError):
    """A *.safetensors file that is cut short, empty or something else; the message names it."""


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of one *.safetensors file, which has to be complete.

    Raises `WeightFileError` where the header cannot be read or the file's size differs from what
    its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
        if length > LARGEST_HEADER:
            kind = (
                "a Git LFS pointer" if start.startswith(b"version") else "cut short or no weights"
            )
            raise WeightFileError(f"{file} ({size} bytes) is {kind}")
        text = handle.read(length)
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        data = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightFileError(f"{file} ({size} bytes) has no readable header") from error
    if size != 8 + length + data:
        raise WeightFileError(
            f"{file} has {size:,} bytes and its header says {8 + length + data:,}: it is "
            f"{'cut short' if size < 8 + length + data else 'not what was written'}"
        )
    return shapes


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of every *.safetensors file of `folder`; see `tensor_shapes`."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(tensor_shapes(file))
    return found


def weight_faults(folder: Path) -> list[str]:
    """What is missing or damaged among the weights of `folder`; empty for a complete folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return [f"{folder} has no *.safetensors weights"]
    faults: list[str] = []
    found: dict[str, set[str]] = {}
    for file in files:
        try:
            found[file.name] = set(tensor_shapes(file))
        except WeightFileError as error:
            faults.append(str(error))
            found[file.name] = set()
    damaged = {name for name, names in found.items() if not names}
    partial = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/**/*.incomplete")]
    faults += [f"{path} is a download that has not ended" for path in sorted(partial)]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return faults
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        return [*faults, f"{index} cannot be read ({error})"]
    for name in sorted(set(placed.values()) - set(found)):
        count = sum(file == name for file in placed.values())
        faults.append(f"{folder / name} is missing ({count} tensors of {WEIGHTS_INDEX} lie in it)")
    absent = sorted(
        tensor
        for tensor, name in placed.items()
        if name in found and name not in damaged and tensor not in found[name]
    )
    if absent:
        faults.append(
            f"{folder}: {len(absent)} tensors are not in the file that {WEIGHTS_INDEX} names, "
            f"first {absent[0]}"
        )
    return faults
