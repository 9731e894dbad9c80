"""A complete Whisper folder with random weights, a stand-in for the recogniser.

python tests/support/tiny_whisper.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SPELLINGS = {"colour": "color"}


def build(folder: Path) -> None:
    """One layer of width 32 over bytes; never ends before 24 tokens, as it cannot listen."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    start, plain = "<|startoftranscript|>", "<|notimestamps|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [start, plain]})
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        max_target_positions=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(start),
    )
    model = WhisperForConditionalGeneration(config)
    generation = model.generation_config
    generation.max_new_tokens = 24
    generation.is_multilingual = False
    letters = {tokenizer.convert_tokens_to_ids(c) for c in "abcdefghijklmnopqrstuvwxyz\u0120"}
    generation.suppress_tokens = sorted(set(range(len(tokenizer))) - letters)
    generation.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(plain)
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
    (folder / "normalizer.json").write_text(json.dumps(SPELLINGS))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
