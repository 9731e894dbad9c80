"""verl's count of floating-point operations for this model, behind `perf/mfu/actor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soundmind.planning.flops import (
    FULL_TRAINING,
    Trained,
    audio_training_flops,
    forward_flops,
    text_training_flops,
)
from soundmind.planning.sizes import OmniSize, from_config
from soundmind.plugin.patches import once

# --- verl's estimate ------------------------------------------------------------------------------


class Pass:
    """What the engine is doing in this process, told by it at the start of every pass.

    verl's counter knows lengths and seconds only. `begin` also drops the clips that earlier passes
    of this process encoded (the reference model, old log-probabilities), so that the estimate of a
    mini-batch counts its own clips, whatever the number of its micro-batches.
    """

    def __init__(self) -> None:
        self.forward_only = False
        self.trained = Trained()
        self.logits: int | None = None
        self.repeated: list[int] = []  # tokens of prompts that were not computed again on this rank

    def begin(self, forward_only: bool, trained: Trained, logits: int | None = None) -> None:
        """A pass over a mini-batch begins, with `logits` positions of the head on this rank."""
        from soundmind.training.policy import ENCODED_FRAMES

        ENCODED_FRAMES.take()
        self.forward_only = forward_only
        self.trained = trained
        self.logits = logits
        self.repeated = []


CURRENT_PASS = Pass()


def estimate_thinker_flops(
    config: Any, tokens_sum: int, batch_seqlens: Sequence[int], delta_time: float, **_: Any
) -> float:
    """TFLOP/s of the pass that just ended, over all ranks; verl's signature.

    `config`: the thinker's configuration. `batch_seqlens`: tokens of every sequence of the
    mini-batch on all ranks. Clips of the audio tower and positions of the output head are known to
    each rank for itself; they are summed over ranks, so every rank must call this, as verl does.

    verl divides the result by the number of ranks, and by three if the pass was forward-only, for
    which three forwards are returned.
    """
    from soundmind.training.policy import ENCODED_FRAMES

    size = thinker_size(config)
    frames = ENCODED_FRAMES.take()
    now = CURRENT_PASS
    logits = None if now.logits is None else int(sum_over_ranks(now.logits))
    if now.forward_only:
        text = FULL_TRAINING * forward_flops(size, batch_seqlens, [], logits)
        spared = FULL_TRAINING * forward_flops(size, now.repeated, [], 0)
        audio = FULL_TRAINING * forward_flops(size, [], frames)
    else:
        text = text_training_flops(size.text, batch_seqlens, now.trained, logits)
        spared = text_training_flops(size.text, now.repeated, now.trained, 0)
        audio = audio_training_flops(size.audio, frames, now.trained)
    return (text + sum_over_ranks(audio - spared)) / delta_time / 1e12


def thinker_size(config: Any) -> OmniSize:
    """Dimensions of a thinker from its transformers configuration."""
    return from_config(
        {"thinker_config": config.to_dict()}, name="thinker", source="the thinker's configuration"
    )


def sum_over_ranks(value: float) -> float:
    """The sum of every rank's `value`; `value` itself outside of a process group."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return float(value)
    # On the CPU: verl's process group has gloo beside NCCL.
    total = torch.tensor([value], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total.item())


@once
def thinker_flops() -> None:
    """Register the count of operations behind `mfu`, audio tower included (`soundmind.planning.flops`)."""
    import verl.utils.flops_counter as counter

    counter.ESTIMATE_FUNC.setdefault("qwen2_5_omni_thinker", estimate_thinker_flops)
