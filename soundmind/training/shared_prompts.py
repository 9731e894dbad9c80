"""One pass over a prompt for all of its responses. torch, no verl.

The n rollouts of a prompt begin with the same tokens; behind a one-minute clip those are 1,600 of
perhaps 1,700. Side by side they are computed n times. Here they stand once, with the responses
behind them in one row:

    prompt response_1 response_2 ... response_n

Every response continues at the position where the prompt ends and sees the prompt and itself, not
its siblings; log-probabilities and gradients are those of separate rows (tests/training/test_engine.py).
Attention takes the pattern as a dense mask, which sdpa does and flash-attention does not. [ours]

In the comments: G prompts (groups of rollouts), L tokens of the longest shared row, P and R tokens of
a prompt and of a response, N response tokens of all rollouts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SharedRows:
    """A micro-batch with every distinct prompt once; what the policy's forward takes.

    `input_ids` and `position_ids` (prompts, length) int64; `attention_mask` (prompts, 1, length,
    length) bool, true where a token (third axis) sees another (fourth); `logit_positions` (response
    tokens,) int64 in the rows laid end to end, in the order of the rollouts; `first` the rollout
    that each prompt is taken from; `repeated` the tokens of each prompt that is not computed again.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    logit_positions: torch.Tensor
    first: list[int]
    repeated: list[int]


def prompt_groups(
    prompts: Sequence[torch.Tensor], names: Sequence[Hashable]
) -> dict[Hashable, list[int]]:
    """Rollouts of the same prompt: the same tokens and, by name, the same clips."""
    groups: dict[Hashable, list[int]] = {}
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        groups.setdefault((name, tuple(prompt.tolist())), []).append(row)
    return groups


def share_prompts(
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    names: Sequence[Hashable],
    pad_token_id: int = 0,
) -> SharedRows:
    """The shared rows of rollouts with these prompts and responses, each (tokens,) int64.

    `names` tell apart prompts of the same tokens with different clips.
    """
    device = prompts[0].device
    groups = list(prompt_groups(prompts, names).values())
    # 1. Rows of padding: (G, L) each. `segment` is 0 for a prompt, k for its k-th response.
    lengths = [len(prompts[rows[0]]) + sum(len(responses[row]) for row in rows) for rows in groups]
    shape = (len(groups), max(lengths))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long, device=device)
    position_ids = torch.zeros(shape, dtype=torch.long, device=device)
    segment = torch.full(shape, -1, dtype=torch.long, device=device)  # padding sees padding
    wanted: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for group, rows in enumerate(groups):
        # 2. One row: the prompt (P,) at 0 .. P-1, then every response (R,).
        prompt = prompts[rows[0]]
        begin = group * shape[1]
        pieces = [prompt, *(responses[row] for row in rows)]
        input_ids[group, : lengths[group]] = torch.cat(pieces)
        segment[group, : len(prompt)] = 0
        position_ids[group, : len(prompt)] = torch.arange(len(prompt), device=device)
        start = len(prompt)
        for number, row in enumerate(rows, 1):
            # 3. Each response continues at position P, wherever in the row it stands.
            end = start + len(responses[row])
            segment[group, start:end] = number
            offsets = torch.arange(end - start, device=device)
            position_ids[group, start:end] = len(prompt) + offsets
            # 4. Where its logits are, in the G x L positions laid end to end: (R,).
            # The prompt's last token predicts the first one, every other is predicted by the one
            # before it.
            before = begin + start - 1 + offsets
            before[:1] = begin + len(prompt) - 1
            wanted[row] = before
            start = end
    # 5. Who sees whom, (G, L, L): the own segment and the prompt, never what comes later.
    same = segment[:, :, None] == segment[:, None, :]
    of_prompt = (segment[:, None, :] == 0) & (segment[:, :, None] > 0)
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    return SharedRows(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=((same | of_prompt) & causal)[:, None],
        logit_positions=torch.cat(wanted),
        first=[rows[0] for rows in groups],
        repeated=[len(prompts[rows[0]]) for rows in groups for _ in rows[1:]],
    )


def pack_groups(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    budget: int,
    at_least: int = 1,
) -> list[list[int]]:
    """Micro-batches of rollouts, siblings together, of at most `budget` tokens with prompts shared.

    `groups` are the rollouts of each prompt; lengths are by rollout. A rollout that exceeds the
    budget stands alone. With fewer than `at_least` micro-batches the largest ones are halved.
    """
    bins: list[list[int]] = []
    used = budget
    for rows in groups:
        whole = prompt_lengths[rows[0]] + sum(response_lengths[row] for row in rows)
        opened = bool(bins) and used + whole <= budget  # the group fits behind what is there
        began = False
        for row in rows:
            cost = response_lengths[row] + (0 if began else prompt_lengths[row])
            if not (opened or began) or used + cost > budget:
                bins.append([])
                used = 0
                cost = response_lengths[row] + prompt_lengths[row]
            bins[-1].append(row)
            used += cost
            began = True
    while len(bins) < at_least:
        largest = max(range(len(bins)), key=lambda index: len(bins[index]))
        rows_of = bins[largest]
        if len(rows_of) < 2:
            raise ValueError(f"{sum(map(len, bins))} rollouts cannot fill {at_least} micro-batches")
        half = len(rows_of) // 2
        bins[largest : largest + 1] = [rows_of[:half], rows_of[half:]]
    return bins
