"""The policy: Qwen2.5-Omni's thinker with the forward that GRPO training needs. torch, no verl.

`as_policy(thinker)` changes a loaded thinker in place. Against the class of transformers:

* **a silent clip for text**: ranks whose micro-batch has no audio would skip the audio tower and
  issue fewer all-gathers than the others, which deadlocks; they run a few silent frames at
  weight 0;
* **one encoding per clip**: the n rollouts of a prompt share a clip, so the audio tower sees
  each distinct clip of a micro-batch once, and `clip_index` says who heard which;
* **positions**: verl carries plain positions (L,); the forward expands them to the four rows
  that mark packed sequences. Without vision, M-RoPE is the plain position three times. Four rows
  in transit would crash verl on a batch of equal lengths, where it mistakes the 4 for the
  ragged side;
* **logits where they are wanted**: at `logit_positions` only, if given;
* **banned tokens**: logits of tokens that rollouts may not sample are masked here too;
* **encoded frames**: `ENCODED_FRAMES` notes what the audio tower really encoded, for FLOPs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from soundmind.model.tokens import BANNED_LOGIT_BIAS

# Frames of the silent clip: one stride-2 convolution, one stride-2 pooling and a margin.
SILENT_MEL_FRAMES = 16


class EncodedFrames:
    """Mel frames of every clip that the audio tower encoded, until somebody takes them.

    One per process (`ENCODED_FRAMES`). A clip shared by several rows of a micro-batch counts once,
    forward-only passes count, the silent clip of a text batch counts, and layers that gradient
    checkpointing runs again do not.
    """

    def __init__(self) -> None:
        self._frames: list[int] = []
        self._lock = threading.Lock()

    def add(self, lengths: Iterable[int]) -> None:
        """Note clips by their valid mel frames, before the tower's convolutions."""
        with self._lock:
            self._frames.extend(int(length) for length in lengths)

    def take(self) -> list[int]:
        """Mel frames of each clip encoded since the last take, in order."""
        with self._lock:
            taken, self._frames = self._frames, []
        return taken


ENCODED_FRAMES = EncodedFrames()


def packed_position_rows(position_ids: torch.Tensor) -> torch.Tensor:
    """Plain positions (batch, length) -> (4, batch, length): one text row, three M-RoPE rows.

    transformers reads the boundaries of packed sequences from the text row; given two-dimensional
    positions it would let packed sequences attend to one another without a word.
    """
    return position_ids.unsqueeze(0).expand(4, *position_ids.shape)


def dense_mask(mask: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """`mask` (batch, 1, length, length) bool, true where a token sees another, as `attention` takes it.

    transformers hands a mask of four dimensions on as it is. sdpa reads true and false; eager *adds*
    what it gets, so that true and false would let every token see every other. Raises ValueError
    for an attention that takes no such mask.
    """
    if attention == "sdpa":
        return mask
    if attention == "eager":
        hidden = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)
    raise ValueError(
        f"attn_implementation={attention} takes no dense mask, which sharing prompts needs; use sdpa, "
        "or set train.share_prompts=false"
    )


def policy_class(thinker_class: type) -> type:
    """`thinker_class` with the forward that training needs; see the module's list."""

    class OmniPolicy(thinker_class):
        banned_token_ids: torch.Tensor | None = None

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            input_features: torch.Tensor | None = None,
            feature_attention_mask: torch.Tensor | None = None,
            clip_index: torch.Tensor | None = None,
            logit_positions: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            inputs_embeds: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            """Logits over the vocabulary, as the thinker's own forward.

            `input_features` (clips, mel bins, mel frames) and `feature_attention_mask`
            (clips, mel frames) are the clips to encode. `clip_index` (clips heard,) int64 names,
            in the order of the placeholders in `input_ids`, the clip that is heard; without it
            each clip is heard once, in order. `logit_positions` (positions,) int64, in the rows of
            `input_ids` laid end to end, makes the logits (1, positions, vocabulary).
            """
            # B rows of L tokens, C distinct clips, T audio tokens heard, D hidden size, N positions
            # wanted, V rows of the head.
            # 1. Embeddings, (B, L, D): text from the table, sound from the tower, (T, D).
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                if input_features is None:
                    self._placeholders(input_ids, 0)
                    inputs_embeds = inputs_embeds + self._silence(inputs_embeds)
                else:
                    if feature_attention_mask is None:
                        raise ValueError("input_features came without feature_attention_mask")
                    audio = self._encode_clips(input_features, feature_attention_mask, clip_index)
                    if clip_index is not None:
                        feature_attention_mask = feature_attention_mask[clip_index]
                    heard = self._placeholders(input_ids, len(audio))
                    inputs_embeds = inputs_embeds.masked_scatter(
                        heard.unsqueeze(-1), audio.to(inputs_embeds.dtype)
                    )
            # 2. Positions (B, L) -> (4, B, L), and a mask (B, 1, L, L) in the attention's own form.
            if position_ids is not None and position_ids.dim() == 2:
                position_ids = packed_position_rows(position_ids)
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 4:
                attention = self.model.config._attn_implementation
                kwargs["attention_mask"] = dense_mask(mask, attention, inputs_embeds.dtype)
            # 3. Logits, (B, L, V), or (1, N, V) where they are wanted.
            if logit_positions is None:
                output = super().forward(
                    input_ids=input_ids,
                    feature_attention_mask=feature_attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    **kwargs,
                )
            else:
                hidden = self.model(
                    position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
                ).last_hidden_state
                # A batch dimension before the head, not after it: FSDP2 hooks the tensor that leaves
                # the root, and the engine divides it by the temperature in place. On a view the
                # hook would be lost.
                wanted = hidden.flatten(0, 1)[logit_positions].unsqueeze(0)
                output = CausalLMOutputWithPast(logits=self.lm_head(wanted))
            # 4. What a rollout may not sample has no probability here either.
            if self.banned_token_ids is not None:
                banned = self.banned_token_ids.to(output.logits.device)
                output.logits.index_fill_(-1, banned, BANNED_LOGIT_BIAS)
            return output

        def _encode_clips(
            self, features: torch.Tensor, mask: torch.Tensor, clip_index: torch.Tensor | None
        ) -> torch.Tensor:
            """Audio embeddings (tokens heard, hidden size), each clip encoded once."""
            lengths = mask.sum(-1)
            ENCODED_FRAMES.add(lengths.tolist())
            encoded = self.get_audio_features(features, mask, return_dict=True).last_hidden_state
            if clip_index is None:
                return encoded
            _, tokens = self.audio_tower._get_feat_extract_output_lengths(lengths)
            clips = encoded.split(tokens.tolist())
            return torch.cat([clips[clip] for clip in clip_index.tolist()])

        def _silence(self, beside: torch.Tensor) -> torch.Tensor:
            """A zero that depends on every parameter of the audio tower.

            A frozen tower runs as well: its layers' all-gathers have to match the other ranks'. Device
            and type are those of the activation `beside` it: a weight may be back in host memory by
            now, which is where FSDP2 keeps a separate reference.
            """
            shape = (1, self.config.audio_config.num_mel_bins, SILENT_MEL_FRAMES)
            frames = beside.new_zeros(shape)
            mask = torch.ones(1, SILENT_MEL_FRAMES, dtype=torch.long, device=beside.device)
            return self._encode_clips(frames, mask, None).sum() * 0

        def _placeholders(self, input_ids: torch.Tensor, embeddings: int) -> torch.Tensor:
            """Where the audio placeholders are, (batch, length) bool.

            Raises `ValueError` unless there is one for each of so many audio embeddings:
            transformers checks this for images and videos only; for audio it would shift clips.
            """
            heard = input_ids == self.config.audio_token_id
            placeholders = int(heard.sum())
            if placeholders != embeddings:
                raise ValueError(
                    f"{placeholders} audio placeholder tokens for {embeddings} audio embeddings "
                    "in a micro-batch: a prompt was cut, its clip did not arrive, or a response "
                    "holds a placeholder token."
                )
            return heard

    OmniPolicy.__name__ = f"{thinker_class.__name__}Policy"
    return OmniPolicy


def as_policy(
    thinker: torch.nn.Module, banned_token_ids: list[int] | None = None
) -> torch.nn.Module:
    """Turn a loaded thinker into the policy, in place; returns it."""
    thinker.__class__ = policy_class(type(thinker))
    thinker.banned_token_ids = torch.tensor(banned_token_ids) if banned_token_ids else None
    return thinker
