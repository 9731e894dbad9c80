"""Thinkers of any dimensions, without a folder."""

from __future__ import annotations

from typing import Any

from soundmind import sizes

AUDIO_TOKEN = 7  # low, so that the vocabulary may be small


def thinker_config(size: sizes.OmniSize, attention: str = "sdpa") -> Any:
    """transformers' configuration with the dimensions of `size`."""
    from transformers import Qwen2_5OmniThinkerConfig

    text, audio, vision = size.text, size.audio, size.vision
    half = text.head_dim // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config = Qwen2_5OmniThinkerConfig(
        audio_token_index=AUDIO_TOKEN,
        text_config={
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.intermediate,
            "vocab_size": text.vocab,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": sections,
            },
        },
        audio_config={
            "d_model": audio.width,
            "encoder_layers": audio.layers,
            "encoder_attention_heads": audio.heads,
            "encoder_ffn_dim": audio.ffn,
            "output_dim": audio.output,
            "num_mel_bins": audio.mel_bins,
            "n_window": audio.n_window,
        },
        vision_config={
            "hidden_size": vision.hidden,
            "depth": vision.layers,
            "intermediate_size": vision.intermediate,
            "out_hidden_size": vision.output,
        },
    )
    config._attn_implementation = attention
    for part in (config.text_config, config.audio_config, config.vision_config):
        part._attn_implementation = attention
    return config


def random_thinker(size: sizes.OmniSize, attention: str = "sdpa") -> Any:
    """A thinker of these dimensions with random weights in fp32."""
    import torch
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(size, attention)).float()
