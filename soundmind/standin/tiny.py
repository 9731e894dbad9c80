"""The stand-in checkpoint: tokenizer, processor, configuration and weights, small.

The command line, `soundmind.tiny`, describes what the folder holds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.model.processor import CHAT_TEMPLATE
from soundmind.standin import syllogism
from soundmind.system.files import replace_folder
from soundmind.task import prompts

if TYPE_CHECKING:
    from transformers import Qwen2TokenizerFast

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

# The published names. The last three are the thinker's marks for the talker; in published folders
# these are ids beyond the tokenizer's.
SPECIAL_TOKENS = (
    *(PADDING, "<|im_start|>", END_OF_TURN, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
)

# Attribute names of the tokenizer; the processor asks for the first seven. All special tokens have
# one, so that `tokenizer.all_special_ids` is complete: rollouts ban those ids.
_NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "im_start_token": "<|im_start|>",
    "tts_pad_token": "<tts_pad>",
    "tts_bos_token": "<tts_text_bos>",
    "tts_eos_token": "<tts_text_eod>",
}

STANDIN_VERSION = (
    1  # to be raised with every change of sizes or files, so that old folders are rebuilt
)
STANDIN_RECORD = "warmup.json"  # what was built and how, inside the checkpoint folder
SPEAKERS = ("Chelsie", "Ethan")  # the published voices
WIDTH = 128  # of the audio tower and of the text model
MAX_POSITIONS = 32_768  # as published; a 300 s clip is 7,500 audio tokens
# transformers' 0.02 is meant for widths in the thousands and is small for a width of 128. [ours]
INITIALIZER_RANGE = 0.05


# --- tokenizer and processor ----------------------------------------------------------------------


def tokenizer_corpus() -> list[str]:
    """The texts whose words become single tokens: practice sentences, answers, chat words."""
    sentences = [s.text for s in syllogism.all_syllogisms()]
    answers = [f"<think>{s.reasoning}</think>\n{s.answer}" for s in syllogism.all_syllogisms()]
    shortcuts = [f"<think>{s.heard}</think>" for s in syllogism.all_syllogisms()]
    return [*sentences, *answers, *shortcuts, "system\nuser\nassistant\n", practice_instruction()]


def practice_instruction() -> str:
    """The instruction every practice prompt carries."""
    return prompts.INSTRUCTIONS["practice"]


def build_tokenizer(corpus: Iterable[str]) -> Qwen2TokenizerFast:
    """Byte-level BPE in which every word of `corpus` is one token and any text can be written."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The budget is never reached: merging ends when every word of the corpus is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(specials)
    result = Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        bos_token=None,
        unk_token=None,
        model_max_length=MAX_POSITIONS,
        extra_special_tokens=_NAMED_TOKENS,
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def build_processor(tokenizer: Qwen2TokenizerFast) -> Any:
    """Qwen2_5OmniProcessor with the published feature values (300 s window, 100 frames/s)."""
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    extractor = WhisperFeatureExtractor(
        feature_size=128,
        sampling_rate=16_000,
        hop_length=160,
        n_fft=400,
        chunk_length=300,  # s; with Whisper's default of 30 longer clips are cut without a word
        return_attention_mask=True,
    )
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=extractor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


# --- configuration and weights --------------------------------------------------------------------


def build_config(tokenizer: Qwen2TokenizerFast) -> Any:
    """Qwen2_5OmniConfig with the published keys, small sizes and the ids of our own tokenizer."""
    from transformers import Qwen2_5OmniConfig

    def token_id(text: str) -> int:
        found = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(found, int), f"{text!r} is not one token of the stand-in"
        return found

    audio_ids = {
        "audio_token_index": token_id("<|AUDIO|>"),
        "image_token_index": token_id("<|IMAGE|>"),
        "video_token_index": token_id("<|VIDEO|>"),
        "audio_start_token_id": token_id("<|audio_bos|>"),
        "audio_end_token_id": token_id("<|audio_eos|>"),
        "vision_start_token_id": token_id("<|vision_bos|>"),
        "vision_end_token_id": token_id("<|vision_eos|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]}
    audio_config = {
        "d_model": WIDTH,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 3 * WIDTH,
        "output_dim": WIDTH,
        "num_mel_bins": 128,
        "n_window": 100,
        "max_source_positions": 1500,
        "initializer_range": INITIALIZER_RANGE,
    }
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope,
        "tie_word_embeddings": False,  # as published, at this level; the class default is True
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": token_id(PADDING),
        "eos_token_id": token_id(END_OF_TURN),
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    thinker = {
        **audio_ids,
        "audio_config": audio_config,
        "text_config": text_config,
        "vision_config": vision_config,
        "user_token_id": token_id("user"),
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": token_id(PADDING),
    }
    # The talker's codec ids stay as published, so that `generate` works with its own defaults.
    talker = {
        **audio_ids,
        "tts_text_start_token_id": token_id("<tts_text_bos>"),
        "tts_text_end_token_id": token_id("<tts_text_eod>"),
        "tts_text_pad_token_id": token_id("<tts_pad>"),
        "embedding_size": WIDTH,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {**rope, "mrope_section": [2, 3, 3]},
    }
    token2wav = {
        "dit_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "emb_dim": 16,
            "num_embeds": 8448,  # published: 8193; an untrained talker says any of its codes
            "look_ahead_layers": [0],
            "look_backward_layers": [0],
            "enc_emb_dim": 16,
            "enc_dim": 16,
            "enc_channels": [16, 16, 16, 16, 48],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
        },
        "bigvgan_config": {
            "upsample_initial_channel": 64,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
        },
    }
    config = Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config=talker,
        token2wav_config=token2wav,
        enable_audio_output=True,
    )
    config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    return config


def build_model(config: Any, seed: int) -> Any:
    """The full class in float32 with random weights that depend on `seed` alone."""
    import torch
    from transformers import Qwen2_5OmniForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5OmniForConditionalGeneration(config).float()


def speaker_dictionary(config: Any, seed: int) -> dict[str, dict[str, Any]]:
    """What `spk_dict.pt` holds: per voice a start token and two random reference tensors.

    cond (1, enc_emb_dim) float32, ref_mel (1, frames, mel_dim) float32.
    """
    import torch

    dit = config.token2wav_config.dit_config
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            "bos_token": config.talker_config.tts_text_start_token_id,
            "cond": torch.randn(1, dit.enc_emb_dim, generator=generator),
            "ref_mel": torch.randn(1, 32, dit.mel_dim, generator=generator),
        }
        for name in SPEAKERS
    }


def write_checkpoint(model: Any, tokenizer: Qwen2TokenizerFast, folder: Path, seed: int) -> None:
    """Write everything a Qwen2.5-Omni folder holds, in float32, into the existing `folder`."""
    import torch
    from transformers import GenerationConfig

    model.save_pretrained(folder)  # float32, one file: 11 MB
    processor = build_processor(tokenizer)
    processor.save_pretrained(folder)
    # The published folder keeps these values in preprocessor_config.json, where other tools look.
    processor.feature_extractor.save_pretrained(folder)
    torch.save(speaker_dictionary(model.config, seed), folder / "spk_dict.pt")
    # A response that contains a placeholder cannot be trained on: the next forward pass counts it
    # as a clip without features.
    banned = [text for text in SPECIAL_TOKENS if text != END_OF_TURN]
    GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
        suppress_tokens=tokenizer.convert_tokens_to_ids(banned),
    ).save_pretrained(folder)


def parameter_counts(model: Any) -> dict[str, int]:
    """Parameters of the parts of the full model, by published name."""

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    thinker = model.thinker
    return {
        "thinker.audio_tower": count(thinker.audio_tower),
        "thinker.model and lm_head": count(thinker.model) + count(thinker.lm_head),
        "thinker.visual": count(thinker.visual),
        "talker": count(model.talker),
        "token2wav": count(model.token2wav),
    }


# --- command --------------------------------------------------------------------------------------


def recipe_digest() -> str:
    """Digest of everything but the seed that decides what an untrained checkpoint contains."""
    texts = (*tokenizer_corpus(), *SPECIAL_TOKENS, CHAT_TEMPLATE)
    return digest_of(str(STANDIN_VERSION), *texts)


def digest_of(*parts: bytes | str) -> str:
    """Short hexadecimal digest over `parts`, each kept apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def is_current(output: Path, identity: dict[str, Any]) -> bool:
    """Whether `output` is a checkpoint that a build with this `identity` would make again."""
    try:
        record = json.loads((output / STANDIN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("identity") == identity


def build_stand_in(output: Path, *, seed: int = 0, data: Path | None = None) -> dict[str, Any]:
    """Build the stand-in into the folder `output` and return what `warmup.json` says.

    Without `data` the weights stay random. With it they are warmed up on its train split first.
    Does nothing when `output` already holds exactly this checkpoint.
    """
    settings = None
    if data is not None:
        from soundmind.standin import warmup

        settings = warmup.identity(data)
    identity = {"seed": seed, "recipe": recipe_digest(), "warmup": settings}
    if is_current(output, identity):
        print(f"{output}: up to date", flush=True)
        record: dict[str, Any] = json.loads((output / STANDIN_RECORD).read_text(encoding="utf-8"))
        return record

    import torch
    import transformers

    # Its default talker configuration warns about its own ids; and one shard needs no progress bar.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    tokenizer = build_tokenizer(tokenizer_corpus())
    model = build_model(build_config(tokenizer), seed)
    parameters = parameter_counts(model)
    in_thinker = sum(count for name, count in parameters.items() if name.startswith("thinker."))
    print(
        f"stand-in: {in_thinker / 1e6:.2f} M parameters in the thinker, "
        f"{len(tokenizer)} tokens in the vocabulary, seed {seed}",
        flush=True,
    )
    record = {
        "identity": identity,
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "torch": torch.__version__,
    }
    if data is not None:
        record |= warmup.warm_up(model.thinker, tokenizer, data, seed)
    record["seconds"] = round(time.monotonic() - started, 1)

    def fill(folder: Path) -> None:
        write_checkpoint(model, tokenizer, folder, seed)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / STANDIN_RECORD).write_text(text + "\n", encoding="utf-8")

    replace_folder(output, fill)
    state = "warmed up" if data is not None else "random weights"
    print(f"{output}: {state}, {record['seconds']:.0f} s", flush=True)
    return record
