"""verl's V1 sync trainer, with what a run of ours must do and show.

Where a step departs from the paper:

1. GRPO with the KL in the loss, as the authors' script runs it; the paper's text says REINFORCE++,
   which is another configuration.
2. Without `speech.enable` rollouts do not speak, and both audio terms drop out (`speaking_step`).
3. A response whose session or score failed reaches no update, nor does a group of one survivor; more
   of them than `train.max_failed_share` end the run with their cause. [ours]

And from stock verl (`PPOTrainerSync`), added, nothing replaced:

4. Prompts are named by step and number, batches are ordered by name, and on a CPU every response
   draws from a stream of its own (`run.response_streams`): one seed gives one run.
5. `reward/<component>/mean` for every component of the reward, with accuracy, parsed and format
   rate, and counts of scores and sessions that failed (verl drops those without a word).
6. The same components, row id and finish reason in every dumped rollout.
7. A step's checkpoint is written after its metrics and rollouts, so that a kill loses neither, and
   it is complete or absent under its name (`soundmind.model.checkpoints`).
8. `metrics.jsonl`: one line a step, appended, so that a resumed run keeps its history (verl's own
   file logger starts its file anew).
9. Audio features are dropped behind the update that used them (`feature_store`).
10. The rollout buffer is polled every `run.poll_interval_seconds`, not every two seconds.

Departures of model and forward: `soundmind.training.engine`; of everything: docs/fidelity.md.
`run_ppo` gets `task_runner()`, because verl imports trainers inside the actor that runs them.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.debug import marked_timer

from soundmind.model import checkpoints
from soundmind.planning.rules import GROUPED
from soundmind.plugin import patches
from soundmind.plugin.verl_entry import require_loaded
from soundmind.training import failures
from soundmind.training.agent_loop import ROW
from soundmind.training.algorithms import RecipeTrainer, groups_without_signal
from soundmind.training.feature_store import clear_spent
from soundmind.training.metrics_file import MetricsFile
from soundmind.training.nodes import watch_nodes
from soundmind.training.speaking_step import SpeakingTrainer

logger = logging.getLogger(__name__)

TRAINER = "soundmind_sync"  # `trainer.v1.trainer_mode`
# Numbers of the reward's dict that are not components of it.
RATES = {"acc": "accuracy", "parsed": "parsed", "reward_error": "error"}


def reward_metrics(infos: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`reward/<name>/mean` over rollouts, for every numeric entry of their reward dicts.

    Counts are kept apart from rates: `reward/error/count` says how many rewards raised.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for info in infos:
        for name, value in info.items():
            if isinstance(value, (bool, int, float, np.number)):
                values[RATES.get(name, name)].append(float(value))
    metrics = {f"reward/{name}/mean": float(np.mean(column)) for name, column in values.items()}
    if "error" in values:
        metrics["reward/error/count"] = float(np.sum(values["error"]))
    return metrics


@register_trainer(TRAINER)
class SoundMindTrainer(SpeakingTrainer, RecipeTrainer):
    """PPOTrainerSync with what the module lists."""

    def __init__(self, config: Any) -> None:
        require_loaded()
        with open_dict(config):
            # verl takes every other name for an asynchronous mode.
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)
        self._named = (-1, 0)  # step, prompts named in it
        patches.named_prompts(trainer_base, self._prompt_name)
        self._metrics_file = MetricsFile(config.run.metrics_path)
        self._reward_infos: list[dict[str, Any]] = []
        self._checkpoint_due = False
        if not config.trainer.rollout_data_dir:
            raise ValueError(
                "trainer.rollout_data_dir must be set: checkpoints are written after the rollouts of "
                "their step"
            )

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = float(self.config.run.poll_interval_seconds)
        stock = buffer.sample

        def sample(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            # verl's order is that of arrival; sums of floats and mini-batches would follow it.
            batch, metrics = stock(*args, **kwargs)
            batch.reorder(
                sorted(range(len(batch)), key=lambda row: _session_order(batch.keys[row]))
            )
            return batch, metrics

        buffer.sample = sample
        return buffer

    def _prompt_name(self) -> str:
        """What verl names a prompt by: the same in every run of a seed, unique within a run."""
        if self._named[0] != self.global_steps:
            self._named = (self.global_steps, 0)
        step, number = self._named
        self._named = (step, number + 1)
        return f"{step:06d}x{number:06d}"

    def fit(self, agent_loop_manager: Any) -> None:
        self._metrics_file.forget_after(self.global_steps)
        self._started = time.monotonic()
        super().fit(agent_loop_manager)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """verl's step; the audio features of its prompts are dropped behind the update."""
        batch = super().step(metrics, timing_raw)
        metrics.update(clear_spent(batch.keys))
        return batch

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """verl's balancing over the ranks, of the groups that can be compared."""
        batch = self._whole_groups(batch, metrics)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _whole_groups(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """The step's batch without groups of a single survivor; counts, and stops a run that fails."""
        n = self.config.actor_rollout_ref.rollout.n
        asked = self.config.data.train_batch_size * n
        failed = failures.take()
        metrics["rollout/failed_sessions"] = failed.count
        metrics["reward/error/count"] = failed.scores
        metrics["reward/error/mean"] = failed.scores / asked
        where = f"step {self.global_steps}"
        failures.require_few(failed, asked, self.config.train.max_failed_share, where)
        # verl gives a lone response its raw score for an advantage.
        compared = self.config.algorithm.adv_estimator in GROUPED
        broken = failures.broken_groups(batch.keys, at_least=2 if compared else 1)
        metrics["rollout/dropped_responses"] = len(broken)
        if not broken:
            return batch
        if len(broken) == len(batch):
            failures.require_few(failed, asked, -1.0, f"{where}: no group is left to compare")
        gone = set(broken)
        kept = [row for row, key in enumerate(batch.keys) if key not in gone]
        tq.kv_clear(keys=broken, partition_id=batch.partition_id)
        logger.error(
            "%s: %d responses failed, and %d in groups without a second one leave the batch: %s",
            where, failed.count, len(broken), dict(failed.causes.most_common(3)),
        )  # fmt: skip
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[batch.keys[row] for row in kept],
            tags=[batch.tags[row] for row in kept],
            fields=batch.fields,
            extra_info=batch.extra_info,
        )

    def _save_checkpoint(self) -> None:
        # verl saves before it logs. Killed in between, a resumed run would miss that step's line and
        # rollouts for good, so the checkpoint waits until both are on disk (_log_rollout_data).
        self._checkpoint_due = True

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        failed = failures.take()
        asked = len(self.val_dataset) * self.config.actor_rollout_ref.rollout.val_kwargs.n
        metrics["val/failed_responses"] = failed.count
        where = f"validation at step {self.global_steps}"
        failures.require_few(failed, asked, self.config.train.max_failed_share, where)
        if self.global_steps == 0:  # later ones travel with their step's line
            self._metrics_file.append(0, metrics)
        return metrics

    def _compute_metrics(
        self, batch: Any, metrics: dict[str, Any], timing_raw: dict[str, float], **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **kwargs)
        infos = self._fetch_reward_infos(batch)
        # A failed score is in no batch: what is counted of it came with the batch (_whole_groups).
        counted = {k: v for k, v in reward_metrics(infos).items() if "/error/" not in k}
        metrics.update({**counted, **groups_without_signal(infos)})
        self._metrics_file.append(self.global_steps, metrics)

    def _fetch_reward_infos(self, batch: Any) -> list[dict[str, Any]]:
        """Reward dicts of the batch's real rollouts, in the batch's order, with `uid` added."""
        real = [
            key
            for key, tag in zip(batch.keys, batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        data = tq.kv_batch_get(
            keys=real, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        infos = []
        for key, fields in zip(real, _objects(data["extra_fields"]), strict=True):
            infos.append({**fields["reward_extra_info"], "uid": key})
        self._reward_infos = infos
        return infos

    def _log_rollout_data(self, batch: Any, timing_raw: dict[str, float], folder: str) -> None:
        """Dump every rollout with its components; verl's own dump has only the score."""
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            infos = {info["uid"]: info for info in self._reward_infos}
            keys = sorted(infos, key=_session_order)
            data = tq.kv_batch_get(
                keys=keys,
                partition_id=batch.partition_id,
                select_fields=["prompts", "responses", "rm_scores", "reward_model"],
            )
            truths = [model["ground_truth"] for model in _objects(data["reward_model"])]
            columns: dict[str, list[Any]] = defaultdict(list)
            for key in keys:
                for name, value in infos[key].items():
                    columns[name].append(value)
            self._dump_generations(
                inputs=self._decode(data["prompts"]),
                outputs=self._decode(data["responses"]),
                gts=truths,
                scores=[float(scores.sum()) for scores in data["rm_scores"].unbind()],
                reward_extra_infos_dict=dict(columns),
                dump_path=folder,
            )
        if self._checkpoint_due:
            self._checkpoint_due = False
            for future in self._dump_futures:
                future.result()
            with marked_timer("save_checkpoint", timing_raw, color="green"):
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """verl's checkpoint, written aside and moved to its name when it is complete."""
        trainer = self.config.trainer
        root = Path(trainer.default_local_dir)
        shutil.rmtree(root / checkpoints.WRITING, ignore_errors=True)
        keep = trainer.get("max_actor_ckpt_to_keep")
        # verl would remove an older checkpoint before the new one is there.
        aside: dict[str, Any] = {"default_local_dir": str(root / checkpoints.WRITING)}
        aside |= {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None}
        before = {name: trainer.get(name) for name in aside}
        with open_dict(self.config):
            trainer.update(aside)
        try:
            super()._save_checkpoint()
        finally:
            with open_dict(self.config):
                trainer.update(before)
        base = Path(str(self.config.actor_rollout_ref.model.path)).expanduser()
        checkpoints.publish(root, self.global_steps, base)
        checkpoints.prune(root, keep)

    def _dump_generations(
        self, *args: Any, reward_extra_infos_dict: dict[str, list[Any]], **kwargs: Any
    ) -> None:
        """Write dumps with the row's own entries (reference lengths) as columns of their own.

        With them, `python -m soundmind.rewards` scores a dump again under any preset.
        """
        columns = dict(reward_extra_infos_dict)
        rows = [json.loads(row or "{}") for row in columns.pop(ROW, [])]
        for name in sorted({name for row in rows for name in row}):
            columns[name] = [row.get(name) for row in rows]
        super()._dump_generations(*args, reward_extra_infos_dict=columns, **kwargs)

    def _decode(self, token_ids: Any) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in token_ids.unbind()]


def _objects(column: Any) -> list[Any]:
    """A non-tensor column of TransferQueue as a list; its container depends on the back-end."""
    return [getattr(item, "data", item) for item in column]


def _session_order(key: str) -> tuple[str, int, int]:
    """`{prompt uid}_{session}_{output}` -> sortable, sessions of a prompt together."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


class SoundMindTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner; importing this module registered the trainer in its process."""

    def run(self, config: Any) -> None:
        require_loaded()
        if config.trainer.nnodes > 1:
            watch_nodes()
        super().run(config)


def task_runner() -> Any:
    """What `verl.trainer.main_ppo.run_ppo` takes as `task_runner_class`."""
    return ray.remote(SoundMindTaskRunner)
