"""What a micro-batch brings into the policy's forward and takes out of it, beside verl's own.

In: the features of each distinct clip, in the place of the keys that rollouts carry
(`feature_store`), and with `train.share_prompts` each distinct prompt once for all of its responses
(`soundmind.training.shared_prompts`). Out: logits at the positions that predict a response token,
and nowhere else. verl computes them at every position and cuts the prompt's away afterwards; behind
a one-minute clip those are 1,600 positions of 150,000 logits each, more than a 700-token answer has. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.utils import tensordict_utils as tu

from soundmind.training.feature_store import CLIP_KEY, READER, clip_inputs, clip_rows
from soundmind.training.shared_prompts import SharedRows, pack_groups, prompt_groups, share_prompts
from soundmind.training.utilisation import CURRENT_PASS

RESPONSES = "response_positions"  # in verl's `output_args`


def response_positions(micro_batch: Any) -> torch.Tensor | None:
    """Positions whose logits predict a response token, in the sequences laid end to end.

    `input_ids` and `responses` are nested (batch, ragged), each response at the end of its
    sequence. Returns (response tokens,) int64, or `None` for a batch without responses.
    """
    if "responses" not in micro_batch.keys():  # noqa: SIM118 - a TensorDict iterates over rows
        return None
    ends = micro_batch["input_ids"].offsets()[1:]
    lengths = micro_batch["responses"].offsets().diff()
    total = int(lengths.sum())
    first = torch.repeat_interleave(ends - lengths - 1, lengths)
    within = torch.arange(total, device=ends.device) - torch.repeat_interleave(
        lengths.cumsum(0) - lengths, lengths
    )
    return first + within


def in_padded_batch(positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same positions where every sequence begins a row as long as the longest."""
    row = torch.searchsorted(offsets, positions, right=True) - 1
    return positions - offsets[row] + row * offsets.diff().max()


def split_rows(batch: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Prompts and responses of a batch, each (tokens,) int64; a sequence is one behind the other."""
    responses = list(batch["responses"].unbind())
    sequences = batch["input_ids"].unbind()
    prompts = [
        whole[: len(whole) - len(response)]
        for whole, response in zip(sequences, responses, strict=True)
    ]
    return prompts, responses


def prompt_names(rows: list[dict[str, Any]]) -> list[Hashable]:
    """What tells prompts with equal tokens apart, rollout by rollout: the key of their clips.

    A rollout that carries features itself has no key and shares with none.
    """
    return [
        row.get(CLIP_KEY, ("alone", number) if row else None) for number, row in enumerate(rows)
    ]


def shared_micro_batches(
    data: Any, dp_group: Any = None, **_: Any
) -> tuple[list[Any], list[list[int]]]:
    """verl's `prepare_micro_batches` with siblings together, under the same budget of tokens.

    Every rank makes as many as the one that needs most, as FSDP's collectives ask for.
    """
    prompts, responses = split_rows(data)
    names = prompt_names(clip_rows(data)) if "multi_modal_inputs" in data.keys() else None  # noqa: SIM118
    groups = list(prompt_groups(prompts, names or [None] * len(prompts)).values())
    lengths = [len(prompt) for prompt in prompts], [len(response) for response in responses]
    budget = int(data["max_token_len_per_gpu"])
    indices = pack_groups(groups, *lengths, budget)
    if torch.distributed.is_initialized() and dp_group is not None:
        count = torch.tensor([len(indices)], device=fsdp.get_device_name())
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=dp_group)
        indices = pack_groups(groups, *lengths, budget, at_least=int(count.item()))
    return [tu.index_select_tensor_dict(data, rows) for rows in indices], indices


class OmniMicroBatches(fsdp.FSDPEngineWithLMHead):
    """verl's FSDP engine with stored clips on the way in and response logits on the way out."""

    def _shares_prompts(self, data: Any) -> bool:
        wanted = getattr(self.engine_config, "share_prompts", False)
        return wanted and "responses" in data.keys()  # noqa: SIM118

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """verl's pass over a mini-batch, its micro-batches chosen by us where prompts are shared."""
        dynamic = tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True)
        if not (self._shares_prompts(data) and dynamic):
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        # verl looks the function up in its module; nothing else of this process splits batches now.
        stock = fsdp.prepare_micro_batches
        fsdp.prepare_micro_batches = shared_micro_batches
        try:
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        finally:
            fsdp.prepare_micro_batches = stock

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs, with features in the place of keys, and where logits are wanted."""
        # B rollouts of a ragged L tokens each, N response tokens of all of them.
        # 1. verl's own: input_ids (1, sum of L) packed or (B, longest L) padded; no features.
        rows = clip_rows(micro_batch)
        keyed = any(CLIP_KEY in row for row in rows)
        inputs, output_args = super().prepare_model_inputs(
            micro_batch.exclude("multi_modal_inputs") if keyed else micro_batch
        )
        # 2. Where logits are wanted, (N,), and each distinct prompt once in the place of B rows.
        device = micro_batch["input_ids"].device
        positions = None if self.use_ulysses_sp else response_positions(micro_batch)
        shared = None
        if positions is not None and self._shares_prompts(micro_batch):
            shared = self._share(micro_batch, rows, inputs)
            rows = [rows[row] for row in shared.first] if rows else rows
        # 3. The clips of the rows that are left, each distinct one once.
        if keyed:
            inputs.update(clip_inputs(rows, READER, device))
        # 4. The same positions in the layout that the model gets.
        if positions is not None:
            output_args[RESPONSES] = positions
            packed = tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True)
            if shared is not None:
                inputs["logit_positions"] = shared.logit_positions
            elif packed:
                inputs["logit_positions"] = positions
            else:
                offsets = micro_batch["input_ids"].offsets()
                inputs["logit_positions"] = in_padded_batch(positions, offsets)
        return inputs, output_args

    def _share(
        self, micro_batch: Any, rows: list[dict[str, Any]], inputs: dict[str, Any]
    ) -> SharedRows:
        """Put each distinct prompt once in the place of verl's rows in `inputs`."""
        prompts, responses = split_rows(micro_batch)
        names = prompt_names(rows) if rows else [None] * len(prompts)
        pad_token_id = tu.get_non_tensor_data(data=micro_batch, key="pad_token_id", default=0)
        shared = share_prompts(prompts, responses, names, pad_token_id)
        inputs["input_ids"] = shared.input_ids
        inputs["position_ids"] = shared.position_ids
        inputs["attention_mask"] = shared.attention_mask
        CURRENT_PASS.repeated.extend(shared.repeated)
        return shared

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """verl's outputs, nested like `input_ids`; zero at positions that predict the prompt."""
        positions = output_args.get(RESPONSES)
        if positions is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        # 1. logits (1, N, V) of response tokens alone -> verl's log-probabilities, nested (B, R).
        lengths = micro_batch["responses"].offsets().diff()
        temperature = output_args.get("temperature_rmpad")
        # verl's code for packed sequences, told that the responses are all there is.
        responses = micro_batch.copy()
        responses["input_ids"] = micro_batch["responses"]
        tu.assign_non_tensor(responses, use_remove_padding=True)
        found = super().prepare_model_outputs(
            output,
            {
                "input_ids_rmpad_rolled": output_args["input_ids_rmpad_rolled"][positions],
                "temperature_rmpad": (
                    torch.repeat_interleave(output_args["temperature"], lengths)
                    if temperature is None
                    else temperature[positions]
                ),
                "temperature_is_one": output_args["temperature_is_one"],
                "pad_size": 0,
            },
            responses,
            logits_processor_func,
        )
        # 2. Back to nested (B, L), zero where a prompt token is predicted.
        offsets = micro_batch["input_ids"].offsets()
        total = micro_batch["input_ids"].values().shape[0]
        return {
            name: torch.nested.nested_tensor_from_jagged(
                values.values()
                .new_zeros(total, *values.values().shape[1:])
                .index_copy(0, positions, values.values()),
                offsets,
            )
            for name, values in found.items()
        }
