"""A published Qwen2.5-Omni in every small file and in none of its weights. [ours]

What a published folder brings besides weights (vocabulary, special tokens, template, processor,
configuration in its old spelling, index of tensor names) is 16 MB. `write_narrow` puts random
weights under it: the same names in the same three files, the same heads and the whole vocabulary,
and as little width and depth as verl and vLLM can run. What then trains, exports and reloads is
what the real one will, but for numbers.

The stand-in of `soundmind.standin.tiny` is the other way round: small files of its own, weights
that have learnt something.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soundmind.model.folder import WEIGHTS_INDEX
from soundmind.planning.sizes import PUBLISHED

CONFIG_FILE = "config.json"
# What a rehearsal reads; a published folder holds a few more (licence, card, speakers).
SMALL_FILES = (
    *(CONFIG_FILE, "generation_config.json", "preprocessor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", WEIGHTS_INDEX),
)
HEAD = 32  # width of a head, 128 as published: the least that vLLM's attention on a CPU takes
LAYERS = 2
AUDIO_HEAD, FFN = 16, 256
SHARPER = 8.0  # how much larger the output head's first weights are than transformers makes them
START_TOKENS = {"Chelsie": 151_872, "Ethan": 151_870}  # of the voices; beyond the tokenizer


class PublishedError(ValueError):
    """Small files that no model can be built under; the message names the file and the next step."""


def fetch_small_files(hub_id: str) -> Path:
    """The small files of a model on the Hub, from the cache where they are."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(SMALL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PublishedError(
            f"the small files of {hub_id} cannot be fetched ({' '.join(str(error).split())[:200]}); "
            "name a folder that holds them: --published DIR"
        ) from error


def small_file_faults(folder: Path) -> Iterator[str]:
    """Why no rehearsal can be built on the small files of `folder`; nothing if it can."""
    missing = [name for name in SMALL_FILES if not (folder / name).is_file()]
    if missing:
        yield f"{folder} lacks {', '.join(missing)}: half a download; fetch it again"
        return
    read: dict[str, Any] = {}
    for name in SMALL_FILES:
        if name.endswith(".json"):
            try:
                read[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{folder / name} is no JSON ({error}): half a download; fetch it again"
    if len(read) < len([name for name in SMALL_FILES if name.endswith(".json")]):
        return
    yield from _config_faults(folder, read[CONFIG_FILE])


def _config_faults(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    try:
        thinker = config["thinker_config"]
        vocabulary = int(thinker["text_config"]["vocab_size"])
        narrow_config(config, None)
    except (KeyError, TypeError) as error:
        yield (
            f"{folder / CONFIG_FILE} has no {error}: it is no complete Qwen2.5-Omni, or a newer "
            "transformers wrote it; take the published one"
        )
        return
    import transformers

    try:
        built = transformers.Qwen2_5OmniConfig.from_dict(narrow_config(config, None))
        rope = built.thinker_config.text_config.rope_parameters["mrope_section"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield (
            f"{folder / CONFIG_FILE}: transformers {transformers.__version__} cannot read it "
            f"({type(error).__name__}: {error}); bash scripts/setup.sh installs 5.9.0"
        )
        return
    if sum(rope) * 2 != HEAD:
        yield f"{folder / CONFIG_FILE}: rotary sections {rope} do not fill a head"
    from soundmind.model.processor import load_processor

    try:
        processor = load_processor(str(folder))
    except ValueError as error:
        yield str(error)
        return
    tokenizer = processor.tokenizer
    if len(tokenizer) > vocabulary:
        yield (
            f"{folder}: the tokenizer knows {len(tokenizer):,} tokens and the head has "
            f"{vocabulary:,} rows; the files are of different models, fetch them again"
        )


def narrow_config(published: dict[str, Any], model: str | None) -> dict[str, Any]:
    """The content of a narrow `config.json`: the published one with widths and depths made small.

    `model` is the name of a published model (`Qwen2.5-Omni-7B`) whose heads and vocabulary are
    taken in the place of those in `published`, whose other files do for both.
    """
    config = copy.deepcopy(published)
    thinker = config["thinker_config"]
    text, audio, vision = (
        thinker[part] for part in ("text_config", "audio_config", "vision_config")
    )
    if model in PUBLISHED:
        size = PUBLISHED[model].text
        text["num_attention_heads"], text["num_key_value_heads"] = size.heads, size.kv_heads
        text["vocab_size"] = size.vocab
    width = text["num_attention_heads"] * HEAD
    text.update(hidden_size=width, intermediate_size=FFN, num_hidden_layers=LAYERS)
    text.setdefault("max_window_layers", LAYERS)
    rope = text.get("rope_scaling") or text["rope_parameters"]
    shrunk = HEAD * sum(rope["mrope_section"]) // (2 * sum(rope["mrope_section"]))
    rope["mrope_section"] = _sections(rope["mrope_section"], shrunk)
    audio.update(
        d_model=audio["encoder_attention_heads"] * AUDIO_HEAD,
        encoder_layers=LAYERS,
        num_hidden_layers=LAYERS,
        encoder_ffn_dim=FFN,
        output_dim=width,
    )
    vision_width = vision["num_heads"] * 16
    vision.update(hidden_size=vision_width, embed_dim=vision_width, intermediate_size=64, depth=1)
    vision.update(out_hidden_size=width, fullatt_block_indexes=[0])
    talker = config["talker_config"]
    talker.update(hidden_size=64, intermediate_size=64, num_hidden_layers=1, embedding_size=width)
    vocoder = config["token2wav_config"]
    vocoder["dit_config"].update(
        {"hidden_size": 32, "dim": 32, "num_hidden_layers": 1, "depth": 1},
        num_attention_heads=2,
        heads=2,
        head_dim=16,
        emb_dim=16,
        look_ahead_layers=[0],
        look_backward_layers=[0],
        enc_emb_dim=16,
        enc_dim=16,
        enc_channels=[16, 16, 16, 16, 48],
        enc_attention_channels=8,
        enc_se_channels=8,
    )
    vocoder["bigvgan_config"].update(
        upsample_initial_channel=64, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]]
    )
    return config


def _sections(published: list[int], total: int) -> list[int]:
    """Rotary sections in the published proportions that add up to `total`."""
    whole = sum(published)
    sections = [total * part // whole for part in published[1:]]
    return [total - sum(sections), *sections]


def write_narrow(published: Path, output: Path, model: str | None = None, seed: int = 0) -> None:
    """Write a narrow model under the small files of `published` into the existing folder `output`.

    Raises `PublishedError` for a tensor that the published index does not know.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    for name in SMALL_FILES:
        shutil.copyfile(published / name, output / name)
    config = narrow_config(json.loads((published / CONFIG_FILE).read_text(encoding="utf-8")), model)
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig.from_dict(config))
        # At their first values all tokens are equally likely, and everybody agrees with everybody.
        built.thinker.lm_head.weight.data *= SHARPER
    torch.save(_speakers(built.config, seed), output / "spk_dict.pt")
    index = json.loads((published / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    places: dict[str, str] = index["weight_map"]
    kinds = {kind_of(name): place for name, place in places.items()}
    files: dict[str, dict[str, Any]] = {}
    weight_map = {}
    for name, tensor in built.state_dict().items():
        place = places.get(name) or kinds.get(kind_of(name))
        if place is None:
            raise PublishedError(
                f"transformers names a tensor {name}, which {published / WEIGHTS_INDEX} does not "
                "know: files and package are of different versions"
            )
        # As published: everything in bfloat16 but the vocoder.
        dtype = torch.float32 if name.startswith("token2wav.") else torch.bfloat16
        files.setdefault(place, {})[name] = tensor.to(dtype).contiguous()
        weight_map[name] = place
    for place, tensors in files.items():
        save_file(tensors, output / place, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (output / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def any_reward(response: str, row: dict[str, Any]) -> float:
    """A component for rehearsals: tells one random answer from the next, and nothing else."""
    return len(response) % 7 / 7


def _speakers(config: Any, seed: int) -> dict[str, dict[str, Any]]:
    """The two published voices with their published start tokens and random features."""
    from soundmind.standin.tiny import speaker_dictionary

    voices = speaker_dictionary(config, seed)
    for name, token in START_TOKENS.items():
        voices[name]["bos_token"] = token
    return voices


def kind_of(name: str) -> str:
    """A tensor's name without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)
