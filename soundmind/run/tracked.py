"""A training step of the real size without its memory: PyTorch's own tracker beside the plan. [ours]

The thinker is built of fake tensors, which know their sizes and hold nothing, wrapped by the real
FSDP2 over a process group that sends nothing, and stepped once: forward, log-probabilities,
backward, AdamW. `FSDPMemTracker` follows every tensor. What CUDA alone would run is put in place
by shape: flash-attention and its cross entropy allocate what theirs allocate.

Integers stay real, so that whoever reads lengths and offsets out of tensors can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soundmind.planning import flops
from soundmind.planning.memory import MicroBatch, Training

BY_SHAPE = "soundmind_by_shape"
WRAPPED = ("Qwen2_5OmniDecoderLayer", "Qwen2_5OmniAudioEncoderLayer")  # as configs/base/omni.yaml
BANNED_IDS = 14


class _RealIntegers(TorchDispatchMode):
    """Below a tracker, above fake tensors: whatever no fake tensor goes into, and no float comes out
    of nothing, is computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, FakeTensor) for leaf in given):
            if func.overloadpacket is torch.ops.aten.index:
                args = (args[0], _places(args[1]))
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype")
        integers = dtype is not None and not dtype.is_floating_point
        if given or integers or func.overloadpacket is torch.ops.aten.arange:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _places(indices: list[Any]) -> list[Any]:
    """A mask that values are chosen by, as the places where it is true: their number is known."""
    with unset_fake_temporarily():
        return [
            place
            for index in indices
            for place in (
                index.nonzero(as_tuple=True)
                if index is not None and index.dtype == torch.bool
                else [index]
            )
        ]


class _Attention(torch.autograd.Function):
    """Saves what flash-attention saves: queries, keys, values, output and a float a head and row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3]).float())
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _LogProbabilities(torch.autograd.Function):
    """flash-attention's cross entropy: one float a position, its gradient written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Any) -> Any:
        ctx.save_for_backward(logits, logits.new_empty(len(logits)).float())
        return logits.new_empty(len(logits)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.saved_tensors[0]


def _attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


@contextmanager
def _group(ranks: int) -> Iterator[Any]:
    """A mesh of `ranks` ranks, of which this process is the first and the others do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def tracked_peak(setup: Training, batch: MicroBatch, micro_batches: int = 1) -> dict[str, int]:
    """Bytes at the peak of one update on one rank, by kind, and their sum under `Total`.

    `setup` and `batch` are those of `soundmind.planning.memory`. With several micro-batches two are
    run: the second finds the gradients of the first. A second update is measured, as the first one
    makes Adam's state.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    built = _policy(setup)
    with _group(setup.ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers():
        model = _sharded(built.to_empty(device="cpu"), setup, mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ways: dict[str, Any] = {"foreach": {"foreach": True}, "fused": {"fused": True}}
        optimizer = torch.optim.AdamW(trained, lr=1e-6, **ways.get(setup.optimizer, {}))
        tracker = FSDPMemTracker(model, optimizer)
        for update in range(2):
            if update == 1:
                tracker.reset_mod_stats()
            with tracker:
                for _ in range(min(2, micro_batches)):
                    _loss(setup, model, batch).backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        snapshot = tracker.get_tracker_snapshot("peak")
    found: dict[str, int] = {}
    for counted in snapshot.values():
        for kind, amount in counted.items():
            name = getattr(kind, "value", str(kind))
            found[name] = found.get(name, 0) + int(amount)
    return {name: amount for name, amount in found.items() if amount}


def _policy(setup: Training) -> Any:
    """The policy of `setup` without storage, as verl's engine has it before FSDP2."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from soundmind.standin.random_thinker import random_thinker
    from soundmind.training.policy import as_policy

    AttentionInterface.register(BY_SHAPE, _attend)
    AttentionMaskInterface.register(BY_SHAPE, lambda *_, **__: None)
    dtype = torch.float32 if setup.weight_bytes == 4 else torch.bfloat16
    model = random_thinker(setup.size, BY_SHAPE, dtype=dtype, device="meta")
    del model.visual
    model = as_policy(model, banned_token_ids=list(range(3, 3 + BANNED_IDS)))
    model.requires_grad_(not setup.trained.lora_rank)
    if not setup.trained.audio_tower:
        model.audio_tower.requires_grad_(False)
        model.audio_tower.proj.requires_grad_(setup.trained.projector)
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _with_adapter(model, setup.trained.lora_rank) if setup.trained.lora_rank else model


def _sharded(model: Any, setup: Training, mesh: Any) -> Any:
    """`model` in training, sharded over `mesh` as verl shards it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    types = {2: torch.bfloat16, 4: torch.float32}
    policy = MixedPrecisionPolicy(types[setup.compute_bytes], types[setup.reduce_bytes])
    rest = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": setup.reshard_after_forward}
    for name, module in model.named_modules():
        # verl also wraps the two marker embeddings, which no forward asks for: the tracker needs one.
        if type(module).__name__ in WRAPPED or name.endswith(("embed_tokens", "lm_head")):
            fully_shard(module, **rest)
    return fully_shard(model, **rest).train()


def _with_adapter(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    from soundmind.model.parts import language_model_targets

    model = get_peft_model(
        model, LoraConfig(r=rank, target_modules=language_model_targets("all-linear"))
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _loss(setup: Training, model: Any, batch: MicroBatch) -> Any:
    """One micro-batch through the policy to a loss, as verl's engine goes."""
    size = setup.size
    ids = torch.full((batch.rows, batch.length), 10, dtype=torch.long)
    clips = len(batch.clips) // max(1, batch.rows)
    for row in range(batch.rows):
        heard = [
            flops.audio_tokens(size.audio, clip) for clip in batch.clips[row * clips :][:clips]
        ]
        ids[row, 1 : 1 + sum(heard)] = _audio_token(model)
    positions = torch.arange(batch.length).expand(batch.rows, -1)
    inputs: dict[str, Any] = {}
    if batch.clips:
        frames = max(batch.clips)
        inputs["input_features"] = torch.empty(len(batch.clips), size.audio.mel_bins, frames)
        mask = torch.arange(frames) < torch.tensor(batch.clips)[:, None]
        inputs["feature_attention_mask"] = mask.long()
    ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    wanted = torch.arange(batch.tokens - batch.logit_positions, batch.tokens)
    logits = model(
        **inputs,
        input_ids=ids,
        position_ids=positions,
        attention_mask=None,
        logit_positions=wanted,
        use_cache=False,
    ).logits.squeeze(0)
    if setup.scaled_logits:
        logits.div_(0.7)
    return _LogProbabilities.apply(logits).mean()


def _audio_token(model: Any) -> int:
    return int(model.config.audio_token_id)
