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

from soundmind.system.errors import UserError
from soundmind.system.hub import hub_is_reachable, is_hub_id

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


class WeightFileError(UserError, ValueError):
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
    if len(text) < length:
        raise WeightFileError(f"{file} ({size} bytes) is cut short, within its header")
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


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, there or not: those its index names, else the single one.

    What lies beside them, as shards of an earlier download do, belongs to no model.
    """
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return [folder / WEIGHTS]
    try:
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(placed.values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightFileError(f"{index} cannot be read ({error})") from error


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the weight files of `folder`; see `tensor_shapes`."""
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        found.update(tensor_shapes(file))
    return found


def weight_faults(folder: Path) -> list[str]:
    """What is missing or damaged among the weights of `folder`; empty for a complete folder."""
    index, single = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if not index.is_file() and not single.is_file():
        shards = list(folder.glob("model-*.safetensors"))
        if shards:
            return [
                f"{folder} has {len(shards)} shards and no {WEIGHTS_INDEX} that says what is in them"
            ]
        if (folder / "adapter_model.safetensors").is_file():
            return [
                f"{folder} is a LoRA adapter; name its base, and the adapter in lora_adapter_path"
            ]
        return [f"{folder} has no *.safetensors weights: no {WEIGHTS} (or its index and shards)"]
    try:
        files = weight_files(folder)
    except WeightFileError as error:
        return [str(error)]
    faults: list[str] = []
    if single.is_file() and single not in files:
        # transformers would load the one, vLLM the others.
        faults.append(
            f"{single} lies beside {WEIGHTS_INDEX}, which does not name it; remove one of them"
        )
    found: dict[str, set[str]] = {}
    for file in files:
        if not file.is_file():
            continue
        try:
            found[file.name] = set(tensor_shapes(file))
        except WeightFileError as error:
            faults.append(str(error))
            found[file.name] = set()
    damaged = {name for name, names in found.items() if not names}
    partial = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/**/*.incomplete")]
    faults += [f"{path} is a download that has not ended" for path in sorted(partial)]
    if not index.is_file():
        return faults
    placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
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


class ModelError(UserError, ValueError):
    """A model that cannot be evaluated, with what to do about it."""


def fetch_model(given: str) -> Path:
    """The folder itself, or that of a Hub model, downloaded or continued where that stopped."""
    if Path(given).is_dir():
        return Path(given)
    if not is_hub_id(given):
        raise ModelError(f"{given}: no such folder, and not a Hub id of the form organisation/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if not hub_is_reachable():
            return Path(snapshot_download(given, local_files_only=True))
        return Path(snapshot_download(given))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{given}: the Hugging Face Hub cannot be reached and nothing is cached. Fetch it on "
            f"another machine (`hf download {given} --local-dir checkpoints/NAME`) and name the "
            "folder"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"{given}: the Hugging Face Hub answers: {error}") from error


def check_omni_folder(folder: Path, *, speech: bool) -> None:
    """ModelError that names every missing part of a Qwen2.5-Omni folder."""
    has = {entry.name for entry in folder.iterdir() if entry.stat().st_size > 0}
    missing = []
    if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if "tokenizer_config.json" not in has:
        missing.append("tokenizer_config.json")
    if not has & {"preprocessor_config.json", "processor_config.json"}:
        missing.append("preprocessor_config.json")
    faults = weight_faults(folder)
    missing += faults
    names = set() if faults else set(folder_shapes(folder))
    prefixes = {name.partition(".")[0] for name in names}
    if names and "thinker" not in prefixes:
        raise ModelError(thinker_only(folder))
    if speech:
        if "spk_dict.pt" not in has:
            missing.append("spk_dict.pt (the voices)")
        for part, what in (("talker", "text to codec tokens"), ("token2wav", "tokens to sound")):
            if names and part not in prefixes:
                missing.append(f"weights of {part}.* ({what})")
    if missing:
        raise ModelError(
            f"{folder} lacks parts of a complete Qwen2.5-Omni folder: {'; '.join(missing)}. Fetch "
            "it again (`hf download` continues where it stopped), or for a checkpoint of your own "
            "make it with `python -m soundmind.export`"
        )


def thinker_only(folder: Path) -> str:
    return (
        f"{folder} holds a thinker alone, without talker, vocoder and the complete configuration; "
        "vLLM cannot load it. `python -m soundmind.export CHECKPOINT --base BASE --output DIR` "
        "puts a trained thinker back into a complete Qwen2.5-Omni folder"
    )


def start_note(model: Path) -> str | None:
    """What the starting policy owes to supervised learning, for a stand-in; None for other "
    "models."""
    record = model / "warmup.json"
    if not record.is_file():
        return None
    if not json.loads(record.read_text()).get("stages"):
        return "stand-in with random weights"
    return (
        "stand-in: a supervised warm-up taught it to hear and then a bad verdict habit, "
        "which GRPO mends; no result about Qwen2.5-Omni"
    )
