"""One FSDP rank that trains: what moves, what has a gradient, what the rollout would get.

    python tests/support/parts_rank.py --model DIR --rank 0 --ranks 1 --rendezvous FILE \
        --updates 2 --output out.pt --checkpoint DIR train.audio_tower=false

Arguments at the end are Hydra overrides. Every tensor is written in full, by name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from engine_rank import build_rows, open_engine, rank_parser, to_batch


def full(tensor: Any) -> Any:
    """A copy of the whole tensor, gathered from its shards."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def weights(engine: Any) -> dict[str, Any]:
    return {name: full(p) for name, p in engine.module.state_dict().items()}


def progress(engine: Any) -> dict[str, Any]:
    """What an update depends on besides weights: moments, learning rate's step, random numbers."""
    import torch

    names = {id(p): name for name, p in engine.module.named_parameters()}
    moments = {
        f"{names[id(parameter)]}/{key}": full(value)
        for parameter, state in engine.optimizer.state.items()
        for key, value in state.items()
    }
    schedule = engine.lr_scheduler.state_dict()
    steps = {key: schedule[key] for key in ("last_epoch", "_last_lr")}
    return {"moments": moments, "schedule": steps, "random": torch.get_rng_state()}


def scramble(engine: Any) -> None:
    """Change everything that a checkpoint should bring back."""
    import torch

    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(1)
        for state in engine.optimizer.state.values():
            for value in state.values():
                value.add_(1)
    engine.lr_scheduler.step()
    torch.rand(7)


def log_probs(engine: Any, rows: list[dict[str, Any]], rank: int, ranks: int) -> list[Any]:
    """Log-probabilities of this rank's responses, without a gradient."""
    mine = rows[rank::ranks]
    with engine.eval_mode():
        data = to_batch(mine, 4096, False)
        output = engine.forward_backward_batch(data, None, forward_only=True)
    values = output["model_output"]["log_probs"].unbind()
    return [
        v[len(row["prompt"]) - 1 : -1].detach().clone() for row, v in zip(mine, values, strict=True)
    ]


def graph_leaves(engine: Any, rows: list[dict[str, Any]]) -> dict[str, bool]:
    """For every module, whether its output in a training forward is part of a graph."""
    import torch

    seen: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            tensor = getattr(tensor, "last_hidden_state", tensor)
            if isinstance(tensor, torch.Tensor):
                seen[name] = seen.get(name, False) or tensor.grad_fn is not None

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in engine.module.named_modules()]
    data = to_batch(rows, 4096, False)
    with engine.train_mode():
        engine.forward_backward_batch(data, partial(engine.loss, config=engine.actor))
        engine.optimizer_zero_grad()
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    parser = rank_parser()
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--batch", default="mixed")
    parser.add_argument("--reference-first", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    engine, actor = open_engine(
        arguments.model,
        arguments.rank,
        arguments.ranks,
        arguments.rendezvous,
        arguments.overrides,
    )
    import torch
    import torch.distributed as dist
    from verl.workers.utils.losses import ppo_loss

    rank, ranks = arguments.rank, arguments.ranks
    rows = build_rows(engine.model_config.processor, arguments.batch)
    results: dict[str, Any] = {"before": weights(engine)}
    if arguments.reference_first:
        with engine.disable_adapter():
            results["reference_before"] = log_probs(engine, rows, rank, ranks)
        results["policy_before"] = log_probs(engine, rows, rank, ranks)
    engine.loss, engine.actor = ppo_loss, actor
    results["in_graph"] = graph_leaves(engine, rows[rank::ranks])
    for _ in range(arguments.updates):
        data = to_batch(rows[rank::ranks], 4096, False)
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, partial(ppo_loss, config=actor))
            results["gradients"] = {
                name: None if p.grad is None else full(p.grad)
                for name, p in engine.module.named_parameters()
            }
            results["norm"] = engine.optimizer_step()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    groups = engine.optimizer.param_groups
    results["optimized"] = {names[id(p)] for group in groups for p in group["params"]}
    results["state"] = {names[id(p)] for p in engine.optimizer.state}
    results["after"] = weights(engine)
    results["dtypes"] = {n: str(p.dtype) for n, p in engine.module.named_parameters()}
    sent, _ = engine.get_per_tensor_param()
    results["sent"] = {name: full(tensor) for name, tensor in sent}
    results["after_sync"] = weights(engine)
    results["policy_after"] = log_probs(engine, rows, rank, ranks)
    if arguments.reference_first:
        with engine.disable_adapter():
            results["reference_after"] = log_probs(engine, rows, rank, ranks)
    if arguments.checkpoint:
        engine.save_checkpoint(str(arguments.checkpoint / "actor"), global_step=1)
        results["progress"] = progress(engine)
        scramble(engine)
        results["scrambled"], results["scrambled_progress"] = weights(engine), progress(engine)
        engine.load_checkpoint(str(arguments.checkpoint / "actor"))
        results["progress_after_load"] = progress(engine)
        results["after_load"] = weights(engine)
    if rank == 0:
        torch.save(results, arguments.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
