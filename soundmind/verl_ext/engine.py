"""FSDP engine for Qwen2.5-Omni's thinker, registered for verl as model type `omni_thinker`.

The numerics are verl's (`FSDPEngineWithLMHead`); what is changed, and why:

1. The module is verl's automatic class with a forward of ours (`soundmind.policy`).
2. Vision is frozen: its tower never gets a gradient. [ours; verl's `freeze_vision_tower` is not read]
3. Weight names get the prefix `thinker.`, which vLLM's Omni model expects.
4. Without an accelerator: no pinned memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.utils.device import get_device_name
from verl.workers.engine.base import EngineRegistry

from soundmind.policy import as_policy
from soundmind.tokens import response_banned_token_ids
from soundmind.verl_ext.feature_store import CLIP_KEY, READER, clip_inputs, clip_rows
from soundmind.verl_ext.plugin import require_loaded

logger = logging.getLogger(__name__)

THINKER_PREFIX = "thinker."


@EngineRegistry.register(
    model_type="omni_thinker", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"]
)
class OmniFSDPEngine(fsdp.FSDPEngineWithLMHead):
    """verl's FSDP engine for the thinker of a complete Qwen2.5-Omni folder."""

    def initialize(self) -> None:
        require_loaded()
        if get_device_name() == "cpu":
            # In `sync` mode nothing else runs while the actor trains, so it may use all cores.
            threads = os.environ.get("SOUNDMIND_ACTOR_THREADS")
            torch.set_num_threads(int(threads) if threads else self._cores_per_rank())
        super().initialize()

    @staticmethod
    def _cores_per_rank() -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, (cores or 1) // torch.distributed.get_world_size())

    def _build_module(self) -> torch.nn.Module:
        ours = self.model_config.model_type
        # verl's builder branches on this name; restored for everything that follows.
        self.model_config.model_type = "language_model"
        try:
            module = super()._build_module()
        finally:
            self.model_config.model_type = ours
        if hasattr(module, "visual"):
            module.visual.requires_grad_(False)
        banned = response_banned_token_ids(
            self.model_config.tokenizer, self.model_config.generation_config
        )
        return as_policy(module, banned)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        if get_device_name() != "cpu":
            return super()._build_fsdp_module(module)
        # The reference model asks for pinned host memory, which needs an accelerator.
        stock = fsdp.CPUOffloadPolicy
        fsdp.CPUOffloadPolicy = lambda pin_memory=False: stock(pin_memory=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            fsdp.CPUOffloadPolicy = stock

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs, with features in the place of the keys that rollouts carry."""
        rows = clip_rows(micro_batch)
        if not any(CLIP_KEY in row for row in rows):
            return super().prepare_model_inputs(micro_batch)
        inputs, output_args = super().prepare_model_inputs(micro_batch.exclude("multi_modal_inputs"))
        inputs.update(clip_inputs(rows, READER, micro_batch["input_ids"].device))
        return inputs, output_args

    def get_per_tensor_param(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Any]], Any]:
        """Parameters for vLLM, as (name, full tensor), under the names of a complete folder."""
        parameters, peft_config = super().get_per_tensor_param(**kwargs)
        return ((THINKER_PREFIX + name, tensor) for name, tensor in parameters), peft_config
