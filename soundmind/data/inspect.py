"""One prepared row as the model gets it: rendered prompt, tokens by kind, the clip as a wav file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soundmind.data.audio import SAMPLE_RATE, Waveform
from soundmind.data.clips import load_clip
from soundmind.data.rows import with_clip
from soundmind.data.statistics import text_table
from soundmind.data.token_count import TokenCounter
from soundmind.system.content import describe_bytes
from soundmind.system.errors import UserError
from soundmind.system.files import replacing
from soundmind.task.schema import DATA_SOURCES

PLACEHOLDER = "<|AUDIO|>"
# Where checkpoints keep their chat template, in the order in which transformers looks.
TEMPLATE_FILES = (
    *("chat_template.jinja", "chat_template.json", "processor_config.json"),
    "tokenizer_config.json",
)


class InspectError(UserError, ValueError):
    """A row or a checkpoint that cannot be shown; the message says why."""


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
    source = (
        model or "the stand-in, which is the published one below a system line; name --model DIR"
    )
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
    clips = sum(part["type"] == "audio" for message in messages for part in message["content"])
    if rendered.count(PLACEHOLDER) != clips:
        raise InspectError(
            f"the chat template of {model} leaves out the clip: {rendered.count(PLACEHOLDER)} of {clips} "
            f"{PLACEHOLDER} in the prompt. Take chat_template.json from the published checkpoint"
        )
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
    for name in TEMPLATE_FILES:
        path = model / name
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
            template = text if path.suffix == ".jinja" else json.loads(text).get("chat_template")
        except (ValueError, AttributeError) as error:
            kind = describe_bytes(path.read_bytes()[:4096])
            raise InspectError(f"{path} cannot be read ({error}): it is {kind}") from error
        if isinstance(template, str):
            return template
    raise InspectError(
        f"{model} holds no chat template (chat_template.jinja, chat_template.json); "
        "--model takes the folder of a complete checkpoint"
    )


def render_prompt(messages: list[dict[str, Any]], template: str) -> str:
    """The prompt as text, as transformers renders it with the generation prompt added."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    try:
        rendered: str = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True
        )
    except (TemplateError, TypeError) as error:
        raise InspectError(f"the chat template cannot be rendered: {error}") from error
    return rendered


def _raise(message: str) -> None:
    raise InspectError(f"chat template: {message}")


def write_clip(
    row: dict[str, Any], folder: Path, load: Callable[[str], Waveform] = load_clip
) -> Path:
    """Write the row's clip as the model hears it, 16 kHz mono, and return the file's name."""
    import soundfile

    info = row["extra_info"]
    folder.mkdir(parents=True, exist_ok=True)
    # A name made of what a file says: nothing in it may lead out of the folder.
    name = re.sub(r"[^\w.-]", "_", f"{info['split']}-{info['id']}")[:100]
    path = folder / f"{name}.wav"
    with replacing(path) as temporary:
        soundfile.write(temporary, load(row["_clip"]), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return path
