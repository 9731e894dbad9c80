"""Engines with labelled devices: which passes of which role mix a GPU with host memory.

    python tests/support/device_rank.py --model DIR --rank 0 --ranks 1 --rendezvous FILE \
        --output out.pt policy reference policy-offloaded lora

Writes by role and case what `device_labels` found: "none", or the first mismatch. Precision is that
of a GPU: bfloat16 under autocast, weights of the policy in float32.
"""

from __future__ import annotations

import os
import traceback
from functools import partial
from typing import Any

from engine_rank import build_rows, open_engine, rank_parser, store_clips, to_batch

BF16 = "mixed_precision={param_dtype:bf16,reduce_dtype:fp32,buffer_dtype:fp32}"
ROLES = {
    "policy": ["actor_rollout_ref.actor.fsdp_config.forward_prefetch=true"],
    "policy-offloaded": ["actor_rollout_ref.actor.fsdp_config.param_offload=true"],
    "reference": [
        "actor_rollout_ref.actor.fsdp_config.forward_only=true",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16",
    ],
    "lora": [
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora.merge=true",
        "train.audio_tower=false",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16",
    ],
}
CASES = [
    (batch, way)
    for batch in ("mixed", "text")
    for way in ("padded", "packed", "shared", "checkpointed")
]


def one_pass(engine: Any, actor: Any, batch: str, way: str) -> str:
    """The first mismatch of a forward, and of a backward where the engine trains."""
    from device_labels import GPU, HOST, DeviceMismatch, label_of, place_module, two_devices
    from verl.workers.utils.losses import ppo_loss

    training = not engine.engine_config.forward_only
    rows = build_rows(engine.model_config.processor, batch)
    store_clips(rows)
    object.__setattr__(engine.engine_config, "share_prompts", way == "shared")
    (
        engine.module.gradient_checkpointing_enable
        if way == "checkpointed"
        else engine.module.gradient_checkpointing_disable
    )()
    data = to_batch(rows, 4096, way == "packed")
    away = not training or engine._is_offload_param
    place_module(engine.module, HOST if away else GPU)
    try:
        with two_devices():
            with engine.train_mode() if training else engine.eval_mode():
                if training:
                    engine.optimizer_zero_grad()
                loss = partial(ppo_loss, config=actor)
                engine.forward_backward_batch(
                    data, loss if training else None, forward_only=not training
                )
            for name, tensor in engine.get_per_tensor_param()[0] if training else ():
                if label_of(tensor) != GPU:
                    return f"{name} would reach the rollout from {label_of(tensor)}"
    except DeviceMismatch as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if "soundmind" in f.filename]
        place = f"{os.path.basename(own[-1].filename)}, {own[-1].name}" if own else "verl"
        return f"{error} ({place})"
    return "none"


def gathered_in_vain(engine: Any, actor: Any) -> list[str]:
    """FSDP2 units that are gathered ahead after they have run, or without running at all."""
    from torch.distributed.fsdp import FSDPModule

    ran: list[str] = []
    units = {n: m for n, m in engine.module.named_modules() if isinstance(m, FSDPModule)}
    names = {id(unit._get_fsdp_state()): name for name, unit in units.items()}
    hooks = [
        unit.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, unit in units.items()
    ]
    one_pass(engine, actor, "mixed", "packed")
    for hook in hooks:
        hook.remove()
    assert sum(bool(unit._get_fsdp_state()._states_to_forward_prefetch) for unit in units.values())
    return [
        f"{name} gathers {names[id(ahead)] or 'the root'}"
        for name, unit in units.items()
        for ahead in unit._get_fsdp_state()._states_to_forward_prefetch
        if names[id(ahead)] not in ran or ran.index(names[id(ahead)]) <= ran.index(name)
    ]


def mixed() -> str:
    """What a sum over both devices is answered with."""
    import torch
    from device_labels import DeviceMismatch, two_devices

    try:
        with two_devices():
            torch.ones(2, device="cuda:0") + torch.ones(2)
    except DeviceMismatch as error:
        return str(error)
    return "none"


def main() -> None:
    parser = rank_parser()
    parser.add_argument("roles", nargs="+", choices=ROLES)
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    vain: list[str] = []
    for role in arguments.roles:
        overrides = [f"+actor_rollout_ref.actor.fsdp_config.{BF16}", *ROLES[role]]
        engine, actor = open_engine(arguments.model, 0, 1, arguments.rendezvous, overrides)
        found[role] = {
            f"{batch} {way}": one_pass(engine, actor, batch, way) for batch, way in CASES
        }
        if role == "policy":
            vain = gathered_in_vain(engine, actor)
    found["prefetch"] = {"in vain": ", ".join(vain)}
    found["labels"] = {"mixed": mixed()}
    import torch
    import torch.distributed as dist

    torch.save(found, arguments.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
