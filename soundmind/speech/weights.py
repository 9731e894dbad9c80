"""Talker and vocoder out of a complete Qwen2.5-Omni folder: every tensor there, or an error.

transformers' own call for the vocoder finds none of its tensors in a complete folder and goes on
with random weights and a warning, so both parts are filled from the files by name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from soundmind.model.folder import WEIGHTS_INDEX, ModelError

VOICES_FILE = "spk_dict.pt"


@dataclass(frozen=True)
class Voice:
    """An entry of `spk_dict.pt`.

    `start_token` is a text token of the thinker; `condition` (1, enc_emb_dim) and `reference_mel`
    (1, frames, mel bins), both float32, tell the vocoder whose voice it is.
    """

    start_token: int
    condition: torch.Tensor
    reference_mel: torch.Tensor


def load_voice(folder: Path, name: str) -> Voice:
    """The voice `name` of a model folder; ModelError names the voices there are."""
    path = folder / VOICES_FILE
    if not path.is_file():
        raise ModelError(f"{folder} lacks {VOICES_FILE}, its voices; fetch the model again")
    voices: dict[str, Any] = torch.load(path, weights_only=True)
    if name not in voices:
        raise ModelError(f"{folder}: no voice {name!r} in {VOICES_FILE}; it has {sorted(voices)}")
    entry = voices[name]
    return Voice(int(entry["bos_token"]), entry["cond"].float(), entry["ref_mel"].float())


def load_part(module: torch.nn.Module, folder: Path, prefix: str) -> None:
    """Fill `module`, in its own types, with the tensors of `folder` named `prefix` + its names."""
    state, wanted = read_tensors(folder, prefix), module.state_dict()
    missing = sorted(set(wanted) - set(state))
    shapes = sorted(n for n in set(wanted) & set(state) if wanted[n].shape != state[n].shape)
    for names, what in ((missing, "lacks"), (shapes, "has misshapen")):
        if names:
            raise ModelError(
                f"{folder} {what} {len(names)} tensors of {prefix}*, the first {prefix}{names[0]}; "
                "fetch the model again, or make the folder anew with `python -m soundmind.export`"
            )
    fitting = {name: state[name].to(tensor.dtype) for name, tensor in wanted.items()}
    module.load_state_dict(fitting, assign=True)


def read_tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder whose names begin with `prefix`, without it."""
    index = folder / WEIGHTS_INDEX
    files: dict[str, list[str]] = defaultdict(list)
    if index.is_file():
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if name.startswith(prefix):
                files[file].append(name)
    else:
        files["model.safetensors"] = []
    state = {}
    for file, names in files.items():
        try:
            with safe_open(folder / file, "pt") as tensors:
                for name in names or [n for n in tensors.keys() if n.startswith(prefix)]:  # noqa: SIM118
                    state[name[len(prefix) :]] = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / file}: {error}; fetch the model again") from error
    return state
