"""What some algorithms of `configs/algorithm` need beyond verl's V1 trainer.

* GDPO normalises every component of the reward by itself. verl 0.9.1 has the estimator, and its V1
  trainer never fetches the components; here they come from the rollouts' reward dicts.
* DAPO generates groups without a difference again. verl 0.9.1 does so for ever where every group is
  alike, and ignores its own `max_num_gen_batches`; here that key bounds a step.
* `rollout/groups_without_signal` is logged for every algorithm: the share of prompts whose responses
  all earned the same, which teach nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
import verl.trainer.ppo.v1.trainer_base as base
from verl.trainer.ppo.v1 import PPOTrainerSync


def groups_without_signal(infos: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of prompts whose responses all earned the same score; `uid` names prompt and session."""
    scores: dict[str, set[float]] = defaultdict(set)
    for info in infos:
        scores[str(info["uid"]).rsplit("_", 2)[0]].add(float(info["score"]))
    if not scores:
        return {}
    alike = sum(len(found) == 1 for found in scores.values())
    return {"rollout/groups_without_signal": alike / len(scores)}


def add_components(data: Any, infos: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Give verl's batch what its GDPO estimator reads: a column a component, and response masks.

    `infos` are the reward dicts of the batch's rows in order, empty for rows of padding, which count
    0. Raises `KeyError` for a component that a reward does not have.
    """
    for key in keys:
        column = [float(info[key]) if info else 0.0 for info in infos]
        data.non_tensor_batch[key] = np.array(column, dtype=np.float32)
    mask = data.batch["response_mask"]
    # The estimator looks for the last response token behind a prompt; here nothing precedes it.
    data.batch["prompts"] = torch.zeros(len(mask), 0, dtype=torch.long)
    data.batch["attention_mask"] = mask.long()


class RecipeTrainer(PPOTrainerSync):
    """verl's sync trainer with GDPO's components and a bound on what DAPO generates again."""

    _refilled = 0

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.config.algorithm.adv_estimator != "gdpo":
            return super()._compute_advantage(batch, metrics)
        infos = self._row_infos(batch)
        keys = list(self.config.algorithm.gdpo_reward_keys)
        verls = base.compute_advantage_for_multi_trajectories

        def with_components(data: Any, **kwargs: Any) -> Any:
            add_components(data, infos, keys)
            return verls(data, **kwargs)

        base.compute_advantage_for_multi_trajectories = with_components
        try:
            return super()._compute_advantage(batch, metrics)
        finally:
            base.compute_advantage_for_multi_trajectories = verls

    def _row_infos(self, batch: Any) -> list[dict[str, Any]]:
        """Reward dicts of the batch's rows, in order; empty for the rows that fill it up."""
        real = [
            key
            for key, tag in zip(batch.keys, batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        fields = tq.kv_batch_get(
            keys=real, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        found = [getattr(row, "data", row) for row in fields["extra_fields"]]
        infos = {key: row["reward_extra_info"] for key, row in zip(real, found, strict=True)}
        return [infos.get(key, {}) for key in batch.keys]

    def prepare_step(self) -> dict[str, Any]:
        self._refilled = 0
        return super().prepare_step()

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        filter_groups: Any = self.config.algorithm.get("filter_groups") or {}
        most = filter_groups.get("max_num_gen_batches") or 0
        prompts = self.config.data.train_batch_size
        self._refilled += num_prompts
        if filter_groups.get("enable") and 0 < most * prompts < prompts + self._refilled:
            raise RuntimeError(
                f"step {self.global_steps}: {most} batches of {prompts} prompts did not bring {prompts} "
                f"whose responses differ in {filter_groups.metric}. The policy finds them too easy or "
                "too hard: choose other rows, or set "
                "algorithm.filter_groups.enable=false or a larger max_num_gen_batches"
            )
        return super()._add_prompts_to_generate(num_prompts)
