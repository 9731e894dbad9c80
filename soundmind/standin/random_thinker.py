"""Thinkers of given dimensions with random weights, where nothing is downloaded.

For checks and benchmarks that need the published widths (`soundmind.planning.sizes`) at another depth or
vocabulary. A model that can be trained, saved and served, tokenizer included, is `soundmind.tiny`.
"""

from __future__ import annotations

from typing import Any

from soundmind.planning.sizes import OmniSize

# Published ids of the special tokens. A vocabulary without room for them uses its last five.
TOKENS = {
    "video_token_index": 151_656,
    "image_token_index": 151_655,
    "audio_end_token_id": 151_648,
    "audio_start_token_id": 151_647,
    "audio_token_index": 151_646,
}

VISION_HEAD = 80  # width of one head


def random_thinker_config(size: OmniSize) -> Any:
    """transformers' `Qwen2_5OmniThinkerConfig` with the dimensions of `size`. [ours]"""
    from transformers import Qwen2_5OmniThinkerConfig

    text, audio, vision = size.text, size.audio, size.vision
    half = text.head_dim // 2
    side = half * 3 // 8  # published: 16, 24 and 24 of 64
    tokens = TOKENS
    if text.vocab <= max(TOKENS.values()):
        tokens = {name: text.vocab - place for place, name in enumerate(TOKENS, start=1)}
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.intermediate,
            "vocab_size": text.vocab,
            "tie_word_embeddings": text.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [half - 2 * side, side, side],
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
            "num_heads": max(1, vision.hidden // VISION_HEAD),
            "intermediate_size": vision.intermediate,
            "out_hidden_size": vision.output,
        },
        **tokens,
    )


def random_thinker(
    size: OmniSize,
    attention: str = "sdpa",
    *,
    dtype: Any = None,
    device: Any = "cpu",
    seed: int = 0,
) -> Any:
    """transformers' thinker of these dimensions, weights of `dtype` (float32) made on `device`.

    `attention` is transformers' `attn_implementation`, for every part.
    """
    import torch
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            random_thinker_config(size), dtype=dtype or torch.float32, attn_implementation=attention
        )
