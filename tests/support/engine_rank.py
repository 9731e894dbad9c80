"""One FSDP rank of the engine tests: a real engine, a real PPO loss, a batch given by name.

    python tests/support/engine_rank.py --model DIR --rank 0 --ranks 1 --rendezvous FILE \
        --cases mixed mixed-packed --output out.pt

Writes, by case, each rank's loss, every gradient in full, and per-response log-probabilities.
A case is a batch, optionally `-packed` (no padding), `-split` (several micro-batches), `-keyed`
(rows carry keys of stored clips, as rollouts do, instead of features) or `-full` (logits at every
position, as in verl's own forward).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from soundmind.plugin.environment import select

CLIP_SECONDS = {"mixed": [0.7, None, 1.3, 0.7, None, 2.0, 0.5, 1.3], "text": [None] * 8}
# Of two ranks one has only clips and the other only text.
CLIP_SECONDS["sides"] = [0.7, None] * 4
# Same clip, same lengths of response: every sequence of the batch is equally long.
CLIP_SECONDS["equal"] = [1.0] * 8
RESPONSE_TOKENS = {"mixed": [5, 9, 3, 7, 4, 6, 8, 5], "text": [5, 9, 3, 7, 4, 6, 8, 5]}
RESPONSE_TOKENS["equal"] = [6] * 8
RESPONSE_TOKENS["sides"] = RESPONSE_TOKENS["mixed"]


def build_rows(processor: Any, batch: str) -> list[dict[str, Any]]:
    """Prompt ids, response ids and features of the batch's eight rows, from a fixed seed."""
    from soundmind.task.prompts import build_messages

    generator = np.random.default_rng(7)
    rows = []
    sizes = zip(CLIP_SECONDS[batch], RESPONSE_TOKENS[batch], strict=True)
    for index, (seconds, response_tokens) in enumerate(sizes):
        mode = "text" if seconds is None else "audio"
        # Rows 0 and 3, and 2 and 7, share a clip, as the rollouts of one prompt do.
        samples = int(16_000 * (seconds or 0))
        clip = (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)
        messages = build_messages(mode, "All wugs are daxes.", "clip", "practice")
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[text], audio=None if seconds is None else [clip], return_tensors="pt"
        )
        rows.append(
            {
                "prompt": inputs["input_ids"][0],
                "response": generator.integers(0, 200, response_tokens),
                "advantage": float(generator.standard_normal()),
                "index": index,
                "features": {
                    name: inputs[name]
                    for name in ("input_features", "feature_attention_mask")
                    if name in inputs
                },
            }
        )
    return rows


def to_batch(rows: list[dict[str, Any]], max_tokens: int, remove_padding: bool) -> Any:
    """The rows as the TensorDict that verl's trainer hands to an engine."""
    import torch
    from verl.utils import tensordict_utils as tu

    def nested(tensors: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    responses = [torch.as_tensor(row["response"]) for row in rows]
    full = [torch.cat([row["prompt"], r]) for row, r in zip(rows, responses, strict=True)]
    batch = tu.get_tensordict(
        {
            "input_ids": nested(full),
            "position_ids": nested([torch.arange(len(ids)) for ids in full]),
            "prompts": nested([row["prompt"] for row in rows]),
            "responses": nested(responses),
            "response_mask": nested([torch.ones(len(r), dtype=torch.long) for r in responses]),
            "loss_mask": nested([torch.ones(len(r), dtype=torch.long) for r in responses]),
            "old_log_probs": nested([torch.full((len(r),), -5.0) for r in responses]),
            "advantages": nested(
                [
                    torch.full((len(r),), row["advantage"])
                    for row, r in zip(rows, responses, strict=True)
                ]
            ),
            "multi_modal_inputs": [row["features"] for row in rows],
        }
    )
    tu.assign_non_tensor(
        batch,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=max_tokens,
        use_remove_padding=remove_padding,
        temperature=0.7,  # not one: verl then divides the logits in place
        global_batch_size=8,
        return_model_output=True,
    )
    return batch


def store_clips(rows: list[dict[str, Any]]) -> None:
    """Put the rows' features where the engine looks for stored clips, one entry for each clip."""
    import torch

    from soundmind.training import feature_store

    stored = {}
    for row in rows:
        if row["features"]:
            clips = feature_store.pack(row["features"], torch.float32)
            name = f"clip of {int(clips.lengths)} frames"
            stored[name] = clips
            row["features"] = {feature_store.CLIP_KEY: name, feature_store.STEP: 1}
    feature_store.READER.get([], 2)  # drops the clips of an earlier case
    feature_store.READER._fetch = lambda names: {name: stored[name] for name in names}
    feature_store.READER._step = 0


def run_case(engine: Any, loss: Any, case: str, rank: int, ranks: int) -> dict[str, Any]:
    """One forward and backward pass of this rank's rows; gradients and log-probabilities of all."""
    batch, _, variant = case.partition("-")
    rows = build_rows(engine.model_config.processor, batch)
    if variant == "keyed" or variant.startswith("shared"):
        store_clips(rows)
    object.__setattr__(engine.engine_config, "share_prompts", variant.startswith("shared"))
    if variant == "full":
        with mock.patch("soundmind.training.micro_batch.response_positions", return_value=None):
            return run_rows(engine, loss, rows, variant, rank, ranks)
    return run_rows(engine, loss, rows, variant, rank, ranks)


def run_rows(
    engine: Any, loss: Any, rows: list[dict[str, Any]], variant: str, rank: int, ranks: int
) -> dict[str, Any]:
    """What `run_case` returns, for the rows of a case."""
    import torch.distributed as dist

    from soundmind.training.utilisation import CURRENT_PASS

    mine = rows[rank::ranks]
    data = to_batch(mine, 160 if variant.endswith("split") else 4096, variant.endswith("packed"))
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss)
        gradients = {
            name: None if p.grad is None else p.grad.full_tensor()
            for name, p in engine.module.named_parameters()
        }
    log_probs = output["model_output"]["log_probs"]
    local = {
        row["index"]: values[len(row["prompt"]) - 1 : -1].detach()
        for row, values in zip(mine, log_probs.unbind(), strict=True)
    }
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (local, sum(output["loss"])))
    return {
        "gradients": gradients,
        "log_probs": {index: values for part, _ in gathered for index, values in part.items()},
        "prompts": len(mine) - len(CURRENT_PASS.repeated),
        # Every rank's loss is scaled by the number of ranks, since gradients are averaged.
        "loss": sum(loss for _, loss in gathered) / ranks,
    }


def open_engine(
    model: str, rank: int, ranks: int, rendezvous: str, overrides: Sequence[str] = ()
) -> tuple[Any, Any]:
    """An initialised engine of `grpo_tiny_cpu` with `overrides`, and its actor configuration."""
    select(os.environ, cpu=True)

    import torch.distributed as dist

    from soundmind.plugin.verl_entry import require_loaded
    from soundmind.run.config import compose_config

    require_loaded()
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.base import EngineRegistry

    if not dist.is_initialized():  # a second engine of this process joins the first one's group
        where = f"file://{rendezvous}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
    config = compose_config(
        "grpo_tiny_cpu",
        [
            f"actor_rollout_ref.model.path='{model}'",
            "actor_rollout_ref.actor.optim.total_training_steps=1",
            *overrides,
        ],
    )
    model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    engine = EngineRegistry.new(
        model_type="omni_thinker",
        backend="fsdp2",
        model_config=model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    engine.initialize()
    return engine, actor


def rank_parser() -> argparse.ArgumentParser:
    """What every process of `processes.start_ranks` is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def main() -> None:
    parser = rank_parser()
    parser.add_argument("--cases", nargs="+", required=True)
    arguments = parser.parse_args()
    engine, actor = open_engine(
        arguments.model, arguments.rank, arguments.ranks, arguments.rendezvous
    )
    import torch
    import torch.distributed as dist
    from verl.workers.utils.losses import ppo_loss

    results = {
        case: run_case(
            engine, partial(ppo_loss, config=actor), case, arguments.rank, arguments.ranks
        )
        for case in arguments.cases
    }
    if arguments.rank == 0:
        torch.save(results, arguments.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
