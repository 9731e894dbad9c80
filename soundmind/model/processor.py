"""The Qwen2.5-Omni processor, built or refused. transformers only; no torch model, no verl.

verl's own loader knows a closed list of processors. For any other it prints a warning, returns
None and trains on text alone, which is why every path of ours comes through here.
"""

from __future__ import annotations

import logging
import re
from typing import Any

# transformers measures every id of a published config by the talker's vocabulary, seven lines a start.
_MEASURED_WRONGLY = re.compile(
    r"Model config: (?:tts|vision|audio)_\w+ must be `None` or an integer"
)


def quiet_published_ids() -> None:
    """Keep what transformers says about the ids of every published Qwen2.5-Omni out of the log."""
    logger = logging.getLogger("transformers.configuration_utils")
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return _MEASURED_WRONGLY.search(record.getMessage()) is None


def load_processor(
    path: str, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> Any:
    """The folder's processor with its audio side, or a ValueError that says what is missing.

    `chat_template` takes the place of the folder's own; it renders a clip as one placeholder.
    """
    from transformers import AutoProcessor

    quiet_published_ids()
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ValueError(
            f"{path}: no processor can be built from this folder ({error}). Training without one "
            f"would "
            "silently drop the audio. A complete Qwen2.5-Omni folder holds "
            "preprocessor_config.json "
            "and the tokenizer files: fetch the checkpoint again, or build the stand-in with "
            "`python -m soundmind.tiny`."
        ) from error
    if not hasattr(processor, "feature_extractor") or not hasattr(processor, "audio_token"):
        raise ValueError(
            f"{path}: {type(processor).__name__} has no audio side; SoundMind trains Qwen2.5-Omni. "
            "Check actor_rollout_ref.model.path."
        )
    # Some folders keep the template in tokenizer_config.json alone.
    own = processor.chat_template or processor.tokenizer.chat_template
    processor.chat_template = chat_template or own
    _require_template(path, processor)
    return processor


def _require_template(path: str, processor: Any) -> None:
    """A template that leaves clips out would make a text-only run of it, without a word."""
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "?"}]
    again = "fetch chat_template.json (or .jinja) of the published model again"
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: no prompt can be built by its chat template ({reason}); {again}"
        ) from error
    if (found := text.count(processor.audio_token)) != 1:
        raise ValueError(
            f"{path}: the chat template renders a clip as {found} placeholders {processor.audio_token}, "
            f"not as one, so that the model would not hear it; {again}"
        )


def max_clip_seconds(processor: Any) -> float:
    """Length of the feature extractor's window, in seconds; longer clips do not fit a prompt."""
    extractor = processor.feature_extractor
    return extractor.n_samples / extractor.sampling_rate


# ChatML as published, but without a default system message: the stand-in pays for every token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('expected an audio or text part, got ' ~ part['type']) }}"
    "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
