"""Build the stand-in: a complete Qwen2.5-Omni checkpoint, only small, for machines without a GPU.

    python -m soundmind.tiny --output checkpoints/tiny                # build and warm up (minutes)
    python -m soundmind.tiny --output checkpoints/tiny --no-warmup    # random weights (seconds)

The folder has what a published Qwen2.5-Omni folder has: `thinker.`, `talker.` and `token2wav.`
weights under the published names, `config.json`, tokenizer, processor files with the published
values (300 s window, 16 kHz, 128 mel bins), `generation_config.json` and `spk_dict.pt`.
transformers loads it as the full class and as the thinker alone, vLLM serves it. Sizes differ:

    audio tower   width 128, 2 layers, 4 heads                      0.45 M parameters
    text model    width 128, 2 layers, 4 heads of 32, 2 KV heads    0.5 M
    vision tower  one layer, never used, never trained
    talker, token2wav   random and never trained: the stand-in writes, it does not speak

The tokenizer is a byte-level BPE of its own, trained on the practice sentences, in which every
practice word is one token. Other differences from the published folders, which tests that use their
own small files cover: the tokenizer is as long as the vocabulary (published: 151,665 ids for 151,936
rows in the 3B, 152,064 in the 7B) and holds the talker's `<tts_...>` marks (published: ids beyond
it); `generation_config.json` names end, padding and banned ids (published: none); the chat template
adds no system message and is a `.jinja` file (published: `chat_template.json`, which adds "You are a
helpful assistant." where none is given); weights are one float32 file without an index (published:
bfloat16 shards, the vocoder in float32).

Reads   data/practice (warm-up only; `python -m soundmind.practice`)
Writes  the checkpoint folder, as a whole or not at all, with `warmup.json`: seed, digests,
        parameter counts, and what the supervised warm-up did (see soundmind.standin.warmup)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soundmind.standin.tiny import build_stand_in
from soundmind.system.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.tiny", description="Build the stand-in checkpoint."
    )
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--data", type=Path, default=Path("data/practice"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-warmup", action="store_true", help="keep the random weights (a matter of seconds)"
    )
    arguments = parser.parse_args(argv)

    build_stand_in(
        arguments.output,
        seed=arguments.seed,
        data=None if arguments.no_warmup else arguments.data,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
