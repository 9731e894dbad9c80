"""One turn of audio chat: messages -> prompt tokens and features -> vLLM -> response.

verl builds a prompt, decodes its clip and extracts its features once per *rollout* and three times
over. Here all of that happens once per *prompt*: the n sessions of a group share one
`EncodedPrompt`, and the worker hands its features to the trainer instead of computing them again.

Selected by two public keys:
    actor_rollout_ref.rollout.agent.default_agent_loop: soundmind_audio
    actor_rollout_ref.rollout.agent.agent_loop_manager_class:
    soundmind.verl_ext.agent_loop.AudioAgentLoopManager
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import torch
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopOutput,
    DictConfigWrap,
    register,
)
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.profiler import simple_timer

from soundmind.rewards import ROW_KEYS
from soundmind.tokens import (
    BANNED_LOGIT_BIAS,
    collapse_placeholders,
    response_banned_token_ids,
)
from soundmind.verl_ext.plugin import require_loaded

logger = logging.getLogger(__name__)

AGENT_LOOP = "soundmind_audio"
FEATURES = "features"  # key in AgentLoopOutput.multi_modal_data, dropped by verl before storage
ROW = "row"  # what a saved response needs to be scored again, as JSON (see trainer.py)
SHARED_PROMPTS = 1024  # prompts whose encoding a worker remembers; a step needs its batch


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as trainer and rollout engine need it; shared by the n sessions of a group."""

    token_ids: list[int]  # placeholders expanded: one per audio embedding
    server_token_ids: list[int]  # placeholders collapsed: one per clip
    clips: list[np.ndarray] | None  # waveforms (num_samples,) float32, 16 kHz
    features: dict[str, torch.Tensor]  # input_features (clips, 128, frames), feature_attention_mask


class PromptEncodings:
    """The running or finished encoding of each prompt, by its uid, least recently used first."""

    def __init__(self, capacity: int = SHARED_PROMPTS) -> None:
        self.capacity = capacity
        self._tasks: OrderedDict[str, asyncio.Task[EncodedPrompt]] = OrderedDict()

    async def get(self, uid: str, encode: Any) -> EncodedPrompt:
        """The encoding of prompt `uid`; `encode()` runs for the first session that asks."""
        task = self._tasks.get(uid)
        if task is None:
            task = asyncio.ensure_future(encode())
            self._tasks[uid] = task
            while len(self._tasks) > self.capacity:
                self._tasks.popitem(last=False)
        # A session that is cancelled must not cancel the encoding its siblings wait for.
        return await asyncio.shield(task)


_ENCODINGS = PromptEncodings()


@register(AGENT_LOOP)
class AudioAgentLoop(AgentLoopBase):
    """Single-turn chat whose prompt may hold a clip. One instance per session; state is the "
    "worker's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_loaded()
        if self.processor is None:
            raise ValueError(
                "the agent loop got no processor, so audio would be dropped; set "
                "actor_rollout_ref.model._target_=soundmind.verl_ext.model.OmniModelConfig"
            )

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """One response to `raw_prompt` (messages); `uid` names the prompt among its n sessions."""
        messages = list(kwargs["raw_prompt"])
        uid = str(kwargs.get("uid") or uuid4().hex)
        prompt = await _ENCODINGS.get(uid, lambda: self._encode(messages))

        metrics: dict[str, Any] = {}
        with simple_timer("generate_sequences", metrics):
            output = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt.server_token_ids,
                sampling_params={**sampling_params, "logit_bias": self._logit_bias()},
                audio_data=prompt.clips,
                mm_processor_kwargs=self._get_mm_processor_kwargs(prompt.clips),
            )
        metrics["num_preempted"] = -1 if output.num_preempted is None else output.num_preempted

        response_ids = list(output.token_ids)[: self.rollout_config.response_length]
        if not response_ids:
            raise RuntimeError(f"vLLM returned no token for prompt {uid} ({output.stop_reason})")
        return AgentLoopOutput(
            prompt_ids=prompt.token_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=(
                list(output.log_probs)[: len(response_ids)] if output.log_probs else None
            ),
            multi_modal_data={FEATURES: prompt.features},
            num_turns=2,
            metrics=metrics,
            extra_fields={
                **output.extra_fields,
                "turn_scores": [],
                "tool_rewards": [],
                # Reaches the reward function in `extra_info`: the length in the policy's own
                # tokens, the end token included.
                "response_tokens": len(response_ids),
                "finish_reason": str(output.stop_reason),
            },
        )

    async def _encode(self, messages: list[dict[str, Any]]) -> EncodedPrompt:
        """Decode the clip, render and tokenise the prompt, extract features: once per prompt."""
        media = await self.process_multi_modal_info(messages)
        clips = media.get("audios") or None
        features: dict[str, Any] = {}
        token_ids = await self.ct_build_initial_tokens(
            messages, audios=clips, mm_inputs_out=features
        )
        audio_token_id = self.tokenizer.convert_tokens_to_ids(self.processor.audio_token)
        server_token_ids = collapse_placeholders(token_ids, audio_token_id)
        placeholders = server_token_ids.count(audio_token_id)
        if placeholders != len(clips or []):
            raise ValueError(
                f"the prompt has {placeholders} audio placeholders for {len(clips or [])} clips; "
                f"the "
                "chat template must render one placeholder per audio part"
            )
        kept = ("input_features", "feature_attention_mask")
        return EncodedPrompt(
            token_ids=token_ids,
            server_token_ids=server_token_ids,
            clips=clips,
            features={name: torch.as_tensor(features[name]) for name in kept} if clips else {},
        )

    def _logit_bias(self) -> dict[int, float]:
        cached = getattr(self.tokenizer, "_soundmind_logit_bias", None)
        if cached is None:
            banned = response_banned_token_ids(self.tokenizer)
            cached = dict.fromkeys(banned, BANNED_LOGIT_BIAS)
            self.tokenizer._soundmind_logit_bias = cached
        return cached


class AudioAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """verl's worker, passing on the features the loop already has.

    The loop keeps nothing between sessions, so one instance serves them all; verl would build one
    for every rollout, configuration copy included.
    """

    # Ray copies the constructor of an actor class and ships the copy by value. An inherited one
    # would take verl's decorated class along as a second copy, which its own `super()` then
    # rejects.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._audio_loop: AudioAgentLoop | None = None

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        if agent_name != AGENT_LOOP or trace:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        if self._audio_loop is None:
            self._audio_loop = AudioAgentLoop(
                trainer_config=DictConfigWrap(config=self.config),
                server_manager=self.llm_client,
                tokenizer=self.tokenizer,
                processor=self.processor,
                dataset_cls=self.dataset_cls,
                data_config=DictConfigWrap(self.config.data),
                hf_model_type=self.hf_model_type,
            )
        output = await self._audio_loop.run(sampling_params, **kwargs)
        return await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

    def _compute_multi_modal_inputs(
        self, output: AgentLoopOutput, input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return dict((output.multi_modal_data or {}).get(FEATURES) or {})

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        await super()._compute_score(outputs, kwargs)
        info = outputs[-1].extra_fields.get("reward_extra_info")
        if info is not None:
            row = kwargs.get("extra_info") or {}
            # Strings only: verl averages every number it finds here over a validation.
            info["id"] = str(row.get("id", kwargs.get("index", "")))
            info["finish_reason"] = outputs[-1].extra_fields["finish_reason"]
            info[ROW] = json.dumps(
                {
                    "data_source": kwargs.get("data_source"),
                    **{name: row[name] for name in ROW_KEYS if row.get(name) is not None},
                },
                default=float,
            )


class AudioAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with our worker class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(AudioAgentLoopWorker)
