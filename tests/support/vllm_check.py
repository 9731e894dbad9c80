"""What vLLM makes of an exported folder, beside transformers: run in a process of its own.

    python tests/support/vllm_check.py --model DIR --output result.json

For clips of several lengths: the prompt tokens that vLLM reports and the trainer counts, the largest
difference of log-probabilities between vLLM and the policy's forward, and whether a seeded response
is the same beside others, some of them computed in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from soundmind.plugin.environment import select

SECONDS = (0.5, 5.0, 30.0, 120.0)
RESPONSE_TOKENS = 6


def clip(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(int(seconds * 10))
    return (0.1 * generator.standard_normal(int(16_000 * seconds))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    select(os.environ, cpu=True)

    from soundmind.plugin.verl_entry import require_loaded

    require_loaded()
    import torch
    from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration
    from vllm import LLM, SamplingParams

    from soundmind.model.processor import load_processor
    from soundmind.model.tokens import (
        BANNED_LOGIT_BIAS,
        collapse_placeholders,
        response_banned_token_ids,
    )
    from soundmind.task.prompts import build_messages
    from soundmind.training.policy import as_policy

    processor = load_processor(arguments.model)
    tokenizer = processor.tokenizer
    banned = response_banned_token_ids(tokenizer, arguments.model)
    config = AutoConfig.from_pretrained(arguments.model).thinker_config
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        arguments.model, config=config, attn_implementation="sdpa", dtype=torch.float32
    )
    policy = as_policy(thinker.eval(), banned)
    engine = LLM(
        arguments.model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=3072,
        limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0},
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
    bias = dict.fromkeys(banned, BANNED_LOGIT_BIAS)
    shared: dict[str, Any] = {"max_tokens": RESPONSE_TOKENS, "temperature": 1.0, "logprobs": 0}
    sampling = {
        seconds: SamplingParams(**shared, ignore_eos=True, logit_bias=bias, seed=int(10 * seconds))
        for seconds in SECONDS
    }
    requests: dict[float, Any] = {}
    messages = build_messages("audio", "", "clip", "practice")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
    rows: list[dict[str, Any]] = []
    for seconds in SECONDS:
        inputs = processor(text=[text], audio=[clip(seconds)], return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist()
        request = requests[seconds] = {
            "prompt_token_ids": collapse_placeholders(prompt, audio_token_id),
            "multi_modal_data": {"audio": [clip(seconds)]},
            "mm_processor_kwargs": {"sampling_rate": 16_000},
        }
        result = engine.generate([request], sampling[seconds], use_tqdm=False)[0]
        response = list(result.outputs[0].token_ids)
        steps = zip(response, result.outputs[0].logprobs, strict=True)
        rollout = torch.tensor([step[token].logprob for token, step in steps])
        with torch.no_grad():
            logits = policy(
                input_ids=torch.tensor([prompt + response]),
                attention_mask=torch.ones(1, len(prompt) + len(response), dtype=torch.long),
                input_features=inputs["input_features"],
                feature_attention_mask=inputs["feature_attention_mask"],
                use_cache=False,
            ).logits[0, len(prompt) - 1 : -1]
        trainer = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        rows.append(
            {
                "seconds": seconds,
                "trainer_tokens": len(prompt),
                "vllm_tokens": len(result.prompt_token_ids),
                "response": response,
                "log_prob_gap": float((rollout - trainer).abs().max()),
            }
        )
    engine.reset_prefix_cache()
    order = SECONDS[::-1]
    together = engine.generate(
        [requests[seconds] for seconds in order], [sampling[seconds] for seconds in order]
    )
    for row, result in zip(reversed(rows), together, strict=True):
        row["response_beside_others"] = list(result.outputs[0].token_ids)
    arguments.output.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
