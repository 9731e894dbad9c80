"""Model folders as people have them, made from the random stand-in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SPARE_ROWS = 15  # as the published 3B has 271 and the 7B 399


def with_spare_rows(folder: Path, target: Path) -> Path:
    """A copy whose head has `SPARE_ROWS` more rows than its tokenizer has ids, as published ones do.

    The rows are ten times as long as the others, so that whoever forgets to mask them sees it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in ("thinker.lm_head.weight", "thinker.model.embed_tokens.weight"):
        rows = tensors[name]
        spare = 10 * rows[:SPARE_ROWS].roll(1, 0)
        tensors[name] = torch.cat([rows, spare])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["thinker_config"]["text_config"]["vocab_size"] += SPARE_ROWS
    (target / "config.json").write_text(json.dumps(config))
    return target


def with_two_ends(folder: Path, target: Path) -> Path:
    """A copy that declares `<|endoftext|>` an end beside the turn's, as some fine-tunes do."""
    shutil.copytree(folder, target)
    path = target / "generation_config.json"
    settings = json.loads(path.read_text())
    ends = {settings["eos_token_id"], settings["pad_token_id"]}
    assert len(ends) == 2
    path.write_text(json.dumps({**settings, "eos_token_id": sorted(ends)}))
    return target
