"""Counted operations against PyTorch's own counter, and verl's MFU with our estimate."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment

from soundmind.planning import flops, sizes
from soundmind.planning.flops import Trained
from soundmind.standin.random_thinker import random_thinker
from soundmind.training import utilisation

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from soundmind.training.policy import as_policy

LENGTHS, FRAMES = [100], [231]  # 231 mel frames: a full window and a part


def counted(model: Any, size: sizes.OmniSize, backward: bool) -> int:
    """Operations that PyTorch counts in a pass over one prompt with one clip."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens = flops.audio_tokens(size.audio, FRAMES[0])
    ids = torch.randint(8, 50, (1, LENGTHS[0]))
    ids[0, 5 : 5 + tokens] = model.config.audio_token_id
    features = torch.randn(1, size.audio.mel_bins, FRAMES[0])
    with FlopCounterMode(display=False) as counter:
        output = model(
            input_ids=ids,
            input_features=features,
            feature_attention_mask=torch.ones(1, FRAMES[0], dtype=torch.long),
            position_ids=torch.arange(LENGTHS[0])[None],
            use_cache=False,
        )
        if backward:
            output.logits.sum().backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def real_width() -> tuple[sizes.OmniSize, Any]:
    """The 7B's widths, one layer each; a small vocabulary and vision tower, for the memory."""
    size = sizes.QWEN2_5_OMNI_7B
    size = replace(
        size,
        text=replace(size.text, layers=1, vocab=512),
        audio=replace(size.audio, layers=1),
        vision=sizes.VisionSize(hidden=64, layers=1, intermediate=64, output=3584),
    )
    return size, as_policy(random_thinker(size, "eager"))


@pytest.fixture(scope="module")
def small() -> tuple[sizes.OmniSize, Any]:
    """Two layers of each, narrow enough for many passes."""
    size = sizes.OmniSize(
        "small",
        sizes.TextSize(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=768, vocab=512),
        sizes.AudioSize(width=128, layers=2, heads=4, ffn=384, output=256),
        sizes.VisionSize(hidden=64, layers=1, intermediate=64, output=256),
        source="test",
    )
    return size, as_policy(random_thinker(size, "eager"))


def uncounted(size: sizes.OmniSize) -> tuple[int, int]:
    """What the counter sees and the convention does not: (in the forward, in the backward).

    It counts the full square of causal attention, the products of the rotary embedding, and the
    convolutions of the last window up to the longest one's length. conv1 has no input gradient.
    """
    text, audio = size.text, size.audio
    square = flops.text_attention(text, LENGTHS)
    rotary = 2 * 3 * (text.head_dim // 2) * LENGTHS[0]
    windows = -(-FRAMES[0] // (2 * audio.n_window))
    padding = windows * 2 * audio.n_window - FRAMES[0]
    first = 2 * audio.kernel * audio.width * audio.mel_bins
    second = 2 * audio.kernel * audio.width * audio.width
    positions = windows * audio.n_window - sum(flops.encoder_frames(audio, FRAMES[0]))
    forward = square + rotary + padding * first + positions * second
    backward = 2 * square + padding * first + 2 * positions * second - FRAMES[0] * first
    return forward, backward


def test_a_forward_of_real_width_equals_pytorchs_count(real_width: Any) -> None:
    size, model = real_width
    expected = flops.forward_flops(size, LENGTHS, FRAMES)
    found = counted(model, size, backward=False)
    assert found == expected + uncounted(size)[0]
    assert found / expected < 1.02


def test_training_of_real_width_equals_pytorchs_count(real_width: Any) -> None:
    size, model = real_width
    model.visual.requires_grad_(False)
    expected = flops.training_flops(size, LENGTHS, FRAMES, Trained())
    found = counted(model, size, backward=True)
    assert found == expected + sum(uncounted(size))
    assert abs(found / expected - 1) < 0.02


@pytest.mark.parametrize("projector", [True, False])
def test_a_frozen_tower_costs_its_forward(small: Any, projector: bool) -> None:
    size, model = small
    trained = Trained(audio_tower=False, projector=projector)
    model.audio_tower.requires_grad_(False)
    model.audio_tower.proj.requires_grad_(projector)
    try:
        found = counted(model, size, backward=True)
    finally:
        model.audio_tower.requires_grad_(True)
    forward, backward = uncounted(size)
    square = 2 * flops.text_attention(size.text, LENGTHS)
    rotary_and_padding = forward - square // 2
    expected = flops.training_flops(size, LENGTHS, FRAMES, trained)
    assert found == expected + square // 2 + square + rotary_and_padding
    assert backward > square


def test_lora_saves_the_weight_gradients(small: Any) -> None:
    peft = pytest.importorskip("peft")
    from soundmind.model.parts import LANGUAGE_MODEL_LINEARS

    size, model = small
    rank = 16
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, target_modules=LANGUAGE_MODEL_LINEARS)
    )
    try:
        adapters = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert adapters == flops.lora_parameters(size.text, rank)
        found = counted(wrapped, size, backward=True)
    finally:
        wrapped.unload()
        model.requires_grad_(True)
    expected = flops.training_flops(size, LENGTHS, FRAMES, Trained(False, False, rank))
    square = flops.text_attention(size.text, LENGTHS)
    assert abs((found - 3 * square) / expected - 1) < 0.01


def test_the_stand_in_agrees_as_well(random_stand_in: Path) -> None:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    size = sizes.from_folder(random_stand_in)
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        random_stand_in, attn_implementation="eager", dtype=torch.float32
    )
    model = as_policy(model)
    model.visual.requires_grad_(False)
    found = counted(model, size, backward=True)
    assert found == flops.training_flops(size, LENGTHS, FRAMES, Trained()) + sum(uncounted(size))


def test_without_the_embedding_it_is_verls_own_convention() -> None:
    counter = pytest.importorskip("verl.utils.flops_counter")
    text = sizes.QWEN2_5_OMNI_7B.text
    config = type("Config", (), {})()
    config.hidden_size, config.vocab_size = text.hidden, text.vocab
    config.num_hidden_layers, config.intermediate_size = text.layers, text.intermediate
    config.num_attention_heads, config.num_key_value_heads = text.heads, text.kv_heads
    lengths = [1800, 2500]
    theirs = counter._estimate_qwen2_flops(config, sum(lengths), lengths, 1.0) * 1e12
    embedding = 6 * text.embedding_parameters * sum(lengths)
    ours = flops.text_training_flops(text, lengths, Trained())
    assert theirs - embedding == pytest.approx(ours, rel=1e-12)
    assert 0.06 < embedding / ours < 0.08  # what the docstring says of the difference


@pytest.fixture()
def no_clips() -> Any:
    """Nothing encoded before and after."""
    from soundmind.training.policy import ENCODED_FRAMES

    ENCODED_FRAMES.take()
    yield ENCODED_FRAMES
    ENCODED_FRAMES.take()
    utilisation.CURRENT_PASS.begin(False, Trained())


def test_verls_counter_gives_the_utilisation(
    no_clips: Any, random_stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter_module = pytest.importorskip("verl.utils.flops_counter")
    from transformers import Qwen2_5OmniConfig

    from soundmind.plugin import patches
    from soundmind.training import utilisation

    config = Qwen2_5OmniConfig.from_pretrained(random_stand_in).thinker_config
    monkeypatch.setattr(counter_module, "ESTIMATE_FUNC", dict(counter_module.ESTIMATE_FUNC))
    monkeypatch.setattr(patches, "APPLIED", [])
    monkeypatch.setattr(counter_module, "get_device_flops", lambda: 0.448)  # no device here
    before = counter_module.FlopsCounter(config).estimate_flops([100], 1.0)[0]
    assert before == 0  # what verl says without us
    utilisation.thinker_flops()
    counter = counter_module.FlopsCounter(config)
    size = sizes.from_folder(random_stand_in)
    lengths, frames, seconds = [120, 90, 90], [400, 250], 0.5

    trained = Trained(audio_tower=False, projector=True)
    no_clips.add([9999])  # encoded for the reference model, say
    utilisation.CURRENT_PASS.begin(forward_only=False, trained=trained)
    no_clips.add(frames[:1])  # two micro-batches
    no_clips.add(frames[1:])
    found, _ = counter.estimate_flops(lengths, seconds, images_seqlens=None)
    expected = flops.training_flops(size, lengths, frames, trained)
    assert found == pytest.approx(expected / seconds / 1e12)

    # The clips have been counted; a mini-batch of text costs its tokens.
    found, _ = counter.estimate_flops(lengths, seconds, images_seqlens=None)
    expected = flops.text_training_flops(size.text, lengths, trained)
    assert found == pytest.approx(expected / seconds / 1e12)

    utilisation.CURRENT_PASS.begin(forward_only=True, trained=trained, logits=75)
    no_clips.add(frames)
    found, _ = counter.estimate_flops(lengths, seconds)
    expected = flops.forward_flops(size, lengths, frames, logits=75)
    assert expected < flops.forward_flops(size, lengths, frames)
    assert found / 3 == pytest.approx(expected / seconds / 1e12)  # verl divides by three


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("CPU", 0.448),  # nominal; an MFU on the CPU is a relative figure
    ],
)
def test_verl_knows_what_the_device_promises(name: str, tera: float) -> None:
    counter = pytest.importorskip("verl.utils.flops_counter")
    assert counter.get_device_flops(device_name=name) == pytest.approx(tera)
    assert flops.dense_peak(name) == pytest.approx(tera * 1e12) or name == "CPU"


def test_clips_of_all_ranks_are_summed() -> None:
    code = (
        "import sys, torch.distributed as dist; from soundmind.training.utilisation import sum_over_ranks; "
        "rank = int(sys.argv[1]); "
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, "
        "world_size=2); print(sum_over_ranks(10.0 + rank))"
    )
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), f"{folder}/store"],
                cwd=REPOSITORY,
                env=clean_environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert outputs == ["21.0", "21.0"]
