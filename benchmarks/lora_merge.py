"""What of a LoRA update survives the merge into a bfloat16 base: measured on the stand-in.

    python benchmarks/lora_merge.py                    # lr 1e-5, 324 updates, as grpo_7b_lora_1gpu has them
    python benchmarks/lora_merge.py --lr 1e-4 --updates 20 324

The trainer computes W x + scale B A x with an adapter in float32. Rollouts and exports get one matrix,
W + scale B A, added in float32 and rounded once to the base's bfloat16, of 8 bits. Where the update of a
weight is below half a step of W the rounding gives W back, and the rollout has not moved. For every
adapted matrix, with U = scale B A and M the merged matrix:

    survives    <M - W, U> / <U, U>, the share of the update that the rollout sees
    moved       share of the weights that differ at all after the merge
    noise       |M - W - U| / |U|, rounding beside the update

Updates are AdamW steps on a policy-gradient loss with random advantages over random tokens; what
survives depends on the size of the update, not on what it is good for. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

from soundmind.data.statistics import text_table
from soundmind.model import lora
from soundmind.model.parts import LANGUAGE_MODEL_LINEARS

TOKENS = (4, 16)  # sequences, and tokens of each, of an update


def adapted(folder: Path, rank: int, alpha: int, seed: int) -> Any:
    """The stand-in's thinker in bfloat16 under a new adapter in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder).thinker_config
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, config=config, attn_implementation="sdpa", dtype=torch.bfloat16
    )
    model = get_peft_model(
        thinker, LoraConfig(r=rank, lora_alpha=alpha, target_modules=LANGUAGE_MODEL_LINEARS)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def update(model: Any, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """One step up the log-probability of random tokens, weighted by random advantages."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary // 2, TOKENS, generator=generator)
    advantages = torch.randn(TOKENS[0], 1, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    (-(advantages * chosen).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def survival(model: Any) -> dict[str, list[float]]:
    """The three figures of every adapted matrix."""
    scale = lora.scale_of(model.peft_config["default"].to_dict())
    state = model.state_dict()
    found: dict[str, list[float]] = {"survives": [], "moved": [], "noise": []}
    for own, pair in lora.pairs(state).items():
        name = next(key for key in state if lora.base_name(key) == own)
        weight, a, b = (state[key] for key in (name, pair["A"], pair["B"]))
        wanted = scale * (b @ a)
        seen = lora.merge(weight, a, b, scale).float() - weight.float()
        found["survives"].append(float((seen * wanted).sum() / (wanted * wanted).sum()))
        found["moved"].append(float((seen != 0).float().mean()))
        found["noise"].append(float((seen - wanted).norm() / wanted.norm()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 20, 81, 324])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    model = adapted(options.model, options.rank, options.alpha, options.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    headers = ["updates", "survives: lowest", "median", "highest", "moved, median", "noise, median"]
    lines: list[list[str]] = []
    for step in range(1, max(options.updates) + 1):
        update(model, optimizer, generator)
        if step in options.updates:
            found = survival(model)
            share = found["survives"]
            lines.append(
                [
                    str(step),
                    *(
                        f"{100 * v:.0f} %"
                        for v in (min(share), statistics.median(share), max(share))
                    ),
                    f"{100 * statistics.median(found['moved']):.1f} %",
                    f"{statistics.median(found['noise']):.2f}",
                ]
            )
    print(text_table(headers, lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
