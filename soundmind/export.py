"""Turn a training checkpoint into a complete Qwen2.5-Omni folder that transformers and vLLM load.

    python -m soundmind.export outputs/grpo_tiny_cpu/<timestamp>              # last step -> .../export
    python -m soundmind.export outputs/grpo_7b_8gpu/<timestamp> --step 300 --output checkpoints/ours

A checkpoint holds what was loaded of the thinker, in one shard a rank. The result is the base
folder with that in it: weights under the names `thinker.*` in the base's files and data types, and
vision, talker, vocoder, speakers, tokenizer and processor as they were.

A LoRA run gives the same complete folder, with the adapter merged into it, and the adapter by itself
in `adapter/`, as PEFT loads it onto the thinker:

    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(base)
    policy = peft.PeftModel.from_pretrained(thinker, "<output>/adapter")

(verl's own merger writes a thinker-only folder in bfloat16 without a processor, which vLLM cannot
load.)

Reads   <run>/checkpoints/global_step_N, complete ones only; <run>/config.yaml for the base model
Writes  the output folder, under its name only when complete, with `export.json` saying what went in
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.model.export import base_of, export, find_checkpoint
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder, or a global_step_N folder")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--base", type=Path, help="the run's own base model by default")
    parser.add_argument("--output", type=Path, help="<run>/export by default")
    arguments = parser.parse_args(argv)
    checkpoint = find_checkpoint(arguments.run, arguments.step)
    output = export(
        checkpoint,
        arguments.base or base_of(arguments.run),
        arguments.output or arguments.run / "export",
    )
    print(f"{checkpoint.name} -> {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
