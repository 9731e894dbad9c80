"""Which models an evaluation can ask, how each wants its prompt, and what its folder must hold.

Qwen2.5-Omni is asked exactly as in training: token ids with one placeholder per clip, the same
banned ids, the same system line. Any other audio model that the installed vLLM serves needs one
line in `ADAPTERS`: the text that stands for a clip in its prompt. Its own chat template and
processor do the rest.

    python -c "from soundmind.eval_models import known_models; print(known_models())"
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.audio import MAX_CLIP_SECONDS
from soundmind.hub import hub_is_reachable
from soundmind.report import start_note
from soundmind.sources import is_hub_id

OMNI = "qwen2_5_omni"
_SAMPLED_BYTES = 1 << 20  # of the start and of the end of a weight file, for its digest


class ModelError(ValueError):
    """A model that cannot be evaluated, with what to do about it."""


@dataclass(frozen=True)
class Adapter:
    """How a family of models is asked. `placeholder` stands for a clip in the prompt's text."""

    name: str
    placeholder: str
    hears_seconds: int | None = None  # what lies beyond is cut by the model's own processor
    takes_system: bool = False  # our system line names Qwen; other families go without one


# By `model_type` of config.json. The placeholders are vLLM's own (a test compares them).
ADAPTERS: dict[str, Adapter] = {
    OMNI: Adapter("Qwen2.5-Omni", "<|audio_bos|><|AUDIO|><|audio_eos|>", takes_system=True),
    "qwen3_omni_moe": Adapter(
        "Qwen3-Omni", "<|audio_start|><|audio_pad|><|audio_end|>", takes_system=True
    ),
    "qwen2_audio": Adapter(
        "Qwen2-Audio", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n", hears_seconds=30
    ),
    "minicpmo": Adapter("MiniCPM-o", "(<audio>./</audio>)"),
    "ultravox": Adapter("Ultravox", "<|audio|>"),
    "phi4mm": Adapter("Phi-4-multimodal", "<|audio_1|>"),
    "gemma3n": Adapter("Gemma 3n", "<audio_soft_token>", hears_seconds=30),
    "granite_speech": Adapter("Granite Speech", "<|audio|>"),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint folder that has been checked."""

    given: str  # as on the command line: a folder or a Hub id
    folder: Path
    model_type: str
    adapter: Adapter
    digest: str
    stand_in: str | None  # what a stand-in owes its numbers to; None for a real model

    @property
    def is_omni(self) -> bool:
        return self.model_type == OMNI


def known_models() -> str:
    """The table of adapters, one model a line."""
    return "\n".join(f"  {key:<16}{adapter.name}" for key, adapter in ADAPTERS.items())


def open_model(given: str, *, speech: bool = False) -> Model:
    """Find, fetch if it is a Hub id, and check a model; ModelError says what is wrong with it."""
    folder = fetch_model(given)
    config = _read_config(folder)
    model_type = str(config.get("model_type"))
    if model_type.endswith("_thinker"):
        raise ModelError(_thinker_only(folder))
    adapter = ADAPTERS.get(model_type)
    if adapter is None:
        raise ModelError(
            f"{folder}: no adapter for model type {model_type!r}. Known are\n{known_models()}\n"
            "Another model that vLLM serves needs one line in soundmind/eval_models.py: the text "
            "that stands for a clip in its prompt."
        )
    if model_type == OMNI:
        check_omni_folder(folder, speech=speech)
    elif speech:
        raise ModelError(
            f"{folder}: speech output is there for Qwen2.5-Omni alone, this is {adapter.name}; "
            "use --output-modality text"
        )
    return Model(given, folder, model_type, adapter, folder_digest(folder), start_note(folder))


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "fsdp_config.json").is_file() or (folder / "actor").is_dir():
            raise ModelError(
                f"{folder} is a training checkpoint (shards of the thinker alone). Make a complete "
                f"folder of it: python -m soundmind.export {folder} --base BASE --output DIR"
            )
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"{folder} holds no config.json, so it is no model folder; found: {found}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; fetch the model again")
    return config


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
    names, absent = weight_names(folder)
    missing += absent
    prefixes = {name.partition(".")[0] for name in names}
    if names and "thinker" not in prefixes:
        raise ModelError(_thinker_only(folder))
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


def _thinker_only(folder: Path) -> str:
    return (
        f"{folder} holds a thinker alone, without talker, vocoder and the complete configuration; "
        "vLLM cannot load it. `python -m soundmind.export CHECKPOINT --base BASE --output DIR` "
        "puts a trained thinker back into a complete Qwen2.5-Omni folder"
    )


def weight_names(folder: Path) -> tuple[set[str], list[str]]:
    """Names of all tensors of a folder, and the weight files that should be there and are not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = [name for name in sorted(set(table.values())) if not (folder / name).is_file()]
        return set(table), absent
    single = folder / "model.safetensors"
    if not single.is_file():
        return set(), ["model.safetensors (or its index and shards)"]
    with single.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(size) if size < single.stat().st_size else b""
    try:
        return set(json.loads(header)) - {"__metadata__"}, []
    except ValueError:
        return set(), ["model.safetensors (what is there is cut short)"]


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits that stand for a model: small files whole, weights by their ends.

    Hashing 22 GB would take minutes; size, first and last MiB of every shard tell checkpoints of
    one run apart, since training moves every weight.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in (".json", ".safetensors", ".jinja", ".pt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            if size > 2 * _SAMPLED_BYTES:
                file.seek(-_SAMPLED_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def clip_limit(adapter: Adapter) -> int:
    """Seconds beyond which a clip is refused; a shorter hearing only cuts, and is reported."""
    return MAX_CLIP_SECONDS if adapter.hears_seconds is None else 10 * MAX_CLIP_SECONDS


def render(model: Model, renderer: Any, messages: list[dict[str, Any]]) -> str:
    """The prompt as text, one placeholder per clip; `renderer` has the chat template.

    Qwen2.5-Omni's template takes typed parts and writes the placeholder itself, as in training.
    Other families get plain strings with their own placeholder in front.
    """
    if not model.is_omni:
        messages = [
            {
                "role": message["role"],
                "content": "".join(
                    model.adapter.placeholder if part["type"] == "audio" else part["text"]
                    for part in message["content"]
                ),
            }
            for message in messages
            if model.adapter.takes_system or message["role"] != "system"
        ]
    text = renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text
