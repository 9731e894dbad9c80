"""Rules about token ids that rollout, trainer, export and evaluation share. No torch, no verl.

* A prompt for the trainer holds one placeholder token per audio embedding (25 a second). A prompt
  for vLLM holds one placeholder per clip, because vLLM expands it itself: given the expanded
  prompt it would expand every placeholder again, without an error (`collapse_placeholders`).
* A response never holds a control token but the one that ends it (`response_banned_token_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BANNED_LOGIT_BIAS = -1e4  # added by the rollout engine; the trainer masks to the same value


def collapse_placeholders(token_ids: Sequence[int], audio_token_id: int) -> list[int]:
    """`token_ids` with every run of placeholder tokens cut to one, the form vLLM expands.

    Safe for adjacent clips: an end and a start token stand between their placeholders.
    """
    return [
        token
        for index, token in enumerate(token_ids)
        if token != audio_token_id or index == 0 or token_ids[index - 1] != audio_token_id
    ]


def response_banned_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Special tokens that may not be sampled into a response, in ascending order. [ours]

    Every special token but those that end a response. A placeholder in a response would be taken
    for one more clip by the next forward pass, and the other control tokens mean nothing there. The
    rollout bans this list by a logit bias and the trainer masks it, so that both are one
    distribution.
    """
    ends = {tokenizer.eos_token_id}
    declared = getattr(generation_config, "eos_token_id", None)
    ends.update([declared] if isinstance(declared, int) else declared or [])
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted((special | set(tokenizer.all_special_ids)) - ends)
