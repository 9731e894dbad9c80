"""One turn of audio chat: messages -> prompt tokens and features -> vLLM -> response.

verl builds a prompt, decodes its clip and extracts its features once per *rollout* and three times
over. Here all of that happens once per *prompt*: the n sessions of a group share one
`EncodedPrompt`, whose features go into TransferQueue once (`feature_store`), whose waveform goes
into Ray's object store once, and which is dropped when the last session is done. Validation stores
no features: nothing trains on its rollouts.

Selected by two public keys:
    actor_rollout_ref.rollout.agent.default_agent_loop: soundmind_audio
    actor_rollout_ref.rollout.agent.agent_loop_manager_class:
    soundmind.training.agent_loop.AudioAgentLoopManager
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

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

from soundmind.model.tokens import (
    BANNED_LOGIT_BIAS,
    collapse_placeholders,
    response_banned_token_ids,
)
from soundmind.plugin.verl_entry import require_loaded
from soundmind.task.reward import ROW_KEYS
from soundmind.training import failures, feature_store

logger = logging.getLogger(__name__)

AGENT_LOOP = "soundmind_audio"
ROW = "row"  # what a saved response needs to be scored again, as JSON (see trainer.py)
VALIDATE = "validate"  # from the loop to the worker's `_compute_score`

# Prompts under way in a worker: 3.8 MB of waveform for a one-minute clip, so about 280 of them.
ENCODED_BYTES = 2**30


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as trainer and rollout engine need it; shared by the n sessions of a group."""

    token_ids: list[int]  # placeholders expanded: one per audio embedding
    server_token_ids: list[int]  # placeholders collapsed: one per clip
    # Reference to the waveforms, list of (num_samples,) float32 at 16 kHz, in Ray's object store.
    clips: Any | None
    clip_key: dict[str, Any]  # a rollout's `multi_modal_inputs`: where its features are
    nbytes: int  # of the waveforms


class PromptEncodings:
    """The encodings of the prompts under way, each made once and dropped by `release`.

    Prompts are encoded one after the other, and none while those under way hold `max_bytes` or
    more: long clips wait for their turn instead of filling the memory.
    """

    def __init__(self, max_bytes: int = ENCODED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._tasks: dict[str, asyncio.Task[EncodedPrompt]] = {}
        self._sizes: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tasks)

    async def get(self, uid: str, encode: Callable[[], Awaitable[EncodedPrompt]]) -> EncodedPrompt:
        """The encoding of prompt `uid`; `encode()` runs for the first session that asks."""
        task = self._tasks.get(uid)
        if task is None:
            task = asyncio.ensure_future(self._encode(uid, encode))
            self._tasks[uid] = task
        # A session that is cancelled must not cancel the encoding its siblings wait for.
        return await asyncio.shield(task)

    def release(self, uid: str) -> None:
        """Forget prompt `uid`, all of whose sessions are done; unknown ones are ignored."""
        task = self._tasks.pop(uid, None)
        if task is not None:
            task.cancel()  # only matters where every session was cancelled before its turn came
        self.held_bytes -= self._sizes.pop(uid, 0)
        self._released.set()

    async def _encode(
        self, uid: str, encode: Callable[[], Awaitable[EncodedPrompt]]
    ) -> EncodedPrompt:
        async with self._turn:
            while self.held_bytes >= self.max_bytes:
                self._released.clear()
                await self._released.wait()
            prompt = await encode()
            self._sizes[uid] = prompt.nbytes
            self.held_bytes += prompt.nbytes
            return prompt


def server_logit_bias(tokenizer: Any, path: str) -> dict[int, float]:
    """Banned tokens as vLLM takes them with a request.

    verl's server masks the head's rows beyond the tokenizer by itself. To send them along would cost
    vLLM a walk through some 400 ids a request at every change of its batch.
    """
    banned = response_banned_token_ids(tokenizer, path)
    return {token: BANNED_LOGIT_BIAS for token in banned if token < len(tokenizer)}


def stream_seed(seed: int, uid: str, session: int) -> int:
    """Seed of a response's own random stream, below 2**63: the same whenever its request arrives.

    `uid` names the prompt among all of a run (`SoundMindTrainer._prompt_name`).
    """
    digest = hashlib.blake2b(f"{seed}/{uid}/{session}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@register(AGENT_LOOP)
class AudioAgentLoop(AgentLoopBase):
    """Single-turn chat whose prompt may hold a clip; one instance serves all of a worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_loaded()
        self.encodings = PromptEncodings()
        self._feature_dtype = feature_store.transit_dtype(self.config)
        self._logit_bias = server_logit_bias(
            self.tokenizer, self.config.actor_rollout_ref.model.path
        )
        if self.processor is None:
            raise ValueError(
                "the agent loop got no processor, so audio would be dropped; set "
                "actor_rollout_ref.model._target_=soundmind.training.model_config.OmniModelConfig"
            )

    async def run(
        self, sampling_params: dict[str, Any], *, validate: bool = False, **kwargs: Any
    ) -> AgentLoopOutput:
        """One response to `raw_prompt` (messages); `uid` names the prompt among its n sessions."""
        messages = list(kwargs["raw_prompt"])
        uid = str(kwargs["uid"])
        step = None if validate else int(kwargs["global_steps"])
        prompt = await self.encodings.get(uid, lambda: self._encode(uid, messages, step))

        metrics: dict[str, Any] = {}
        if self.config.run.response_streams:
            seed = stream_seed(self.config.run.seed, uid, int(kwargs["session_id"]))
            sampling_params = {**sampling_params, "seed": seed}
        with simple_timer("generate_sequences", metrics):
            output = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt.server_token_ids,
                sampling_params={**sampling_params, "logit_bias": self._logit_bias},
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
            multi_modal_data=dict(prompt.clip_key),
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
                VALIDATE: validate,
            },
        )

    async def _encode(
        self, uid: str, messages: list[dict[str, Any]], step: int | None
    ) -> EncodedPrompt:
        """Decode the clip, render and tokenise the prompt, extract features: once per prompt.

        Features are stored under `uid` for training step `step`; `None` stores none.
        """
        started = time.monotonic()
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
                "the chat template must render one placeholder per audio part"
            )
        clip_key: dict[str, Any] = {}
        if clips and step is not None:
            packed = feature_store.pack(features, self._feature_dtype)
            await feature_store.put(uid, step, packed, time.monotonic() - started)
            clip_key = {feature_store.CLIP_KEY: uid, feature_store.STEP: step}
        return EncodedPrompt(
            token_ids=token_ids,
            server_token_ids=server_token_ids,
            # verl's client hands it on as an argument of the server's method, where Ray puts the
            # waveforms in its place.
            clips=ray.put(clips) if clips else None,
            clip_key=clip_key,
            nbytes=sum(clip.nbytes for clip in clips or []),
        )


class AudioAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """verl's worker, passing on where the features are that the loop has stored.

    The loop keeps nothing of a session, so one instance serves them all; verl would build one
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
        if agent_name != AGENT_LOOP:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        validate = trajectory["validate"]
        try:
            output = await self._loop().run(sampling_params, validate=validate, **kwargs)
            return await self._agent_loop_postprocess(output, validate, **kwargs)
        except Exception as error:
            await failures.note(str(kwargs["uid"]), int(kwargs["session_id"]), error)
            raise  # verl logs it and counts the session as failed

    async def _run_prompt(self, prompt: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The n sessions of a prompt, verl's; afterwards nothing of it stays in this process."""
        uid = str(prompt["uid"])
        try:
            await super()._run_prompt(prompt, *args, **kwargs)
        finally:
            self._loop().encodings.release(uid)

    def _loop(self) -> AudioAgentLoop:
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
        return self._audio_loop

    def _compute_multi_modal_inputs(
        self, output: AgentLoopOutput, input_ids: torch.Tensor
    ) -> dict[str, Any]:
        return dict(output.multi_modal_data or {})

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        validate = outputs[-1].extra_fields.pop(VALIDATE)
        await super()._compute_score(outputs, kwargs)
        info = outputs[-1].extra_fields.get("reward_extra_info")
        if info is not None:
            if info.get("reward_error"):
                error = failures.ScoreError(
                    info.get("reward_error_cause") or "see the reward's log"
                )
                if not validate:
                    raise error  # the response is not stored, so that no update can use it
                await failures.note(str(kwargs["uid"]), int(kwargs["session_id"]), error)
            row = kwargs.get("extra_info") or {}
            # Strings only: verl averages every number it finds here over a validation.
            info["id"] = str(row.get("id", kwargs.get("index", "")))
            info["finish_reason"] = outputs[-1].extra_fields["finish_reason"]
            info[ROW] = json.dumps(
                {
                    "data_source": kwargs.get("data_source"),
                    "split": row.get("split"),
                    **{name: row[name] for name in ROW_KEYS if row.get(name) is not None},
                },
                default=float,
            )


class AudioAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with our worker class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(AudioAgentLoopWorker)
