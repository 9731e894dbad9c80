"""The first minutes on any GPU: does the thinker compute what it should, and how fast?

    bash scripts/gpu_check.sh                           # 7B's width, 4 + 4 layers
    bash scripts/gpu_check.sh --width 3b --layers 2     # a smaller GPU
    bash scripts/gpu_check.sh --layers 12 --audio-layers 32
    bash scripts/gpu_check.sh --width tiny --device cpu # no GPU, a narrow model

Nothing is downloaded. The model is Qwen2.5-Omni's thinker (`soundmind.training.policy` on transformers'
class) with random weights: width, heads and vocabulary as published, depth an argument. Every part
is a row of the table; one that fails says why, and the rest goes on. Exit status 1: a part failed.

    environment       GPU, memory, driver, versions; names what is missing
    forward           log-probabilities of the answers are finite
    backward          the GRPO loss reaches every part: gradients finite, and not zero
    optimizer_step    AdamW on fp32 master weights changes them, and the bf16 copy follows
    packed            several sequences in one row against each alone, in fp32 with sdpa and in bf16
                      with flash-attention; positions that do not restart must show as a difference
    audio             another clip changes the answers' log-probabilities; a text-only batch runs,
                      and its silent clip gives the audio tower gradients of exactly zero
    precision         log-probabilities in bf16 against fp32, the same weights
    shared            --sequences answers to one prompt with the prompt computed once
                      (`train.share_prompts`, sdpa), against a packed row of each: the same in fp32,
                      and how much faster a pass is in bf16
    update            one actor update of --sequences rows, over micro-batch and gradient
                      checkpointing: tokens/s, MFU, peak memory
    profile           slowest kernels of the best cell, if its MFU is below 45 % (or --profile)
    end_to_end        two steps of `python -m soundmind.train`, the stand-in, where verl and vLLM are

The same as in training: model class, forward, logits at the answers' positions alone, autocast
to bf16 over bf16 weights, gradients summed and stored in fp32, AdamW on fp32 master weights, gradient
clipping. Not the same: one process without FSDP, so nothing is gathered or scattered, and the
optimizer's part of an update weighs more than in a run sharded over several GPUs; few layers, so the
vocabulary's part weighs more; every row has a clip of its own, where the rows of one prompt share.

Needs torch and transformers. Whatever else is missing is named and its part skipped.
Writes  outputs/gpu_check.json (--output) and, with a profile, <output>.profile.txt beside it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_batches import WIDTHS
from gpu_numbers import Numbers, Row
from gpu_speed import REPOSITORY, Speed, cell_line, number

from soundmind.system import files as system_files
from soundmind.system import machine


class GpuCheck(Numbers, Speed):
    """All parts, in the order in which they run."""

    PARTS = (
        "environment",
        "forward",
        "backward",
        "optimizer_step",
        "packed",
        "audio",
        "precision",
        "shared",
        "update",
        "profile",
        "end_to_end",
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as text: part, status, seconds, figures; one figure a line."""
    lines = [f"{'part':<16}{'status':<9}{'s':>8}  figures", "-" * 78]
    for row in rows:
        shown = {n: v for n, v in row.figures.items() if n not in ("cells", "traceback")}
        details = [f"{name} {number(value)}" for name, value in shown.items()]
        if row.message:
            details.insert(0, row.message)
        lines.append(
            f"{row.part:<16}{row.status:<9}{row.seconds:>8.1f}  {(details or [''])[0]}".rstrip()
        )
        lines += [" " * 35 + detail for detail in details[1:]]
        lines += [" " * 35 + cell_line(cell) for cell in row.figures.get("cells", [])]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--width", choices=sorted(WIDTHS), help="default: 7b, on a CPU tiny")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (4)")
    parser.add_argument("--audio-layers", type=int, default=4, help="of the audio tower (4)")
    parser.add_argument("--vocabulary", type=int, help="fewer tokens, where memory is short")
    parser.add_argument("--device", default=default_device, help=f"default here: {default_device}")
    parser.add_argument("--attention", help="flash_attention_2 or sdpa; default: what is there")
    parser.add_argument("--clip-seconds", type=float, help="default: 60, with tiny 3")
    parser.add_argument("--answer-tokens", type=int, help="default: 700, with tiny 48")
    parser.add_argument("--instruction-tokens", type=int, help="default: 120, with tiny 16")
    parser.add_argument("--sequences", type=int, help="rows of one update; default: 8, tiny 2")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="rows a pass (1 2 4 8)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, median taken (3)")
    parser.add_argument("--parts", nargs="+", choices=GpuCheck.PARTS, default=GpuCheck.PARTS)
    parser.add_argument("--skip", nargs="+", choices=GpuCheck.PARTS, default=[])
    parser.add_argument("--profile", action="store_true", help="profile whatever the MFU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check.json"))
    options = parser.parse_args(argv)
    cpu = torch.device(options.device).type == "cpu"
    options.width = options.width or ("tiny" if cpu else "7b")
    tiny = options.width == "tiny"
    for name, small, full in (
        ("clip_seconds", 3.0, 60.0),
        ("answer_tokens", 48, 700),
        ("instruction_tokens", 16, 120),
        ("sequences", 2, 8),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if tiny else full)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    parts = [part for part in options.parts if part not in options.skip]
    print(
        f"Qwen2.5-Omni's thinker, random weights: width {options.width}, {options.layers} layers, "
        f"{options.audio_layers} audio layers, on {options.device}",
        flush=True,
    )
    check = GpuCheck(options)
    rows = check.run(parts, lambda row: print(f"{row.part}: {row.status}", flush=True))
    report = {
        "versions": machine.versions(options.seed, REPOSITORY),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "rows": [asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    system_files.write_json(options.output, report)
    print("\n" + table(rows))
    print(f"\nwritten: {options.output}")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
