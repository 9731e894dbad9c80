"""Dimensions of Qwen2.5-Omni and the parameter counts that follow from them. No torch needed.

Planning (`soundmind.plan`) and the count of floating-point operations (`soundmind.planning.flops`) must
work before a model is on disk, so the published dimensions are written down here: `QWEN2_5_OMNI_7B` and
`QWEN2_5_OMNI_3B`. `from_folder` reads the same from any complete folder, `from_config` from the
content of a `config.json`. `parameters` counts exactly, part by part, under the part names of
`soundmind.model.parts`; tests compare the counts with transformers' own classes.

transformers' class defaults are the 7B for the text model and the audio tower. For vision and talker
they are not: a default `Qwen2_5OmniConfig()` has a vision tower of 3.1 billion parameters, the
published one has 0.68.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.system.errors import UserError


class SizeError(UserError, ValueError):
    """A model whose dimensions cannot be told; the message names the file and the next step."""


@dataclass(frozen=True)
class TextSize:
    """The language model: a decoder with grouped key/value heads and a gated feed-forward."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False  # whether the output head is the embedding table

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Width of all keys (or all values) of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: biases on queries, keys and values only, two norms."""
        attention = self.hidden * (2 * self.hidden + 2 * self.kv_width)
        biases = self.hidden + 2 * self.kv_width
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding table; the output head has as many, or is the same one."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Embedding, layers, last norm and output head."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters + self.hidden


@dataclass(frozen=True)
class AudioSize:
    """The audio tower: two convolutions, an encoder with attention in windows, the projector."""

    width: int  # d_model
    layers: int
    heads: int
    ffn: int
    output: int  # the language model's width
    mel_bins: int = 128
    n_window: int = 100  # half a window, in mel frames
    kernel: int = 3  # of both convolutions

    @property
    def layer_parameters(self) -> int:
        """Parameters of one encoder layer; the keys have no bias."""
        attention = 4 * self.width * self.width + 3 * self.width
        ffn = 2 * self.width * self.ffn + self.ffn + self.width
        return attention + ffn + 4 * self.width  # two layer norms

    @property
    def tower_parameters(self) -> int:
        """Convolutions, the two marker embeddings, layers and last norm, without the projector."""
        convolutions = self.kernel * self.width * (self.mel_bins + self.width) + 2 * self.width
        return convolutions + 2 * self.output + self.layers * self.layer_parameters + 2 * self.width

    @property
    def projector_parameters(self) -> int:
        """The output projection `audio_tower.proj`, into the language model's width."""
        return self.width * self.output + self.output


@dataclass(frozen=True)
class VisionSize:
    """The vision tower; never trained and never run here, but part of a complete folder."""

    hidden: int
    layers: int
    intermediate: int
    output: int
    channels: int = 3
    patch: int = 14  # pixels, in both directions
    temporal_patch: int = 2  # frames
    merge: int = 2  # patches merged per direction

    @property
    def parameters(self) -> int:
        """Patch embedding, blocks and merger."""
        embedding = self.hidden * self.channels * self.temporal_patch * self.patch * self.patch
        attention = 4 * (self.hidden * self.hidden + self.hidden)
        mlp = 3 * self.hidden * self.intermediate + 2 * self.intermediate + self.hidden
        block = attention + mlp + 2 * self.hidden
        merged = self.hidden * self.merge * self.merge
        merger = self.hidden + merged * merged + merged + merged * self.output + self.output
        return embedding + self.layers * block + merger


@dataclass(frozen=True)
class OmniSize:
    """A complete Qwen2.5-Omni: what the thinker is made of, and the size of its folder."""

    name: str
    text: TextSize
    audio: AudioSize
    vision: VisionSize
    source: str  # where the numbers are from
    folder_bytes: int = 0  # of a complete folder's weights; 0: the folder on this disk tells

    @property
    def thinker_parameters(self) -> int:
        """Language model, audio tower, projector and vision tower."""
        counts = parameters(self)
        return sum(
            counts[part] for part in ("language_model", "audio_tower", "projector", "vision")
        )


QWEN2_5_OMNI_7B = OmniSize(
    name="Qwen2.5-Omni-7B",
    text=TextSize(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152_064),
    audio=AudioSize(width=1280, layers=32, heads=20, ffn=5120, output=3584),
    vision=VisionSize(hidden=1280, layers=32, intermediate=3420, output=3584),
    source=(
        "Qwen/Qwen2.5-Omni-7B; equal to the values that two published fine-tunes of it were read with, "
        "parameters of the thinker included"
    ),
    # Thinker and talker in bf16, the vocoder in fp32.
    folder_bytes=2 * (8_931_813_888 + 1_351_360_256) + 4 * 449_051_264 + 128,
)

QWEN2_5_OMNI_3B = OmniSize(
    name="Qwen2.5-Omni-3B",
    text=TextSize(hidden=2048, layers=36, heads=16, kv_heads=2, intermediate=11008, vocab=151_936),
    audio=AudioSize(width=1280, layers=32, heads=20, ffn=5120, output=2048),
    vision=VisionSize(hidden=1280, layers=32, intermediate=3420, output=2048),
    source="Qwen/Qwen2.5-Omni-3B; its published config.json and index",
    folder_bytes=11_972_343_936,
)

PUBLISHED = {size.name: size for size in (QWEN2_5_OMNI_7B, QWEN2_5_OMNI_3B)}


def parameters(size: OmniSize) -> dict[str, int]:
    """Parameters of each part, under the names of `soundmind.model.parts.PARTS`.

    Talker and vocoder, which no run trains, are not counted: see `OmniSize.folder_bytes`.
    """
    return {
        "language_model": size.text.parameters,
        "projector": size.audio.projector_parameters,
        "audio_tower": size.audio.tower_parameters,
        "vision": size.vision.parameters,
    }


def from_config(config: Mapping[str, Any], name: str, source: str) -> OmniSize:
    """Dimensions from the content of a complete folder's `config.json`.

    Raises `SizeError` naming the missing key if it is not the configuration of a Qwen2.5-Omni.
    """
    try:
        thinker = config["thinker_config"]
        text, audio = thinker["text_config"], thinker["audio_config"]
        vision = thinker["vision_config"]
        return OmniSize(
            name=name,
            text=TextSize(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                intermediate=text["intermediate_size"],
                vocab=text["vocab_size"],
                # Published folders write it here; transformers 5 writes it for the thinker.
                tied=bool(
                    text.get("tie_word_embeddings", thinker.get("tie_word_embeddings", False))
                ),
            ),
            audio=AudioSize(
                width=audio["d_model"],
                layers=audio["encoder_layers"],
                heads=audio["encoder_attention_heads"],
                ffn=audio["encoder_ffn_dim"],
                output=audio["output_dim"],
                mel_bins=audio["num_mel_bins"],
                n_window=audio["n_window"],
            ),
            vision=VisionSize(
                hidden=vision["hidden_size"],
                layers=vision["depth"],
                intermediate=vision["intermediate_size"],
                output=vision["out_hidden_size"],
                channels=vision.get("in_channels", 3),
                patch=vision.get("patch_size", 14),
                temporal_patch=vision.get("temporal_patch_size", 2),
                merge=vision.get("spatial_merge_size", 2),
            ),
            source=source,
        )
    except (KeyError, TypeError) as error:
        raise SizeError(
            f"{source}: {error} is missing; a config.json of a complete Qwen2.5-Omni folder has "
            "thinker_config with text_config, audio_config and vision_config"
        ) from error


def from_folder(folder: str | Path) -> OmniSize:
    """Dimensions of the model in `folder`, from its `config.json`; the weights are not read.

    Raises `SizeError` if the file is missing, is no JSON or describes another model.
    """
    path = Path(folder).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SizeError(f"{path} not found; a complete Qwen2.5-Omni folder has one") from error
    except (OSError, ValueError) as error:
        raise SizeError(f"{path} cannot be read: {error}; download the folder again") from error
    return from_config(config, Path(folder).name, str(path))


def model_size(path: str) -> OmniSize:
    """Dimensions of the model that a configuration names: a folder, or a published model.

    A folder that is not there yet (`checkpoints/Qwen2.5-Omni-7B`) and a Hub id
    (`Qwen/Qwen2.5-Omni-7B`) are told by their last component. Raises `SizeError` if neither helps.
    """
    if (Path(path).expanduser() / "config.json").is_file():
        return from_folder(path)
    name = Path(path).name
    if name in PUBLISHED:
        return PUBLISHED[name]
    raise SizeError(
        f"{path}: no config.json there, and {name!r} is not a published model; known without a "
        f"folder: {', '.join(PUBLISHED)}"
    )
