"""The layout that computes a prompt once for all of its responses; its values: test_engine.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from soundmind.training.shared_prompts import (
    pack_groups,
    share_prompts,
)


def tokens(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.long)


def test_responses_stand_behind_their_prompt_and_see_it_and_themselves() -> None:
    prompts = [tokens(1, 2, 3), tokens(9), tokens(1, 2, 3)]
    responses = [tokens(10, 11), tokens(20), tokens(30, 31)]
    shared = share_prompts(prompts, responses, ["clip", None, "clip"])
    assert shared.input_ids.tolist() == [[1, 2, 3, 10, 11, 30, 31], [9, 20, 0, 0, 0, 0, 0]]
    assert shared.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 4]
    seen = [[column for column in range(7) if row[column]] for row in shared.attention_mask[0, 0]]
    prompt = [0, 1, 2]
    assert seen == [
        [0],
        [0, 1],
        prompt,
        [*prompt, 3],
        [*prompt, 3, 4],
        [*prompt, 5],
        [*prompt, 5, 6],
    ]
    # A row of nothing but false would make its softmax, and with it every gradient, NaN.
    assert shared.attention_mask.any(-1).all()
    # By rollout: the prompt's last token, then each but the last of the response.
    assert shared.logit_positions.tolist() == [2, 3, 7, 2, 5]
    assert (shared.first, shared.repeated) == ([0, 1], [3])


def test_equal_tokens_with_other_clips_are_other_prompts() -> None:
    prompts, responses = [tokens(1, 2)] * 2, [tokens(5), tokens(6)]
    shared = share_prompts(prompts, responses, ["clip one", "clip two"])
    assert shared.input_ids.shape[0] == 2
    assert shared.repeated == []


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=8)),
        min_size=1,
        max_size=8,
    ),
    budget=st.integers(1, 200),
)
def test_micro_batches_hold_every_rollout_once_within_the_budget(
    groups: list[tuple[int, list[int]]], budget: int
) -> None:
    rows: list[list[int]] = []
    prompts: list[int] = []
    responses: list[int] = []
    group_of: list[int] = []
    for group, (prompt, lengths) in enumerate(groups):
        rows.append(list(range(len(prompts), len(prompts) + len(lengths))))
        prompts += [prompt] * len(lengths)
        responses += lengths
        group_of += [group] * len(lengths)
    bins = pack_groups(rows, prompts, responses, budget)
    assert sorted(row for found in bins for row in found) == list(range(len(prompts)))
    for found in bins:
        prompts_of = {group_of[row]: prompts[row] for row in found}
        used = sum(prompts_of.values()) + sum(responses[row] for row in found)
        assert found and (used <= budget or len(found) == 1)
    most = pack_groups(rows, prompts, responses, budget, at_least=len(prompts))
    assert [len(found) for found in most] == [1] * len(prompts)
    with pytest.raises(ValueError, match="cannot fill"):
        pack_groups(rows, prompts, responses, budget, at_least=len(prompts) + 1)


def test_siblings_stay_together_while_they_fit() -> None:
    rows = [[0, 1], [2, 3], [4, 5]]
    bins = pack_groups(rows, [10] * 6, [2] * 6, budget=28)
    assert bins == [[0, 1, 2, 3], [4, 5]]
