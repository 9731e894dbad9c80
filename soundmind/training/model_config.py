"""Model config for Qwen2.5-Omni: the thinker is the policy, the folder on disk stays complete.

Select with `actor_rollout_ref.model._target_: soundmind.training.model_config.OmniModelConfig`. Against
verl's `HFModelConfig` it

* takes the *thinker* part of the full config, the only part that is trained; transformers then
  finds the right class and strips the `thinker.` prefix while loading, and vLLM still gets the full
  folder;
* builds the processor itself, because verl's loader knows a closed list of processors, and for any
  other one prints a warning and goes on with text-only training;
* keeps LoRA within the language model (`soundmind.model.parts.language_model_targets`).

verl's vLLM server does not use this class: it always builds a plain `HFModelConfig`, which is why
the placeholder rules live in the agent loop (`soundmind.training.agent_loop`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from verl.workers.config.engine import FSDPEngineConfig
from verl.workers.config.model import HFModelConfig

from soundmind.model.parts import language_model_targets
from soundmind.model.processor import load_processor
from soundmind.plugin.verl_entry import require_loaded
from soundmind.training import engine  # noqa: F401 - registers the engine for "omni_thinker"

MODEL_TYPE = "omni_thinker"  # verl's key for the engine; `actor_rollout_ref.model.model_type`
THINKER_CLASS = "Qwen2_5OmniThinkerForConditionalGeneration"


def thinker_config(full_config: Any, attn_implementation: str | None) -> Any:
    """The thinker's part of a full Omni config, ready for transformers' automatic class."""
    thinker = getattr(full_config, "thinker_config", None)
    if thinker is None:
        raise ValueError(
            f"model_type {getattr(full_config, 'model_type', None)!r} has no thinker_config: "
            "actor_rollout_ref.model.path must point at a complete Qwen2.5-Omni folder."
        )
    thinker.architectures = [THINKER_CLASS]
    if attn_implementation is not None:
        thinker._attn_implementation = attn_implementation
        for part in (thinker.text_config, thinker.audio_config, thinker.vision_config):
            part._attn_implementation = attn_implementation
    return thinker


@dataclass
class OmniModelConfig(HFModelConfig):
    """verl's model config with the thinker's config and a working processor; see the module."""

    _mutable_fields = HFModelConfig._mutable_fields | {"target_modules"}

    model_type: str = MODEL_TYPE
    hf_config: Any = None

    def __post_init__(self) -> None:
        require_loaded()
        with warnings.catch_warnings():
            # verl's own attempt at the processor fails for this class; the real one follows.
            warnings.filterwarnings("ignore", message="Failed to create processor")
            super().__post_init__()
        if self.use_fused_kernels:
            raise ValueError(
                "actor_rollout_ref.model.use_fused_kernels=True routes verl to a text-only forward "
                "that drops the audio; set it to False."
            )
        self.processor = load_processor(
            self.local_tokenizer_path or self.local_path,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.custom_chat_template,
        )
        # Read by verl where it would handle images and videos; this policy sees neither.
        to_id = self.processor.tokenizer.convert_tokens_to_ids
        self.processor.image_token_id = to_id(self.processor.image_token)
        self.processor.video_token_id = to_id(self.processor.video_token)
        self.hf_config = thinker_config(
            self.hf_config, self.override_config.get("attn_implementation", "flash_attention_2")
        )
        self.architectures = self.hf_config.architectures
        if self.lora_rank > 0:
            self.target_modules: Any = language_model_targets(self.target_modules)


@dataclass
class OmniEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings, and what of a run's `train` block the engines need. [ours]

    Which parts of the thinker are trained besides the language model, and whether a prompt is
    computed once for all of its responses. Set for actor and reference alike.
    """

    train_audio_tower: bool = True
    train_projector: bool = True
    share_prompts: bool = False
