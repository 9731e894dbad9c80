"""The policy: Qwen2.5-Omni's thinker with the forward that GRPO training needs. torch, no verl.

`as_policy(thinker)` changes a loaded thinker in place. Against the class of transformers:

* **a silent clip for text**: ranks whose micro-batch has no audio would skip the audio tower and
  issue fewer all-gathers than the others, which deadlocks; they run a few silent frames at
  weight 0;
* **one encoding per clip**: the n rollouts of a prompt carry the same features, so the audio
  tower sees each distinct clip of a micro-batch once, and its output is shared;
* **positions**: verl carries plain positions (L,); the forward expands them to the four rows
  that mark packed sequences. Without vision, M-RoPE is the plain position three times. Four rows
  in transit would crash verl on a batch of equal lengths, where it mistakes the 4 for the
  ragged side;
* **banned tokens**: logits of tokens that rollouts may not sample are masked here too;
* **encoded frames**: `ENCODED_FRAMES` notes what the audio tower really encoded, for FLOPs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from soundmind.tokens import BANNED_LOGIT_BIAS

# Frames of the silent clip: one stride-2 convolution, one stride-2 pooling and a margin.
SILENT_MEL_FRAMES = 16
FINGERPRINT_VALUES = 64  # values compared before whole clips are


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


def same_row_index(
    features: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First occurrence of each distinct clip, and for every clip which of those it equals.

    `features` (num_clips, num_mel_bins, mel_frames), `lengths` (num_clips,) valid frames. Returns
    `first` (num_distinct,) and `inverse` (num_clips,), both int64, such that
    `features[first][inverse]` equals `features`. Compared exactly, value by value.
    """
    num_clips = features.shape[0]
    flat = features.reshape(num_clips, -1)
    # A few values narrow the candidates; equality is then checked on all of them.
    columns = torch.linspace(0, flat.shape[1] - 1, FINGERPRINT_VALUES, device=flat.device).long()
    fingerprints = [tuple(values) for values in flat[:, columns].tolist()]
    firsts: dict[tuple[tuple[float, ...], int], list[int]] = {}
    first: list[int] = []
    inverse: list[int] = []
    for index, key in enumerate(zip(fingerprints, lengths.tolist(), strict=True)):
        for slot in firsts.setdefault(key, []):
            if torch.equal(flat[first[slot]], flat[index]):
                inverse.append(slot)
                break
        else:
            firsts[key].append(len(first))
            inverse.append(len(first))
            first.append(index)
    return (
        torch.tensor(first, device=features.device),
        torch.tensor(inverse, device=features.device),
    )


def packed_position_rows(position_ids: torch.Tensor) -> torch.Tensor:
    """Plain positions (batch, length) -> (4, batch, length): one text row, three M-RoPE rows.

    transformers reads the boundaries of packed sequences from the text row; given two-dimensional
    positions it would let packed sequences attend to one another without a word.
    """
    return position_ids.unsqueeze(0).expand(4, *position_ids.shape)


def policy_class(thinker_class: type) -> type:
    """`thinker_class` with the forward that training needs; see the module's list."""

    class OmniPolicy(thinker_class):
        banned_token_ids: torch.Tensor | None = None

        def get_audio_features(
            self,
            input_features: torch.Tensor,
            feature_attention_mask: torch.Tensor | None = None,
            audio_feature_lengths: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if feature_attention_mask is None:
                raise ValueError("input_features came without feature_attention_mask")
            lengths = feature_attention_mask.sum(-1)
            first, inverse = same_row_index(input_features, lengths)
            ENCODED_FRAMES.add(lengths[first].tolist())
            output = super().get_audio_features(
                input_features[first], feature_attention_mask[first], None, **kwargs
            )
            if len(first) < len(inverse):
                _, tokens = self.audio_tower._get_feat_extract_output_lengths(lengths[first])
                clips = output.last_hidden_state.split(tokens.tolist())
                output.last_hidden_state = torch.cat([clips[slot] for slot in inverse.tolist()])
            return output

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            input_features: torch.Tensor | None = None,
            feature_attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            inputs_embeds: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if input_features is None and inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids) + self._silence()
            elif input_features is not None and input_ids is not None:
                self._check_placeholders(input_ids, feature_attention_mask)
            if position_ids is not None and position_ids.dim() == 2:
                position_ids = packed_position_rows(position_ids)
            output = super().forward(
                input_ids=input_ids,
                input_features=input_features,
                feature_attention_mask=feature_attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
            if self.banned_token_ids is not None:
                banned = self.banned_token_ids.to(output.logits.device)
                output.logits.index_fill_(-1, banned, BANNED_LOGIT_BIAS)
            return output

        def _silence(self) -> torch.Tensor:
            """A zero that depends on every parameter of the audio tower."""
            weight = self.get_input_embeddings().weight
            num_mel_bins = self.config.audio_config.num_mel_bins
            frames = torch.zeros(
                1, num_mel_bins, SILENT_MEL_FRAMES, dtype=weight.dtype, device=weight.device
            )
            mask = torch.ones(1, SILENT_MEL_FRAMES, dtype=torch.long, device=weight.device)
            encoded = self.get_audio_features(frames, mask, return_dict=True)
            return encoded.last_hidden_state.sum() * 0

        def _check_placeholders(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
            """Raise unless there is one placeholder token per audio embedding.

            transformers checks this for images and videos only; for audio it would shift clips.
            """
            if mask is None:
                raise ValueError("input_features came without feature_attention_mask")
            _, tokens = self.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))
            placeholders = int((input_ids == self.config.audio_token_id).sum())
            if placeholders != int(tokens.sum()):
                raise ValueError(
                    f"{placeholders} audio placeholder tokens for {int(tokens.sum())} audio "
                    f"embeddings "
                    f"in a micro-batch of {mask.shape[0]} clips: a prompt was cut, or a response "
                    f"holds "
                    "a placeholder token."
                )

    OmniPolicy.__name__ = f"{thinker_class.__name__}Policy"
    return OmniPolicy


def as_policy(
    thinker: torch.nn.Module, banned_token_ids: list[int] | None = None
) -> torch.nn.Module:
    """Turn a loaded thinker into the policy, in place; returns it."""
    thinker.__class__ = policy_class(type(thinker))
    thinker.banned_token_ids = torch.tensor(banned_token_ids) if banned_token_ids else None
    return thinker
