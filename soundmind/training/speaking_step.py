"""A step's rollouts spoken and graded on their speech, on the trainer's side.

columns out   a seed for every rollout that is spoken, -1 for padding and other groups
workers       speak (`soundmind.training.speech`)
columns in    rm_scores and reward entries, by the reward of the rollout with its speech in the row
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.utils import tensordict_utils as tu

from soundmind.task.reward import compute_score
from soundmind.training.agent_loop import ROW
from soundmind.training.speech import AUDIT, SEED, SETTINGS, SPEECH, SpeakingWorker, column
from soundmind.training.spoken import Patience, Spoken, answer_seed, chosen_groups, group_ids

logger = logging.getLogger(__name__)


class SpeakingStep:
    """What a trainer does with `speech` of its configuration."""

    def __init__(self, config: Any) -> None:
        self._settings: dict[str, Any] = OmegaConf.to_container(config.speech, resolve=True)  # type: ignore[assignment]
        given = config.reward.custom_reward_function.get("reward_kwargs") or {}
        self._reward: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(given), resolve=True)  # type: ignore[assignment]
        self._seed = int(config.run.seed)
        self._patience = Patience()

    def due(self, step: int) -> bool:
        """Whether the rollouts of this step are spoken."""
        return step % int(self._settings["every"]) == 0

    def run(self, batch: Any, workers: Any, tokenizer: Any, step: int) -> dict[str, float]:
        """Speak and grade the rollouts of `batch`, a KVBatchMeta; returns metrics.

        Raises `SpeechFailed` when too much has failed twice running.
        """
        started = time.monotonic()
        keys = [
            key
            for key, tag in zip(batch.keys, batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        names = ["responses", "extra_fields", "extra_info", "reward_model", "data_source"]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)
        rows = {name: column(data[name]) for name in names[1:]}
        groups = group_ids(keys)
        ids = {
            key: str(fields["reward_extra_info"]["id"])
            for key, fields in zip(keys, rows["extra_fields"], strict=True)
        }
        said = self._speak(batch, workers, step, keys, groups, ids)
        spoken = Spoken(
            {key: json.loads(text) for key, text in zip(keys, said, strict=True) if text}, groups
        )
        responses = data["responses"].unbind()
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        scores = []
        for number, key in enumerate(keys):
            fields = rows["extra_fields"][number]
            info = fields["reward_extra_info"]
            terms = spoken.terms(key)
            if terms:
                row = {
                    **(rows["extra_info"][number] or {}),
                    "response_tokens": info["response_tokens"],
                    **terms,
                }
                truth = rows["reward_model"][number]["ground_truth"]
                source = rows["data_source"][number]
                info |= compute_score(source, texts[number], truth, row, **self._reward)
            info[ROW] = json.dumps({**json.loads(info[ROW]), **spoken.record(key)})
            score = torch.zeros(len(responses[number]), dtype=torch.float32)
            score[-1] = float(info["score"])
            scores.append(score)
        tq.kv_batch_put(
            keys=keys,
            partition_id=batch.partition_id,
            fields=tu.get_tensordict(
                {
                    "rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged),
                    "extra_fields": rows["extra_fields"],
                }
            ),
        )
        metrics = spoken.metrics(
            {key: len(ids) for key, ids in zip(keys, responses, strict=True)},
            {key: len(text.split()) for key, text in zip(keys, texts, strict=True)},
        )
        metrics |= _audit(spoken, dict(zip(keys, texts, strict=True)))
        metrics["timing_s/speech"] = time.monotonic() - started
        if spoken.failed_groups:
            logger.error(
                "step %d: %d of %d rollouts could not be spoken, so %d groups are graded without "
                "their speech; the first: %s",
                step,
                metrics["speech/failed"],
                len(spoken.rows),
                len(spoken.failed_groups),
                spoken.first_error,
            )
        self._patience.see(spoken)
        return metrics

    def _speak(
        self,
        batch: Any,
        workers: Any,
        step: int,
        keys: list[str],
        groups: dict[str, str],
        ids: dict[str, str],
    ) -> list[str]:
        """The workers' column, in the order of `keys`."""
        of_group = {groups[key]: ids[key] for key in keys}
        chosen = chosen_groups(of_group, float(self._settings["groups"]), self._seed, step)
        asked = {
            key: answer_seed(self._seed, step, ids[key], *key.rsplit("_", 2)[1:])
            for key in keys
            if groups[key] in chosen
        }
        every = int(self._settings["audit"]["every"])
        count = int(self._settings["audit"]["rows"]) if every and step % every == 0 else 0
        audited = set(sorted(asked, key=lambda key: asked[key])[:count])
        columns = {
            SEED: torch.tensor([asked.get(key, -1) for key in batch.keys]),
            AUDIT: torch.tensor([key in audited for key in batch.keys]),
        }
        partition = batch.partition_id
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=partition,
            fields=TensorDict(columns, batch_size=len(batch.keys)),
        )
        workers.speak(
            KVBatchMeta(
                partition_id=partition,
                keys=batch.keys,
                tags=batch.tags,
                extra_info={**batch.extra_info, SETTINGS: json.dumps(self._settings)},
            )
        )
        data = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=[SPEECH])
        return [str(text) for text in column(data[SPEECH])]


def _audit(spoken: Spoken, texts: dict[str, str]) -> dict[str, float]:
    """`speech/wer` of the answers that were heard whole, against the thinker's own text."""
    heard = {
        key: row["audit_transcript"]
        for key, row in spoken.rows.items()
        if "audit_transcript" in row and texts[key].strip()
    }
    if not heard:
        return {}
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalise = EnglishTextNormalizer({})
    pairs = [(normalise(texts[key]), normalise(text)) for key, text in heard.items()]
    pairs = [(written, said) for written, said in pairs if written.split()]
    if not pairs:
        return {}
    written, said = map(list, zip(*pairs, strict=True))
    return {"speech/wer": jiwer.wer(written, said), "speech/audited": len(pairs)}


class SpeakingTrainer:
    """What a trainer of verl does with `speech.enable`; a base beside verl's own."""

    _speaking: SpeakingStep | None = None

    def _init_resource_pool_mgr(self) -> Any:
        result = super()._init_resource_pool_mgr()  # type: ignore[misc]
        trainer: Any = self
        if trainer.config.speech.enable:
            self._speaking = SpeakingStep(trainer.config)
            for role in (Role.ActorRollout, Role.ActorRolloutRef):
                if role in trainer.role_worker_mapping:
                    trainer.role_worker_mapping[role] = ray.remote(SpeakingWorker)
        return result

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        # vLLM sleeps, the policy is in place, and nothing has used the rewards yet.
        trainer: Any = self
        if self._speaking is not None and self._speaking.due(trainer.global_steps):
            workers, step = trainer.actor_rollout_wg, trainer.global_steps
            metrics.update(self._speaking.run(batch, workers, trainer.tokenizer, step))
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
