"""The talker's inputs out of the policy's own forward pass, as one more output of the engine.

Asked for by token ids beside the rows (`TALKER_MARKS`). What the language model is fed and gives is
noted by a hook, whatever wraps it (FSDP2, LoRA), and the embeddings of the marks are read there, where
FSDP2 has the table together. Prompts are not shared in such a pass: every row's states are wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel
from verl.utils import tensordict_utils as tu

from soundmind.speech.states import combine
from soundmind.training.micro_batch import OmniMicroBatches, in_padded_batch

TALKER_MARKS, TALKER_STATES = "talker_marks", "talker_states"


class TalkerStates(OmniMicroBatches):
    """Micro-batches that give states for the talker instead of log-probabilities, if asked to."""

    talker_marks: torch.Tensor  # embeddings (marks, hidden size), of the last pass

    def _shares_prompts(self, data: Any) -> bool:
        return TALKER_MARKS not in data.keys() and super()._shares_prompts(data)  # noqa: SIM118

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        marks = tu.get_non_tensor_data(micro_batch, key=TALKER_MARKS, default=None)
        if marks is not None:
            inputs["logit_positions"] = inputs["logit_positions"][:1]  # nobody reads logits
            output_args[TALKER_STATES] = self._note(inputs["input_ids"], marks)
        return inputs, output_args

    def _note(self, input_ids: torch.Tensor, marks: str) -> dict[str, Any]:
        """A dictionary that the next forward pass fills with states, (batch, length, hidden size)."""
        ids = torch.tensor([int(mark) for mark in marks.split()], device=input_ids.device)
        processor, tokenizer = self.model_config.processor, self.model_config.tokenizer
        audio_token = int(tokenizer.convert_tokens_to_ids(processor.audio_token))
        language_model = next(
            module
            for module in self.module.modules()
            if isinstance(module, Qwen2_5OmniThinkerTextModel)
        )
        noted: dict[str, Any] = {}

        def note(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden, embeddings = output.last_hidden_state, kwargs["inputs_embeds"]
            noted["states"] = combine(hidden, embeddings, input_ids, audio_token)
            self.talker_marks = module.get_input_embeddings()(ids).detach()

        noted["hook"] = language_model.register_forward_hook(note, with_kwargs=True)
        return noted

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """verl's outputs, or states nested like `input_ids`, (batch, ragged, hidden size)."""
        noted = output_args.get(TALKER_STATES)
        if noted is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        noted["hook"].remove()
        states, offsets = noted["states"], micro_batch["input_ids"].offsets()
        positions = torch.arange(int(offsets[-1]), device=offsets.device)
        if len(states) > 1:
            positions = in_padded_batch(positions, offsets)
        values = states.flatten(0, 1)[positions]
        return {TALKER_STATES: torch.nested.nested_tensor_from_jagged(values, offsets)}
