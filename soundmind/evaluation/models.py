"""Which models an evaluation can ask, how each wants its prompt, and what its folder must hold.

Qwen2.5-Omni is asked exactly as in training: token ids with one placeholder per clip, the same
banned ids, the same system line. Any other audio model that the installed vLLM serves needs one
line in `ADAPTERS`: the text that stands for a clip in its prompt. Its own chat template and
processor do the rest.

    python -c "from soundmind.evaluation.models import known_models; print(known_models())"
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.data.audio import MAX_CLIP_SECONDS
from soundmind.model.folder import (
    ModelError,
    check_omni_folder,
    fetch_model,
    start_note,
    thinker_only,
)
from soundmind.system.digests import folder_digest

OMNI = "qwen2_5_omni"


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
        raise ModelError(thinker_only(folder))
    adapter = ADAPTERS.get(model_type)
    if adapter is None:
        raise ModelError(
            f"{folder}: no adapter for model type {model_type!r}. Known are\n{known_models()}\n"
            "Another model that vLLM serves needs one line in soundmind/evaluation/models.py: the text "
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
