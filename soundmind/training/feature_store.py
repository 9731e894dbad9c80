"""Audio features on their way to the trainer: one copy per prompt, however many rollouts it has.

verl stores a prompt's features once per rollout and fetches every copy again in every phase of a
step. Here the agent loop puts them into a partition of their own in TransferQueue, under the
prompt's uid, and a rollout carries only that name. An engine process fetches a clip when its first
micro-batch needs it and keeps it for the phases of the step (old log-probabilities, reference,
update; actor and reference share a process). The trainer clears the partition after the update.

A stored entry holds valid frames only, transposed: several clips of a prompt stand one behind the
other, so that nothing is padded in transit and no mask travels. Frames are stored in the type the
model computes in: it would round them to that type anyway before the first convolution. [ours]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from verl.utils.torch_dtypes import PrecisionType

PARTITION = "features"
TRAIN = "train"  # verl's partition of prompts and rollouts
CLIP_KEY = "clip_key"  # in `multi_modal_inputs`: the prompt whose clips a rollout heard
STEP = "clip_step"  # beside it: the step that stored them
SECONDS, BYTES = "encode_seconds", "feature_bytes"  # in a stored entry's tag


@dataclass(frozen=True)
class StoredClips:
    """The clips of one prompt: `frames` (sum of mel frames, mel bins), `lengths` (clips,) int64."""

    frames: torch.Tensor
    lengths: torch.Tensor

    @property
    def clips(self) -> list[torch.Tensor]:
        """Each clip's own frames, (mel frames, mel bins), in the prompt's order."""
        return list(self.frames.split(self.lengths.tolist()))


def transit_dtype(config: Any) -> torch.dtype:
    """The type that features travel in: float32 unless every engine computes in the same half type.

    `config` is the run's whole configuration. Read from `mixed_precision.param_dtype` of actor and
    reference as verl's FSDP engine reads it, its default of bfloat16 included.
    """
    dtypes = set()
    for role in ("actor", "ref"):
        mixed = config.actor_rollout_ref[role].fsdp_config.get("mixed_precision") or {}
        dtypes.add(PrecisionType.to_dtype(mixed.get("param_dtype", "bf16")))
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def pack(features: dict[str, torch.Tensor], dtype: torch.dtype) -> StoredClips:
    """A processor's output as it is stored.

    `features` holds `input_features` (clips, mel bins, mel frames) float32 and
    `feature_attention_mask` (clips, mel frames), whose ones come first in every row.
    """
    lengths = torch.as_tensor(features["feature_attention_mask"]).sum(-1).to(torch.int64)
    batch = torch.as_tensor(features["input_features"])
    frames = torch.cat(
        [clip[:, :length].T for clip, length in zip(batch, lengths.tolist(), strict=True)]
    )
    return StoredClips(frames.to(dtype).contiguous(), lengths)


async def put(uid: str, step: int, clips: StoredClips, seconds: float) -> None:
    """Store the clips of prompt `uid`; called once per prompt, before its first rollout.

    `seconds` is what decoding and extracting them took, for the step's metrics.
    """
    await tq.async_kv_put(
        key=uid,
        partition_id=PARTITION,
        fields={"frames": clips.frames, "lengths": clips.lengths},
        tag={
            "global_steps": step,
            SECONDS: seconds,
            BYTES: clips.frames.nbytes + clips.lengths.nbytes,
        },
    )


def fetch(uids: Sequence[str]) -> dict[str, StoredClips]:
    """The stored clips of these prompts, by uid. Raises `LookupError` for one that is not there."""
    stored = tq.kv_list(PARTITION).get(PARTITION, {})
    missing = [uid for uid in uids if uid not in stored]
    if missing:
        raise LookupError(
            f"the audio features of prompts {missing} are not in TransferQueue (partition "
            f"{PARTITION!r} holds {len(stored)}). Rollouts that were saved by one run and replayed "
            "by another (actor_rollout_ref.rollout.skip) bring no features: turn that off."
        )
    data = tq.kv_batch_get(keys=list(uids), partition_id=PARTITION)
    rows = zip(uids, data["frames"].unbind(), data["lengths"].unbind(), strict=True)
    return {uid: StoredClips(frames, lengths) for uid, frames, lengths in rows}


def clear_spent(batch_keys: Iterable[str]) -> dict[str, float]:
    """Drop what no prompt or rollout outside `batch_keys`, a step's batch, needs.

    Prompts of failed or filtered groups are in no batch and nowhere else either, so they go too.
    Returns metrics: how many prompts' features were dropped and how many are left, and what the
    dropped ones cost, in seconds of encoding and bytes.
    """
    stored = tq.kv_list(PARTITION).get(PARTITION, {})
    done = set(batch_keys)
    waiting = {key.split("_")[0] for key in tq.kv_list(TRAIN).get(TRAIN, {}) if key not in done}
    spent = sorted(set(stored) - waiting)
    if spent:
        tq.kv_clear(keys=spent, partition_id=PARTITION)
    return {
        "features/prompts": len(spent),
        "features/left": len(stored) - len(spent),
        "features/seconds": sum(stored[uid][SECONDS] for uid in spent),
        "features/bytes": sum(stored[uid][BYTES] for uid in spent),
    }


class ClipReader:
    """The clips that an engine process has fetched, each once a step."""

    def __init__(self, fetch: Callable[[Sequence[str]], dict[str, StoredClips]] = fetch) -> None:
        self._fetch = fetch
        self._step = -1
        self._clips: dict[str, StoredClips] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, uids: Sequence[str], step: int) -> list[StoredClips]:
        """The clips of prompts `uids`, fetched if new; those of steps before `step` are dropped."""
        with self._lock:
            if step > self._step:
                self._clips.clear()
                self._step = step
            missing = [uid for uid in dict.fromkeys(uids) if uid not in self._clips]
            if missing:
                self._clips.update(self._fetch(missing))
            return [self._clips[uid] for uid in uids]


READER = ClipReader()


def clip_rows(micro_batch: Any) -> list[dict[str, Any]]:
    """`multi_modal_inputs` of a micro-batch, row by row; none where there is no such column."""
    return [getattr(row, "data", row) or {} for row in micro_batch.get("multi_modal_inputs", [])]


def clip_inputs(
    rows: Sequence[dict[str, Any]], reader: ClipReader, device: Any
) -> dict[str, torch.Tensor]:
    """What the policy's forward takes for a micro-batch whose rollouts carry keys.

    `rows` are the rollouts' `multi_modal_inputs` in order; empty ones have no clip (text, padding).
    Returns `input_features` (distinct clips, mel bins, mel frames), `feature_attention_mask`
    (distinct clips, mel frames) int64 and `clip_index` (clips heard,) int64: which of the distinct
    clips each clip of the rows is, row by row. Nothing at all for rows without clips.
    """
    heard = [row for row in rows if row]
    if not heard:
        return {}
    # In the comments: U distinct prompts, C distinct clips, H clips heard, F frames, M mel bins.
    # 1. Each prompt once, U of them, in the order in which they are first heard.
    names = [row[CLIP_KEY] for row in heard]
    distinct = {uid: slot for slot, uid in enumerate(dict.fromkeys(names))}
    stored = reader.get(list(distinct), max(int(row[STEP]) for row in heard))
    # 2. Their clips side by side, C of (F, M); `firsts` says where a prompt's clips begin.
    clips = [clip for entry in stored for clip in entry.clips]
    firsts = [0]
    for entry in stored:
        firsts.append(firsts[-1] + len(entry.lengths))
    # 3. Row by row, which of the C clips are heard: (H,).
    index = [
        clip for uid in names for clip in range(firsts[distinct[uid]], firsts[distinct[uid] + 1])
    ]
    # 4. Padded to the longest, (C, F, M), with the valid frames marked, (C, F).
    features = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).to(device)
    lengths = torch.tensor([len(clip) for clip in clips], device=device)
    positions = torch.arange(features.shape[1], device=device)
    return {
        "input_features": features.transpose(1, 2),
        "feature_attention_mask": (positions < lengths[:, None]).long(),
        "clip_index": torch.tensor(index, device=device),
    }
