"""What the talker reads of the thinker: one forward pass gives all of it.

    state = last hidden state + input embedding, the embedding zero where a clip is heard

Used by the evaluation on a whole thinker and by training inside the policy's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def combine(
    hidden: torch.Tensor, embeddings: torch.Tensor, input_ids: torch.Tensor, audio_token: int
) -> torch.Tensor:
    """States (..., H) of `hidden` and `embeddings` (..., H) for `input_ids` (...)."""
    return hidden + embeddings.masked_fill((input_ids == audio_token).unsqueeze(-1), 0.0)


@torch.no_grad()
def thinker_states(thinker: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """States (tokens, H) of one row, in the thinker's type.

    `input_ids` (1, tokens) holds the prompt and its response but the last token, which nothing
    reads; `inputs` are the other outputs of the processor, `input_features` and its mask.
    """
    seen: dict[str, torch.Tensor] = {}

    def note(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen["embeddings"], seen["hidden"] = kwargs["inputs_embeds"], output.last_hidden_state

    hook = thinker.model.register_forward_hook(note, with_kwargs=True)
    thinker.rope_deltas = None  # of the row before
    try:
        thinker(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            **inputs,
        )
    finally:
        hook.remove()
    audio_token = thinker.config.audio_token_id
    return combine(seen["hidden"], seen["embeddings"], input_ids, audio_token)[0]


@torch.no_grad()
def mark_embeddings(thinker: Any, voice_start: int, text_marks: tuple[int, int]) -> torch.Tensor:
    """The thinker's embeddings (3, H) of voice start, text end and text pad."""
    table = thinker.get_input_embeddings()
    ids = torch.tensor([voice_start, *text_marks], device=table.weight.device)
    embeddings: torch.Tensor = table(ids)
    return embeddings


@dataclass(frozen=True)
class TalkerInputs:
    """What one answer is spoken from: `prefix` (prompt + 2, H), `reply` (response, H)."""

    prefix: torch.Tensor
    reply: torch.Tensor


def talker_inputs(
    states: torch.Tensor, prompt_length: int, marks: torch.Tensor, codec: torch.Tensor
) -> TalkerInputs | None:
    """Prefix and reply of one row; None for a response of one token, which has nothing to say.

    `states` (prompt + response - 1, H): the last response token is never fed to the thinker and has
    none. `marks` (3, H): the thinker's embeddings of voice start, text end and text pad. `codec`
    (2, H): the talker's embeddings of codec pad and codec begin.
    """
    if len(states) <= prompt_length:
        return None
    prefix = (
        states[:prompt_length],
        marks[:1] + codec[:1],
        states[prompt_length, None] + codec[1:],
    )
    return TalkerInputs(torch.cat(prefix), torch.cat((states[prompt_length + 1 :], marks[1:])))
