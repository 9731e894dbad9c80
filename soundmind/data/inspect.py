"""One prepared row as the model gets it: rendered prompt, tokens by kind, the clip as a wav file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soundmind.data.audio import SAMPLE_RATE, Waveform
from soundmind.data.clips import load_clip
from soundmind.data.rows import with_clip
from soundmind.data.statistics import text_table
from soundmind.data.token_count import TokenCounter
from soundmind.task.schema import DATA_SOURCES

PLACEHOLDER = "<|AUDIO|>"


def default_model(row: dict[str, Any]) -> Path | None:
    """The checkpoint folder that belongs to the row's task, where it is at hand."""
    practice = row["data_source"] == DATA_SOURCES["practice"]
    folder = Path("checkpoints/tiny" if practice else "checkpoints/Qwen2.5-Omni-7B")
    return folder if folder.is_dir() else None


def describe_row(row: dict[str, Any], model: Path | None, name: str) -> str:
    """The whole page as text."""
    info = row["extra_info"]
    messages = with_clip(row["prompt"], row["_clip"])
    template = chat_template(model)
    kinds, unit = count_kinds(messages, info, template, model)
    facts = [
        ["id", f"{info['split']}/{info['id']}  (row {info['index']} of {name})"],
        ["mode, source", f"{info['mode']}, {row['data_source']}"],
        ["ground truth", f"{row['reward_model']['ground_truth']}  (label {info['label']})"],
        ["teacher says", info["teacher_verdict"] or "nothing readable"],
        ["question", _seconds(info["question_seconds"]) + f", {info['question_words']} words"],
        [
            "reference",
            f"{_seconds(info['reference_seconds'])}, {info['reference_words']} words, "
            f"{info['reference_tokens'] or 'uncounted'} tokens",
        ],
        ["clip", row["_clip"] or "none in this mode"],
    ]
    counted = text_table(["kind", unit], [*kinds.items(), ("total", sum(kinds.values()))])
    source = model if model is not None else "the published form; pass --model DIR for a checkpoint"
    return "\n".join(
        [
            *(f"{title:<14}{value}" for title, value in facts),
            f"\n--- prompt, by the chat template of {source} ---",
            render_prompt(messages, template),
            f"--- end of prompt ---\n\n{counted}\n",
        ]
    )


def _seconds(seconds: float | None) -> str:
    return "not recorded" if seconds is None else f"{seconds:.2f} s"


def count_kinds(
    messages: list[dict[str, Any]], info: dict[str, Any], template: str, model: Path | None
) -> tuple[dict[str, int], str]:
    """Length of the prompt by kind, and the unit: tokens, or words without a tokenizer.

    Text kinds are counted on their own; `frame` is what is left of the exact total.
    """
    tokenizer_file = model / "tokenizer.json" if model is not None else None
    if tokenizer_file is not None and tokenizer_file.is_file():
        counter = TokenCounter(tokenizer_file)
        unit = "tokens"

        def count(text: str) -> int:
            return counter.count([text])[0]
    else:
        unit = "words (tokens of the clip)"

        def count(text: str) -> int:
            return len(text.split())

    texts = _texts_by_kind(messages)
    kinds = {"clip": info["audio_tokens"]} if info["audio_tokens"] else {}
    kinds.update({kind: count(text) for kind, text in texts.items()})
    rendered = render_prompt(messages, template)
    total = count(rendered) + info["audio_tokens"] - rendered.count(PLACEHOLDER)
    return {**kinds, "frame": total - sum(kinds.values())}, unit


def _texts_by_kind(messages: list[dict[str, Any]]) -> dict[str, str]:
    texts = {}
    if messages[0]["role"] == "system":
        texts["system"] = messages[0]["content"][0]["text"]
    written = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
    if len(written) > 1:
        texts["question"] = written[0]
    texts["instruction"] = written[-1]
    return texts


def chat_template(model: Path | None) -> str:
    """The checkpoint's chat template; the stand-in's, which has the published frame, without."""
    if model is None:
        from soundmind.model.processor import CHAT_TEMPLATE

        return CHAT_TEMPLATE
    if (model / "chat_template.jinja").is_file():
        return (model / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (model / name).is_file():
            template = json.loads((model / name).read_text("utf-8")).get("chat_template")
            if isinstance(template, str):
                return template
    raise FileNotFoundError(
        f"{model} holds no chat template (chat_template.jinja, chat_template.json); "
        "--model takes the folder of a complete checkpoint"
    )


def render_prompt(messages: list[dict[str, Any]], template: str) -> str:
    """The prompt as text, as transformers renders it with the generation prompt added."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    rendered: str = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True
    )
    return rendered


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")


def write_clip(
    row: dict[str, Any], folder: Path, load: Callable[[str], Waveform] = load_clip
) -> Path:
    """Write the row's clip as the model hears it, 16 kHz mono, and return the file's name."""
    import soundfile

    info = row["extra_info"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{info['split']}-{info['id']}.wav"
    temporary = folder / f".{path.name}.tmp"
    soundfile.write(temporary, load(row["_clip"]), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    os.replace(temporary, path)
    return path
