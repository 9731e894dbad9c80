"""Steps of the talker that many rows share: sampling, cache, attention, and a CUDA graph of a step.

Each row has its own columns in the cache, and its position is its column, so nothing is padded.
Attention of a step reads each cached key once; the sdpa of transformers would first copy it for every
query head of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from soundmind.speech.states import TalkerInputs

CODES_PER_SECOND = 50  # two mel frames of 10 ms each
BLOCK = 16  # steps between two looks at which rows have ended


@dataclass(frozen=True)
class SpeechSettings:
    """How the talker samples; defaults as published. `temperature` 0 is greedy."""

    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    max_seconds: float = 600.0
    cuda_graphs: bool = True

    @property
    def max_codes(self) -> int:
        """Codec tokens of the longest answer."""
        return int(self.max_seconds * CODES_PER_SECOND)


@dataclass(frozen=True)
class Codes:
    """Codec tokens of one answer, without the end token.

    `ended` is False for one that was cut; `short_of_positions` says that it was cut because the
    talker has no position beyond, not at `max_seconds`.
    """

    tokens: tuple[int, ...]
    ended: bool
    short_of_positions: bool = False


SAID_NOTHING = Codes((), True)


class SpokenRow:
    """One answer under way, on the host."""

    def __init__(self, index: int, seed: int, limit: int, short: bool) -> None:
        self.index, self._limit, self._short = index, limit, short
        self.generator = np.random.Generator(np.random.Philox(seed))
        self._tokens: list[int] = []
        self.codes = SAID_NOTHING

    def add(self, tokens: list[int], ends: Sequence[int]) -> bool:
        """Take a block of tokens; True when the answer is complete, as `codes` then has it."""
        for token in tokens:
            self._tokens.append(token)
            ended = token in ends
            if ended or len(self._tokens) == self._limit:
                # `generate` drops the last token, whatever it was.
                short = self._short and not ended
                self.codes = Codes(tuple(self._tokens[:-1]), ended, short)
                return True
        return False


class Batch:
    """Rows that share a step, on the device. `step` reads and writes tensors in place alone, so that
    a CUDA graph can hold it."""

    def __init__(self, model: Any, settings: SpeechSettings, size: int, replies: int) -> None:
        self._model, self._settings = model, settings
        self.size, self._capacity = size, 0
        config = self._model.config
        weight = model.codec_head.weight
        device, dtype = weight.device, weight.dtype
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        for cached in (self._keys, self._values):
            cached += [
                torch.zeros(
                    (size, config.num_key_value_heads, 0, config.head_dim),
                    device=device,
                    dtype=dtype,
                )
                for _ in range(config.num_hidden_layers)
            ]
        integers = {"device": device, "dtype": torch.long}
        self._position = torch.zeros(size, **integers)  # of the token that is fed next
        self._turn = torch.zeros(size, **integers)  # states of the reply that are used up
        self._last = torch.zeros(size, **integers)  # the state that is repeated for good
        self._tokens = torch.zeros(size, BLOCK, **integers)
        self._slot = torch.zeros(1, **integers)  # step within the block
        self._draws = torch.zeros(size, BLOCK, device=device)
        self._seen = torch.zeros(size, config.vocab_size, device=device, dtype=torch.bool)
        self._hidden = torch.zeros(size, config.hidden_size, device=device, dtype=dtype)
        self._reply = torch.zeros(size, replies, config.embedding_size, device=device, dtype=dtype)
        self._graph: Any = None
        self._warm = False
        self._wanted = settings.cuda_graphs and device.type == "cuda"

    _PER_ROW = ("_position", "_turn", "_last", "_tokens", "_draws", "_seen", "_hidden", "_reply")

    def keep(self, slots: list[int]) -> None:
        """Leave these rows alone in the batch."""
        index = torch.tensor(slots, device=self._position.device)
        for name in self._PER_ROW:
            setattr(self, name, getattr(self, name)[index])
        self._keys = [tensor[index] for tensor in self._keys]
        self._values = [tensor[index] for tensor in self._values]
        self.size = len(slots)
        self._forget()

    def rest(self, slot: int) -> None:
        """Nobody's place any more: its columns must not make the cache grow."""
        self._position[slot] = 0

    def _forget(self) -> None:
        self._graph, self._warm = None, False

    def _reserve(self, columns: int) -> None:
        if columns <= self._capacity:
            return
        capacity = max(256, 1 << (columns - 1).bit_length())
        if capacity > 4096:
            capacity = -(-columns // 4096) * 4096
        more = capacity - self._capacity
        for cached in (self._keys, self._values):
            for layer, tensor in enumerate(cached):
                cached[layer] = torch.nn.functional.pad(tensor, (0, 0, 0, more))
        self._capacity = capacity
        self._forget()

    def begin(self, slot: int, row: TalkerInputs) -> None:
        """Prefill `row` into the place `slot`."""
        from transformers import DynamicCache

        model, device = self._model, self._position.device
        length, replies = len(row.prefix), len(row.reply)
        self._reserve(length)
        cache = DynamicCache()
        prefix = row.prefix.to(device, self._hidden.dtype)
        output = model.model(
            inputs_embeds=model.thinker_to_talker_proj(prefix[None]),
            attention_mask={"full_attention": None},
            position_ids=torch.arange(length, device=device).expand(3, 1, length),
            past_key_values=cache,
            use_cache=True,
        )
        for layer, entry in enumerate(cache.layers):
            self._keys[layer][slot, :, :length] = entry.keys[0]
            self._values[layer][slot, :, :length] = entry.values[0]
        self._hidden[slot] = output.last_hidden_state[0, -1]
        self._reply[slot, :replies] = row.reply.to(device, self._reply.dtype)
        self._position[slot], self._turn[slot], self._last[slot] = length, 0, replies - 1
        # The marks that stand in the prompt count as said.
        marks = (model.codec_mask_token, model.codec_pad_token, model.codec_bos_token)
        self._seen[slot] = False
        self._seen[slot, list(marks)] = True

    def block(self, generators: Sequence[np.random.Generator | None]) -> list[list[int]]:
        """BLOCK more tokens of every row."""
        self._reserve(int(self._position.max()) + BLOCK)
        if self._settings.temperature > 0:
            draws = [g.random(BLOCK) if g else np.zeros(BLOCK) for g in generators]
            self._draws.copy_(torch.from_numpy(np.stack(draws)))
        self._slot.zero_()
        # The first block behind every change runs step by step, which also warms the kernels up.
        if self._wanted and self._warm and self._graph is None:
            self._capture()
        for _ in range(BLOCK):
            if self._graph is None:
                self.step()
            else:
                self._graph.replay()
        self._warm = True
        tokens: list[list[int]] = self._tokens.tolist()
        return tokens

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self._graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._wanted = False
            print(
                f"the talker runs without CUDA graphs ({error}): every step then waits for some "
                "hundred launches, 10 to 20 ms instead of 1 to 3",
                flush=True,
            )

    def step(self) -> None:
        """Choose the next token of every row and feed it."""
        model = self._model
        token = choose(
            model.codec_head(self._hidden).float(),
            self._seen,
            self._draws.gather(1, self._slot.expand(self.size, 1)),
            model.codec_bos_token,
            self._settings,
        )
        self._seen.scatter_(1, token, True)
        self._tokens.scatter_(1, self._slot.expand(self.size, 1), token)
        rows = torch.arange(self.size, device=token.device)
        state = self._reply[rows, torch.minimum(self._turn, self._last)]
        embedded = model.get_input_embeddings()(token[:, 0]) + state
        columns = torch.arange(self._capacity, device=token.device)
        output = model.model(
            inputs_embeds=model.thinker_to_talker_proj(embedded)[:, None],
            attention_mask={"full_attention": columns <= self._position[:, None]},
            position_ids=self._position[None, :, None].expand(3, self.size, 1),
            past_key_values=self,
            use_cache=True,
        )
        self._hidden.copy_(output.last_hidden_state[:, 0])
        self._position += 1
        self._turn += 1
        self._slot += 1

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Part of transformers' cache interface: write a step's keys and values, return all."""
        rows = torch.arange(self.size, device=key.device)
        self._keys[layer][rows, :, self._position] = key[:, :, 0]
        self._values[layer][rows, :, self._position] = value[:, :, 0]
        return self._keys[layer], self._values[layer]


def choose(
    logits: torch.Tensor,
    seen: torch.Tensor,
    draws: torch.Tensor,
    never: int,
    settings: SpeechSettings,
) -> torch.Tensor:
    """The next token of every row, (rows, 1) int64.

    `logits` (rows, vocabulary) float32; `seen` the same shape, bool: tokens that are penalised;
    `draws` (rows, 1) uniform in [0, 1); `never` a token that is not chosen. Penalty, temperature,
    top-k and top-p in transformers' order.
    """
    penalty = settings.repetition_penalty
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, penalised, logits)
    logits[:, never] = -torch.inf
    if settings.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    best = (logits / settings.temperature).topk(min(settings.top_k, logits.shape[1]))
    shares = best.values.softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares * (before < settings.top_p)
    reached = shares.cumsum(-1)
    chosen = (reached <= draws * reached[:, -1:]).sum(-1, keepdim=True)
    # A draw that rounds to the whole sum would point behind the last candidate.
    chosen = torch.minimum(chosen, (shares > 0).sum(-1, keepdim=True) - 1)
    return best.indices.gather(1, chosen)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; a step's with its queries grouped by key head.

    With a mask (rows, columns) bool, `query` is one token a row; without, a causal prefill.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, **kwargs
        )
        return output, None
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    scores = (grouped @ key.transpose(2, 3)).float() * scaling
    scores = scores.masked_fill(~attention_mask[:, None, None, :], -torch.inf)
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.reshape(rows, heads, 1, width).transpose(1, 2), None
