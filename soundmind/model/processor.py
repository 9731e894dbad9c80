"""The Qwen2.5-Omni processor, built or refused. transformers only; no torch model, no verl.

verl's own loader knows a closed list of processors. For any other it prints a warning, returns
None and trains on text alone, which is why every path of ours comes through here.
"""

from __future__ import annotations

from typing import Any


def load_processor(path: str, *, trust_remote_code: bool = False) -> Any:
    """The folder's processor with its audio side, or a ValueError that says what is missing."""
    from transformers import AutoProcessor

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
    return processor


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
