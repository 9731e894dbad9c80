"""FSDP engine for Qwen2.5-Omni's thinker, registered for verl as model type `omni_thinker`.

The numerics are verl's (`FSDPEngineWithLMHead`); what is changed, and why:

1. The module is verl's automatic class with a forward of ours (`soundmind.training.policy`).
2. Vision is never loaded, and the audio tower and its projector are trained or frozen as
   `train.audio_tower` and `train.projector` say. [ours; verl's `freeze_vision_tower` is not read]
   Frozen parameters are kept from the optimizer. A table of it is printed at the start.
3. Weight names get the prefix `thinker.`, which vLLM's Omni model expects.
4. LoRA adapters stand in the language model alone, are kept in float32 beside a base in bfloat16,
   and reach the rollout merged (`soundmind.model.lora`).
5. Without an accelerator: no pinned memory. With `forward_prefetch`: the layer that comes next.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import verl.utils.model as verl_model
import verl.workers.engine.fsdp.transformer_impl as fsdp
from torch.distributed.fsdp import FSDPModule
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as THINKER
from verl.utils.device import get_device_name
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import EngineRegistry

from soundmind.model import lora
from soundmind.model.folder import folder_shapes
from soundmind.model.parts import (
    NOT_LOADED,
    THINKER_PREFIX,
    format_table,
    part_of,
    table_rows,
    trained_parts,
)
from soundmind.model.tokens import response_banned_token_ids
from soundmind.planning.flops import Trained
from soundmind.plugin.verl_entry import require_loaded
from soundmind.training.policy import as_policy
from soundmind.training.talker_states import TalkerStates
from soundmind.training.utilisation import CURRENT_PASS, thinker_flops

logger = logging.getLogger(__name__)

thinker_flops()  # verl reports an MFU of 0 for model types that it does not know


def training_class(thinker_class: type) -> type:
    """`thinker_class` as training needs it: no vision tower, no activations of a frozen tower.

    Loading a complete folder passes over whatever is not of this class. Models are built without
    storage and filled from the files, so vision takes no memory at any moment.
    """

    class TrainingThinker(thinker_class):
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - transformers' own form
            *(getattr(thinker_class, "_keys_to_ignore_on_load_unexpected", None) or []),
            *(r"^(thinker\.)?visual\.", r"^talker\.", r"^token2wav\."),
        ]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            del self.visual

        def get_audio_features(self, *args: Any, **kwargs: Any) -> Any:
            # Gradient checkpointing and PEFT make every encoder's input require a gradient; a frozen
            # tower would keep its activations for a backward pass that nobody needs.
            trained = any(parameter.requires_grad for parameter in self.audio_tower.parameters())
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                return super().get_audio_features(*args, **kwargs)

    TrainingThinker.__name__ = thinker_class.__name__
    return TrainingThinker


def prefetch_in_order(module: torch.nn.Module) -> None:
    """Let every FSDP2 unit of the thinker gather the one that computes next.

    verl goes by the order in which modules are named: the last audio layer would gather the embedding
    table, which has been used by then, and nothing would gather the first one.
    """
    order = ("embed_tokens", "audio_tower.layers.", "model.layers.", "lm_head")
    units: list[list[FSDPModule]] = [[] for _ in order]
    for name, unit in module.named_modules():
        if isinstance(unit, FSDPModule):
            unit.set_modules_to_forward_prefetch([])
            for place, part in enumerate(order):
                if part in name:
                    units[place].append(unit)
    chain = [unit for part in units for unit in part]
    for unit, following in pairwise(chain):
        unit.set_modules_to_forward_prefetch([following])


def add_in_one_order() -> None:
    """Let the CPU add gradients in the same order every time, so that one seed is one run.

    Where responses share a prompt, its last position is wanted once a response, and threads would add
    up the gradients of those as they come.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for faults, not needed


@EngineRegistry.register(
    model_type="omni_thinker", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"]
)
class OmniFSDPEngine(TalkerStates):
    """verl's FSDP engine for the thinker of a complete Qwen2.5-Omni folder."""

    def initialize(self) -> None:
        require_loaded()
        torch.manual_seed(self.engine_config.seed)  # what a new adapter starts from
        if get_device_name() == "cpu":
            # In `sync` mode nothing else runs while the actor trains, so it may use all cores.
            threads = os.environ.get("SOUNDMIND_ACTOR_THREADS")
            torch.set_num_threads(int(threads) if threads else self._cores_per_rank())
            add_in_one_order()
        super().initialize()

    @staticmethod
    def _cores_per_rank() -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, (cores or 1) // torch.distributed.get_world_size())

    def _build_module(self) -> torch.nn.Module:
        ours = self.model_config.model_type
        # verl's builder branches on this name; restored for everything that follows.
        self.model_config.model_type = "language_model"
        automatic = verl_model.get_hf_auto_model_class
        verl_model.get_hf_auto_model_class = lambda hf_config: training_class(THINKER)
        try:
            module = super()._build_module()
        finally:
            self.model_config.model_type = ours
            verl_model.get_hf_auto_model_class = automatic
        trained = frozenset() if self.engine_config.forward_only else self._trained_parts()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(part_of(name) in trained)
        banned = response_banned_token_ids(
            self.model_config.tokenizer, self.model_config.local_path
        )
        return as_policy(module, banned)

    def forward_backward_batch(
        self, data: Any, loss_function: Any, forward_only: bool = False
    ) -> Any:
        parts = self._trained_parts()
        trained = Trained("audio_tower" in parts, "projector" in parts, self.model_config.lora_rank)
        responses = data["responses"].values().shape[0] if "responses" in data.keys() else None  # noqa: SIM118
        CURRENT_PASS.begin(forward_only, trained, responses)  # for verl's utilisation
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _trained_parts(self) -> frozenset[str]:
        """Parts whose own weights this engine trains; see `soundmind.model.parts`."""
        train = {
            "audio_tower": getattr(self.engine_config, "train_audio_tower", True),
            "projector": getattr(self.engine_config, "train_projector", True),
        }
        return trained_parts(train, self.model_config.lora_rank)

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        # verl hands over every parameter; an optimizer that decays without a gradient, or makes its
        # state early, would then touch or pay for frozen ones.
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return build_optimizer(trained, self.optimizer_config)

    def _print_parts(self, module: torch.nn.Module) -> None:
        """The table of parameters by part, once, from the module as it goes into FSDP."""
        if self.rank != 0 or self.engine_config.forward_only:
            return
        parameters: Counter[str] = Counter()
        adapter = 0
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                adapter += parameter.numel()
            else:
                parameters[part_of(name)] += parameter.numel()
        for name, shape in folder_shapes(Path(self.model_config.local_path)).items():
            if (part := part_of(name)) in NOT_LOADED:
                parameters[part] += math.prod(shape)
        lines = table_rows(parameters, self._trained_parts(), self.model_config.lora_rank, adapter)
        print("what is trained:\n" + format_table(lines), flush=True)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        self._print_parts(module)
        stock = fsdp.CPUOffloadPolicy
        if get_device_name() == "cpu":
            # The reference model asks for pinned host memory, which needs an accelerator.
            fsdp.CPUOffloadPolicy = lambda pin_memory=False: stock(pin_memory=False)
        try:
            module = super()._build_fsdp_module(module)
        finally:
            fsdp.CPUOffloadPolicy = stock
        if self.engine_config.forward_prefetch and self.engine_config.strategy == "fsdp2":
            prefetch_in_order(module)
        return module

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        if self.engine_config.strategy != "fsdp2":
            raise lora.LoraError(
                f"LoRA needs actor_rollout_ref.actor.strategy=fsdp2, not {self.engine_config.strategy}"
            )
        module = super()._build_lora_module(module)
        lora.require_language_model(
            (name for name, _ in module.named_parameters()), self.model_config.target_modules
        )
        lora.scale_of(_adapter_settings(module))
        for parameter in module.parameters():
            if parameter.requires_grad:
                # verl casts the adapter to the base's type; in bfloat16 small updates would vanish.
                # FSDP2 asks one type of the trained parameters only.
                parameter.data = parameter.data.float()
        return module

    def get_per_tensor_param(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Any]], Any]:
        """Parameters for vLLM, as (name, full tensor), under the names of a complete folder.

        With LoRA merged ones; the weights in training are not touched.
        """
        if self._is_lora:
            return self._merged_parameters(), None
        parameters, peft_config = super().get_per_tensor_param(**kwargs)
        return ((THINKER_PREFIX + name, tensor) for name, tensor in parameters), peft_config

    def _merged_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = fsdp.get_device_id()

        def whole(tensor: Any) -> torch.Tensor:
            # A shard that is offloaded comes to the device by itself, the others stay where they are.
            tensor = tensor.detach().to(device, non_blocking=True)
            return tensor.full_tensor() if isinstance(tensor, fsdp.DTensor) else tensor.clone()

        scale = lora.scale_of(_adapter_settings(self.module))
        state = self.module.state_dict()
        for name, tensor in lora.merged_weights(state, scale, whole):
            yield THINKER_PREFIX + name, tensor

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._is_lora and self.rank == 0:
            # verl notes rank and alpha only; an export needs PEFT's own settings.
            path = Path(local_path) / lora.ADAPTER_CONFIG
            path.write_text(json.dumps(_adapter_settings(self.module), indent=2) + "\n")


def _adapter_settings(module: torch.nn.Module) -> dict[str, Any]:
    """PEFT's settings of the adapter, as plain values that JSON can hold."""
    settings = module.peft_config["default"].to_dict()
    plain = {}
    for name, value in settings.items():
        value = sorted(value) if isinstance(value, set) else value
        plain[name] = getattr(value, "value", value)
    return plain
