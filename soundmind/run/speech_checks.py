"""What can be known of spoken rollouts before Ray starts."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from soundmind.model.folder import ModelError, WeightFileError, check_omni_folder

CODES_A_SECOND = 50
TALKER_POSITIONS = 32_768
SPEECH_STAGES = ("codes", "transcript")
LIMITS = {  # key below `speech`: lowest and highest value
    "temperature": (0.0, math.inf),
    "top_k": (1, math.inf),
    "top_p": (1e-9, 1.0),
    "repetition_penalty": (1e-9, math.inf),
    "max_seconds": (0.04, math.inf),
    "every": (1, math.inf),
    "groups": (1e-9, 1.0),
    "transcript.seconds": (0.04, math.inf),
    "audit.every": (0, math.inf),
    "audit.rows": (1, math.inf),
}


def speech_problems(config: DictConfig) -> Iterator[str]:
    """Everything wrong with `speech`, if it is on."""
    speech = OmegaConf.select(config, "speech")
    if speech is None or not speech.enable:
        return
    wrong = list(_values(speech))
    yield from wrong
    if wrong:
        return
    if config.trainer.v1.trainer_mode != "soundmind_sync":
        yield (
            f"speech.enable needs trainer.v1.trainer_mode=soundmind_sync, not "
            f"{config.trainer.v1.trainer_mode}: in an asynchronous mode the policy has moved on by the "
            "time its rollouts could be spoken"
        )
    function = config.reward.custom_reward_function
    if function.path != "pkg://soundmind.rewards":
        yield f"speech.enable grades by soundmind.rewards, not by {function.path}"
    else:
        yield from _weights(function)
    needed = speech.max_seconds * CODES_A_SECOND + config.data.max_prompt_length + 2
    if needed > TALKER_POSITIONS:
        room = (TALKER_POSITIONS - config.data.max_prompt_length - 2) / CODES_A_SECOND
        yield (
            f"speech.max_seconds={speech.max_seconds} and data.max_prompt_length="
            f"{config.data.max_prompt_length} need {needed:.0f} of the talker's {TALKER_POSITIONS} "
            f"positions; set speech.max_seconds={math.floor(room)} or less"
        )
    folder = Path(str(speech.model)).expanduser()
    if folder.is_dir():  # a folder that is not there is named elsewhere
        yield from _folder(speech, folder, config)
    yield from _references(config)
    if _listens(speech):
        yield from _recogniser(speech)
    if speech.audit.every and importlib.util.find_spec("jiwer") is None:
        yield "speech.audit.every needs jiwer: pip install 'soundmind[eval]', or set it to 0"


def _listens(speech: Any) -> bool:
    return bool(speech.stage == "transcript" or speech.audit.every)


def _values(speech: Any) -> Iterator[str]:
    if speech.stage not in SPEECH_STAGES:
        yield f"speech.stage={speech.stage}: choose {' or '.join(SPEECH_STAGES)}"
    if speech.rows != "auto" and not (isinstance(speech.rows, int) and speech.rows > 0):
        yield f"speech.rows={speech.rows}: auto, or a number above 0"
    for key, (low, high) in LIMITS.items():
        value = OmegaConf.select(speech, key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            yield f"speech.{key}={value}: a number from {low:g} to {high:g}"


def _weights(function: Any) -> Iterator[str]:
    from soundmind.task.reward import resolve
    from soundmind.task.reward_settings import AUDIO_COMPONENTS

    given: Any = OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create({}))
    try:
        weights = resolve(**given).weights
    except (ValueError, TypeError, KeyError):
        return  # named by the check of the reward
    if not any(weights[name] for name in AUDIO_COMPONENTS):
        yield (
            "speech.enable speaks every rollout for nothing: the weights of audio_format and "
            "audio_length are 0; choose another reward_kwargs.preset, or speech.enable=false"
        )


def _folder(speech: Any, folder: Path, config: DictConfig) -> Iterator[str]:
    try:
        check_omni_folder(folder, speech=True)
    except (ModelError, WeightFileError) as error:
        yield f"speech.model: {error}"
        return
    try:
        talker = json.loads((folder / "config.json").read_text(encoding="utf-8"))["talker_config"]
        policy = Path(str(config.actor_rollout_ref.model.path)).expanduser() / "config.json"
        thinker = json.loads(policy.read_text(encoding="utf-8"))["thinker_config"]["text_config"]
    except (OSError, ValueError, KeyError):
        return  # the check of the model folder says what is wrong with it
    width, needed = thinker.get("hidden_size"), talker.get("embedding_size")
    if needed is not None and width != needed:
        yield f"speech.model={folder}: its talker reads states of width {needed}, the policy's have {width}"
    from soundmind.speech.weights import load_voice

    try:
        load_voice(folder, speech.speaker)
    except ModelError as error:
        yield f"speech.speaker: {error}"


def _references(config: DictConfig) -> Iterator[str]:
    """Rows without the length of a recorded answer cannot earn audio_length."""
    import pyarrow.parquet as pq

    files = config.data.train_files
    for path in files if isinstance(files, ListConfig) else [files]:
        if not Path(path).is_file():
            continue  # named elsewhere
        column = pq.read_table(path, columns=["extra_info"])["extra_info"]
        lacking = sum((row.as_py() or {}).get("reference_seconds") is None for row in column)
        if lacking:
            yield (
                f"{path}: {lacking} of {len(column)} rows have no reference_seconds, so their speech has "
                "no length to be measured by; preprocess with the recorded answers "
                "(PARTS=all bash scripts/download_data.sh), or set reward_kwargs.weights.audio_length=0 "
                "with speech.stage=transcript"
            )


def _recogniser(speech: Any) -> Iterator[str]:
    from soundmind.speech.recogniser import open_recogniser

    try:
        open_recogniser(str(speech.transcript.recogniser))
    except (ModelError, OSError, ValueError, KeyError) as error:
        yield f"speech.transcript.recogniser: {error}"
