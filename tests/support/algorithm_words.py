"""Every word of `configs/algorithm`: dry-run, then trained for two steps, in one process.

    python tests/support/algorithm_words.py --model DIR --parquet FILE --rendezvous FILE --output out.json

An update goes through verl's own code from scores to weights: KL in the reward where the word has it,
the advantages of its V1 trainer, its loss, our engine. Rewards are drawn; the text is the engine tests'.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from engine_rank import build_rows, open_engine, to_batch
from omegaconf import open_dict

GROUP = 4  # responses a prompt; two prompts
EIGHT_ROWS = ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]
COMPONENTS = ("text_format", "answer", "text_length")


def words() -> list[str]:
    from soundmind.run.config import CONFIG_DIR

    return sorted(path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml"))


def advantages(config: Any, batch: Any, infos: list[dict[str, float]]) -> Any:
    """Advantages of the batch's responses, as verl's V1 trainer and ours compute them: nested."""
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_kl_controller
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.workers.utils.padding import response_to_nested

    from soundmind.training.algorithms import add_components

    padded = {
        name: batch[name].to_padded_tensor(0.0)
        for name in ("response_mask", "old_log_probs", "ref_log_prob")
    }
    scores = torch.zeros_like(padded["old_log_probs"])
    ends = padded["response_mask"].sum(-1) - 1
    scores[torch.arange(len(ends)), ends] = torch.tensor([info["score"] for info in infos])
    data = DataProto.from_dict(tensors={**padded, "token_level_scores": scores})
    uids = [f"prompt{index // GROUP}" for index in range(len(infos))]
    data.non_tensor_batch["uid"] = np.array(uids, dtype=object)
    if config.algorithm.use_kl_in_reward:
        control = get_kl_controller(config.algorithm.kl_ctrl)
        data, _ = apply_kl_penalty(data, control, config.algorithm.kl_penalty)
    else:
        data.batch["token_level_rewards"] = scores
    if config.algorithm.adv_estimator == "gdpo":
        add_components(data, infos, list(config.algorithm.gdpo_reward_keys))
    data = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=[f"{uid}_{index}_0" for index, uid in enumerate(uids)],
        adv_estimator=config.algorithm.adv_estimator,
        gamma=config.algorithm.gamma,
        lam=config.algorithm.lam,
        num_repeat=GROUP,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        config=config.algorithm,
    )
    return response_to_nested(data.batch["advantages"], batch["response_mask"])


def train(engine: Any, config: Any) -> dict[str, Any]:
    """Two updates under `config`: losses, whether weights moved, and the advantages of step 1."""
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    draw = torch.Generator().manual_seed(3)
    losses, first = [], None
    before = [p.full_tensor().clone() for p in engine.module.parameters() if p.requires_grad]
    for _ in range(2):
        batch = to_batch(build_rows(engine.model_config.processor, "text"), 4096, False)
        shape = batch["old_log_probs"]
        batch["ref_log_prob"] = shape - 0.1
        infos = []
        for _row in range(8):
            parts = dict(zip(COMPONENTS, torch.rand(3, generator=draw).tolist(), strict=True))
            infos.append({**parts, "score": parts["text_format"] + 2 * parts["answer"]})
        batch["advantages"] = advantages(config, batch, infos)
        first = batch["advantages"].values().tolist() if first is None else first
        tu.assign_non_tensor(batch, global_batch_size=8)
        with engine.train_mode():
            output = engine.train_batch(batch, loss_function=partial(ppo_loss, config=actor))
        losses.append(float(sum(output["loss"])))
    after = [p.full_tensor() for p in engine.module.parameters() if p.requires_grad]
    moved = sum(not old.equal(new) for old, new in zip(before, after, strict=True))
    return {"losses": losses, "moved": moved, "advantages": first}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "parquet", "rendezvous"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    engine, _ = open_engine(
        arguments.model,
        0,
        1,
        arguments.rendezvous,
        [
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        ],
    )
    from soundmind.run import checks
    from soundmind.run.config import compose_config
    from soundmind.run.dry_run import dry_run

    results: dict[str, Any] = {}
    for word in words():
        config = compose_config("grpo_tiny_cpu", [f"algorithm={word}", *EIGHT_ROWS])
        with open_dict(config):
            config.actor_rollout_ref.model.path = arguments.model
            config.data.train_files = config.data.val_files = arguments.parquet
        try:
            text = dry_run(config, "grpo_tiny_cpu")
        except checks.CheckError as error:
            results[word] = {"problems": error.problems}
            continue
        results[word] = {"problems": [], "text": text, **train(engine, config)}
    arguments.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
