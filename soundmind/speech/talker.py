"""The talker: states of the thinker in, codec tokens out, many rows at once. torch, no verl.

    states = last hidden state + input embedding of every token, audio embeddings zeroed
    prefix   states of the prompt, voice + codec pad, first state of the reply + codec begin
    reply    one state a step: the rest of the reply, then text end, then text pad for good

This is what transformers' `generate` does for one row, with its codes: greedy in float32 they are
identical, for any batch and order (tests/speech/test_talker.py). What differs:

* One forward pass of the thinker over prompt and response gives all states; nothing is generated.
* Rows are prefilled one by one and then share every step (`decoding`); the next row takes the place
  of one that has ended.
* Each row draws from a generator of its own, so that it says the same in any batch, in any order
  and after a kill. In bfloat16 logits differ a little by batch, so there this is no promise.

The talker is frozen: it belongs to the reward, not to the policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from soundmind.model.folder import ModelError
from soundmind.speech.decoding import (
    BLOCK,
    SAID_NOTHING,
    Batch,
    Codes,
    SpeechSettings,
    SpokenRow,
    attend,
)
from soundmind.speech.states import TalkerInputs, talker_inputs
from soundmind.speech.weights import load_part

MOST_ROWS = 64  # spoken at once
FREE_SHARE = 0.6  # of free memory for caches; growing one copies it
ATTENTION = "soundmind_talker"


class Unspeakable(ValueError):
    """A row that the talker cannot speak; a matter of this row alone."""


class Talker:
    """The talker of a complete Qwen2.5-Omni folder; frozen."""

    def __init__(
        self, folder: Path, device: Any = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import AttentionInterface, AutoConfig
        from transformers.initialization import no_init_weights
        from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
            Qwen2_5OmniTalkerForConditionalGeneration as TalkerModel,
        )

        AttentionInterface.register(ATTENTION, attend)
        config = AutoConfig.from_pretrained(folder).talker_config
        if "sliding_attention" in config.layer_types:
            raise ModelError(f"{folder}: a talker with sliding attention is not supported")
        with no_init_weights():
            model: Any = TalkerModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
        load_part(model, folder, "talker.")
        model.config._attn_implementation = ATTENTION
        self.model = model.eval().requires_grad_(False).to(device)
        self.max_positions = int(config.max_position_embeddings)
        self.step_seconds = 0.0  # of the last call: wall time of its steps, by step
        self.rows_at_once = 0  # of the last call
        # `generate` ends at either of two marks.
        self.ends = (model.codec_pad_token, model.codec_eos_token)

    @property
    def device(self) -> torch.device:
        return self.model.codec_head.weight.device

    @property
    def mark_ids(self) -> tuple[int, int]:
        """Text end and text pad, as tokens of the thinker."""
        return self.model.text_eos_token, self.model.text_pad_token

    def to(self, device: Any) -> None:
        """Move the weights, between host and card."""
        self.model.to(device)

    def rows_that_fit(self, columns: int) -> int:
        """Answers spoken at once whose caches of so many positions fit beside what is there."""
        if self.device.type != "cuda":
            return MOST_ROWS
        config, weight = self.model.config, self.model.codec_head.weight
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        row = 2 * width * weight.element_size() * min(columns, self.max_positions)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(MOST_ROWS, int(FREE_SHARE * free / row)))

    def inputs(
        self, states: torch.Tensor, prompt_length: int, marks: torch.Tensor
    ) -> TalkerInputs | None:
        """`talker_inputs` of one row; Unspeakable where it cannot be spoken."""
        if not bool(torch.isfinite(states).all()):
            raise Unspeakable("the thinker's states are not finite")
        if prompt_length + 2 >= self.max_positions:
            raise Unspeakable(
                f"a prompt of {prompt_length} tokens leaves none of the talker's "
                f"{self.max_positions} positions to speak in"
            )
        marked = (self.model.codec_pad_token, self.model.codec_bos_token)
        codec = self.model.get_input_embeddings().weight[list(marked)]
        return talker_inputs(states, prompt_length, marks, codec.to(states.device))

    @torch.no_grad()
    def speak(
        self,
        inputs: Sequence[TalkerInputs | None],
        seeds: Sequence[int],
        settings: SpeechSettings,
        rows: int = 32,
    ) -> list[Codes]:
        """Codec tokens of every row, at most `rows` at once; halves them when memory runs out.

        Raises `torch.OutOfMemoryError` if a single row does not fit.
        """
        found: dict[int, Codes] = {
            index: SAID_NOTHING for index, row in enumerate(inputs) if row is None
        }
        self.rows_at_once = max(1, min(rows, len(inputs) - len(found)))
        while len(found) < len(inputs):
            try:
                self._speak(inputs, seeds, settings, found)
            except torch.OutOfMemoryError:
                if self.rows_at_once == 1:
                    raise
                self.rows_at_once //= 2
                print(f"out of memory; {self.rows_at_once} answers spoken at once", flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return [found[index] for index in range(len(inputs))]

    def _speak(
        self,
        inputs: Sequence[TalkerInputs | None],
        seeds: Sequence[int],
        settings: SpeechSettings,
        found: dict[int, Codes],
    ) -> None:
        # Long ones first: the last to end then are short.
        waiting = deque(
            sorted(
                (index for index in range(len(inputs)) if index not in found),
                key=lambda index: -len(inputs[index].reply),  # type: ignore[union-attr]
            )
        )
        longest = max(len(inputs[index].reply) for index in waiting)  # type: ignore[union-attr]
        batch = Batch(self.model, settings, min(self.rows_at_once, len(waiting)), longest)
        rows: list[SpokenRow | None] = [None] * batch.size
        steps, started = 0, time.monotonic()
        while True:
            for slot, row in enumerate(rows):
                if row is None and waiting:
                    index = waiting.popleft()
                    entry = inputs[index]
                    assert entry is not None
                    room = self.max_positions - len(entry.prefix)
                    limit = min(settings.max_codes, room)
                    rows[slot] = SpokenRow(index, seeds[index], limit, room < settings.max_codes)
                    batch.begin(slot, entry)
            alive = [slot for slot, row in enumerate(rows) if row is not None]
            if not alive:
                break
            if 2 * len(alive) <= batch.size:
                batch.keep(alive)
                rows = [rows[slot] for slot in alive]
            tokens = batch.block([row.generator if row else None for row in rows])
            steps += BLOCK
            for slot, row in enumerate(rows):
                if row is not None and row.add(tokens[slot], self.ends):
                    found[row.index] = row.codes
                    rows[slot] = None
                    batch.rest(slot)
        self.step_seconds = (time.monotonic() - started) / max(1, steps)
