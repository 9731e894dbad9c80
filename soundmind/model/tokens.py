"""Rules about token ids that rollout, trainer, export and evaluation share. No torch, no verl.

* A prompt for the trainer holds one placeholder token per audio embedding (25 a second). A prompt
  for vLLM holds one placeholder per clip, because vLLM expands it itself: given the expanded
  prompt it would expand every placeholder again, without an error (`collapse_placeholders`).
* A response never holds a control token but the one that ends it, nor an id without a token
  (`response_banned_token_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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


def response_end_token_ids(tokenizer: Any, path: str | Path) -> set[int]:
    """Tokens that end a response: the tokenizer's, and those of the folder's generation config.

    vLLM stops at both. `path` is the model's folder or Hub id.
    """
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except OSError:  # no generation_config.json
        declared = None
    ends = [declared] if isinstance(declared, int) else declared or []
    return {tokenizer.eos_token_id, *ends}


def response_banned_token_ids(tokenizer: Any, path: str | Path) -> list[int]:
    """Ids that may not be sampled into a response, in ascending order. [ours]

    * Special tokens but those that end a response. A placeholder in a response would be taken for
      one more clip by the next forward pass, and the other control tokens mean nothing there.
    * Rows of the head without a token: the published tokenizer has 151,665 ids for 151,936 (3B) or
      152,064 (7B) rows. A decoder drops such an id without a word.

    Rollout, trainer and evaluation all ask here, so that what is sampled, trained and graded is one
    distribution. `path` is the model's folder or Hub id.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path))
    rows = getattr(config, "thinker_config", config).get_text_config().vocab_size
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    without_token = set(range(rows)) - set(tokenizer.get_vocab().values())
    return sorted((special - response_end_token_ids(tokenizer, path)) | without_token)
