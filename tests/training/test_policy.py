"""The policy's forward: shared clips, packed positions, banned tokens, placeholder counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from soundmind.model.processor import load_processor
from soundmind.model.tokens import (
    response_banned_token_ids,
)
from soundmind.task.prompts import build_messages


@pytest.fixture(scope="module")
def processor(random_stand_in: Path) -> Any:
    return load_processor(str(random_stand_in))


def load_thinker(folder: Path) -> Any:
    from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = AutoConfig.from_pretrained(folder).thinker_config
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, config=config, attn_implementation="sdpa", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def thinker(random_stand_in: Path) -> Any:
    return load_thinker(random_stand_in)


@pytest.fixture(scope="module")
def policy(random_stand_in: Path, processor: Any) -> Any:
    from soundmind.training.policy import as_policy

    banned = response_banned_token_ids(processor.tokenizer, random_stand_in)
    return as_policy(load_thinker(random_stand_in), banned).eval()


def inputs_for(processor: Any, clips: list[np.ndarray]) -> dict[str, Any]:
    messages = build_messages("audio", "", "clip", "practice")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text] * len(clips), audio=clips, return_tensors="pt", padding=True).data


def clip(seed: int, seconds: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(int(16_000 * seconds))).astype(np.float32)


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def shared_inputs(processor: Any, clips: list[np.ndarray], index: list[int]) -> dict[str, Any]:
    """Inputs of rows that hear `clips[index[row]]`, with every clip's features there once."""
    inputs = inputs_for(processor, [clips[slot] for slot in index])
    first = [index.index(slot) for slot in range(len(clips))]
    for name in ("input_features", "feature_attention_mask"):
        inputs[name] = inputs[name][first]
    return {**inputs, "clip_index": torch.tensor(index)}


def test_shared_clips_are_encoded_once_with_the_same_result(
    policy: Any, thinker: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, index = [clip(1, 0.6), clip(2, 0.9)], [0, 1, 0, 0, 1]
    seen = []
    tower = policy.audio_tower
    stock = type(tower).forward

    def counting(self: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["feature_lens"].tolist())
        return stock(self, features, *args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", counting)
    ours = logits(policy, shared_inputs(processor, clips, index))
    assert seen == [[60, 90]]
    monkeypatch.undo()
    inputs = inputs_for(processor, [clips[slot] for slot in index])
    mask = inputs["attention_mask"].bool()
    allowed = torch.ones(ours.shape[-1], dtype=torch.bool)
    allowed[policy.banned_token_ids] = False
    expected = logits(thinker, inputs)[mask][:, allowed]
    torch.testing.assert_close(ours[mask][:, allowed], expected, rtol=1e-4, atol=1e-5)
    each = logits(policy, inputs)[mask][:, allowed]
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_features_rounded_in_transit_are_what_the_model_rounds_itself(
    random_stand_in: Path, processor: Any
) -> None:
    from soundmind.training.policy import as_policy

    model = as_policy(load_thinker(random_stand_in)).eval().to(torch.bfloat16)
    inputs = inputs_for(processor, [clip(1, 0.6), clip(2, 0.9)])
    exact = logits(model, inputs)
    inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
    assert torch.equal(exact, logits(model, inputs))


def test_encoded_frames_count_each_distinct_clip_once(policy: Any, processor: Any) -> None:
    from soundmind.training.policy import ENCODED_FRAMES, SILENT_MEL_FRAMES

    ENCODED_FRAMES.take()
    logits(policy, shared_inputs(processor, [clip(1, 0.6), clip(2, 0.9)], [0, 1, 0]))
    assert ENCODED_FRAMES.take() == [60, 90]
    assert ENCODED_FRAMES.take() == []
    logits(policy, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert ENCODED_FRAMES.take() == [SILENT_MEL_FRAMES]


def test_layers_run_again_for_the_gradient_are_not_counted_again(
    random_stand_in: Path, processor: Any
) -> None:
    from soundmind.training.policy import ENCODED_FRAMES, as_policy

    model = as_policy(load_thinker(random_stand_in)).train()
    model.gradient_checkpointing_enable()
    ENCODED_FRAMES.take()
    model(**inputs_for(processor, [clip(1, 0.6)]), use_cache=False).logits.sum().backward()
    assert ENCODED_FRAMES.take() == [60]


def test_logits_at_some_positions_are_those_of_all(policy: Any, processor: Any) -> None:
    inputs = inputs_for(processor, [clip(1, 0.6), clip(2, 0.9)])
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(
        inputs["input_ids"]
    )
    every = logits(policy, inputs).flatten(0, 1)
    wanted = torch.tensor([5, 17, len(every) - 1])
    some = logits(policy, {**inputs, "logit_positions": wanted})
    torch.testing.assert_close(some, every[wanted][None], rtol=1e-5, atol=1e-6)
    # verl divides them in place, which FSDP2's hook survives on a tensor of its own only.
    assert not policy(**inputs, logit_positions=wanted).logits._is_view()


def test_packed_sequences_do_not_see_each_other(policy: Any, processor: Any) -> None:
    tokenizer = processor.tokenizer
    texts = ["All wugs are daxes", "Rex is a wug, so Rex is a dax"]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    alone = [logits(policy, {"input_ids": row[None]})[0] for row in rows]
    packed = logits(
        policy,
        {
            "input_ids": torch.cat(rows)[None],
            "attention_mask": None,
            # Plain positions, as verl carries them: they restart at every sequence.
            "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        },
    )[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def attention_names() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return sorted({"eager", *ALL_ATTENTION_FUNCTIONS.keys()})


@pytest.mark.parametrize("attention", attention_names())
def test_shared_prompts_give_the_values_of_rows_or_are_refused_by_every_attention(
    policy: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    from soundmind.run import checks
    from soundmind.run.config import compose_config
    from soundmind.training.shared_prompts import share_prompts

    prompt = torch.tensor(processor.tokenizer("All wugs are daxes")["input_ids"])
    responses = [prompt.flip(0)[:5], prompt[2:6]]
    rows = [torch.cat([prompt, response]) for response in responses]
    separate = [logits(policy, {"input_ids": row[None]})[0, len(prompt) - 1 : -1] for row in rows]
    shared = share_prompts([prompt, prompt], responses, [None, None])
    monkeypatch.setattr(policy.model.config, "_attn_implementation_internal", attention)
    names = ("input_ids", "position_ids", "attention_mask", "logit_positions")
    inputs = {name: getattr(shared, name) for name in names}
    key = f"actor_rollout_ref.model.override_config.attn_implementation='{attention}'"
    problems = list(checks.shared_prompts(compose_config("grpo_tiny_cpu", [key])))
    if problems:
        with pytest.raises(ValueError, match="takes no dense mask"):
            logits(policy, inputs)
        return
    together = logits(policy, inputs)[0]
    torch.testing.assert_close(together, torch.cat(separate), rtol=1e-4, atol=1e-5)


def test_banned_tokens_have_no_probability(policy: Any, processor: Any) -> None:
    row = torch.tensor(processor.tokenizer("All wugs")["input_ids"])[None]
    probabilities = logits(policy, {"input_ids": row}).softmax(-1)
    assert float(probabilities[..., policy.banned_token_ids].max()) == 0.0
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert float(probabilities[..., end].min()) > 0.0


def test_a_placeholder_too_few_is_an_error(policy: Any, processor: Any) -> None:
    inputs = inputs_for(processor, [clip(1, 0.6)])
    position = (inputs["input_ids"][0] == policy.config.audio_token_id).nonzero()[0, 0]
    inputs["input_ids"][0, position] = processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="audio placeholder tokens for"):
        logits(policy, inputs)


def test_placeholders_without_features_are_an_error(policy: Any, processor: Any) -> None:
    inputs = inputs_for(processor, [clip(1, 0.6)])
    del inputs["input_features"], inputs["feature_attention_mask"]
    with pytest.raises(ValueError, match="its clip did not arrive"):
        logits(policy, inputs)


def test_changing_the_clip_changes_the_log_probabilities(policy: Any, processor: Any) -> None:
    one = logits(policy, inputs_for(processor, [clip(1, 0.6)]))[0, -1]
    other = logits(policy, inputs_for(processor, [clip(2, 0.6)]))[0, -1]
    assert float((one - other).abs().max()) > 1e-3
