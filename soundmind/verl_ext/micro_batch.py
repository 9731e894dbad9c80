"""What a micro-batch brings into the policy's forward and takes out of it, beside verl's own.

In: the features of each distinct clip, in the place of the keys that rollouts carry
(`feature_store`). Out: logits at the positions that predict a response token, and nowhere else.
verl computes them at every position and cuts the prompt's away afterwards; behind a one-minute
clip those are 1,600 positions of 150,000 logits each, more than a 700-token answer has. [ours]
"""

from __future__ import annotations

from typing import Any

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.utils import tensordict_utils as tu

from soundmind.verl_ext.feature_store import CLIP_KEY, READER, clip_inputs, clip_rows

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


class OmniMicroBatches(fsdp.FSDPEngineWithLMHead):
    """verl's FSDP engine with stored clips on the way in and response logits on the way out."""

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs, with features in the place of keys, and where logits are wanted."""
        rows = clip_rows(micro_batch)
        keyed = any(CLIP_KEY in row for row in rows)
        inputs, output_args = super().prepare_model_inputs(
            micro_batch.exclude("multi_modal_inputs") if keyed else micro_batch
        )
        device = micro_batch["input_ids"].device
        if keyed:
            inputs.update(clip_inputs(rows, READER, device))
        positions = None if self.use_ulysses_sp else response_positions(micro_batch)
        if positions is not None:
            output_args[RESPONSES] = positions
            packed = tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True)
            inputs["logit_positions"] = (
                positions
                if packed
                else in_padded_batch(positions, micro_batch["input_ids"].offsets())
            )
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """verl's outputs, nested like `input_ids`; zero at positions that predict the prompt."""
        positions = output_args.get(RESPONSES)
        if positions is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
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
