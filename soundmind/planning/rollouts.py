"""Memory of vLLM's rollouts, as arithmetic. No torch needed. Bytes everywhere."""

from __future__ import annotations

from soundmind.planning.memory import FP32, shard
from soundmind.planning.sizes import OmniSize, TextSize


def kv_bytes_per_token(text: TextSize, cache_bytes: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return 2 * text.layers * text.kv_width * cache_bytes


def rollout_weights(size: OmniSize, ranks: int = 1, bytes_per_value: int = 2) -> int:
    """vLLM's weights on one of `ranks` tensor-parallel GPUs: thinker without vision."""
    audio = size.audio.tower_parameters + size.audio.projector_parameters
    return shard(size.text.parameters + audio, ranks) * bytes_per_value


def rollout_activations(size: OmniSize, batched_tokens: int, sequences: int) -> int:
    """vLLM's largest working set: one layer of a full batch of tokens, and logits in fp32.

    Logits are for one position a sequence, twice: as computed and as processed for sampling.
    """
    text = size.text
    layer = batched_tokens * (2 * text.intermediate + 4 * text.hidden) * 2
    return layer + 2 * sequences * text.vocab * FP32
