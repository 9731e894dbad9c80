"""The plan's arithmetic beside PyTorch's own tracker: FSDP2 on fake tensors, no memory, no ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from soundmind.planning import flops, memory, sizes

SEVEN = sizes.PUBLISHED["Qwen2.5-Omni-7B"]
SMALL = replace(
    SEVEN,
    text=replace(
        SEVEN.text, hidden=1024, layers=4, heads=8, kv_heads=2, intermediate=4096, vocab=32_768
    ),
    audio=replace(SEVEN.audio, width=512, layers=4, heads=8, ffn=2048, output=1024),
)
BATCH = memory.MicroBatch(1, 3072, (3000,), packed=True, logits=1024)


@pytest.mark.parametrize(
    ("ranks", "lora", "checkpointing"), [(8, 0, True), (1, 0, False), (8, 32, False)]
)
def test_the_plan_is_at_most_five_percent_below_and_fifteen_above_the_tracked_peak(
    ranks: int, lora: int, checkpointing: bool
) -> None:
    from soundmind.run.tracked import tracked_peak

    setup = memory.Training(
        size=SMALL,
        trained=flops.Trained(not lora, not lora, lora),
        ranks=ranks,
        weight_bytes=2 if lora else 4,
        checkpointing=checkpointing,
    )
    planned = memory.training_peak(setup, BATCH).total
    assert 0.95 <= planned / tracked_peak(setup, BATCH)["Total"] <= 1.15
