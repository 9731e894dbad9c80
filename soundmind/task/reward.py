"""Rule-based reward of SoundMind: what one response earns, term by term.

    score = 1.0 * text_format + 0.5 * audio_format + 2.0 * answer
          + 1.0 * text_length + 0.75 * audio_length                          [paper] sec. 4, 5.1

    text_format    1 if the response is one `<think>` block and then its verdict, else 0
    audio_format   1 if the transcript of the response's speech ends on a verdict, else 0
    answer         1 if text_format is 1 and the verdict equals the ground truth, else 0
    text_length    min(1, L / L_ref), L in tokens of the policy's tokenizer
    audio_length   min(1, T / T_ref), T in codec tokens or seconds of the response's speech

Every component lies in [0, 1], so a weight is the most its component can add: 5.25 in all with
speech. Without speech, the usual rollout, both audio terms drop out, weight and all: 4.0.
`labels.split_response` holds the format rule, docs/rewards.md a table of what cheating earns.

verl calls `compute_score` for every response and averages, logs and dumps what it returns:

    reward:
      custom_reward_function:
        path: pkg://soundmind.rewards
        name: compute_score
        reward_kwargs:
          preset: paper              # PRESETS below
          weights: {text_length: 0}  # optional: change single weights of the preset
          length_unit: tokens        # or words
          length: paper              # or capped, correct_only: LENGTHS below
          labels: [A, B, C, D]       # optional: another label set; default entailment
          components:                # optional: more terms, (response: str, row: dict) -> [0, 1]
            - {name: brevity, path: pkg://my_rewards:brevity, weight: 0.5}   # options: {...} by keyword

Saved responses are scored again, under any of these settings and without a GPU, by

    python -m soundmind.rewards outputs/run/rollouts/100.jsonl --preset guarded

which reads JSON lines (verl's dumps or our predictions) and prints the component table
(`soundmind.task.rescore`). Importing this module needs the standard library alone.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

from soundmind.task import guards
from soundmind.task.labels import (
    Response,
    parse_spoken_verdict,
    split_response,
)
from soundmind.task.reward_settings import LengthUnit, Plugin, Reward, resolve

logger = logging.getLogger(__name__)

# What a dumped rollout must carry besides the components to be graded again by any preset.
ROW_KEYS = (
    "reference_tokens",
    "reference_words",
    "reference_seconds",
    "reference_speech_tokens",
    "response_tokens",
    "speech_transcript",
    "speech_seconds",
    "speech_tokens",
)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | int | str]:
    """Grade one response; verl's contract, so the argument names are verl's.

    `solution_str` is the decoded response alone. `extra_info` may hold the keys of ROW_KEYS; the
    rollout's token count also comes as the keyword `response_tokens`. Returns `score`, every
    component, `acc` (the verdict is right, whatever the format), `pred` (the verdict or ""),
    `parsed` (there is a verdict), `response_tokens` (-1 if unknown) and `reward_error` (a
    plug-in failed or the ground truth is no label; its part counts 0 and the log has the cause):
    the same keys for every response of a configuration.

    Never raises on a response: verl would drop the whole group of rollouts without a trace. A
    wrong configuration raises ValueError; `resolve` finds it before a run starts.
    """
    response_tokens = kwargs.pop("response_tokens", None)
    reward = _resolve_cached(kwargs)
    row: Mapping[str, Any] = extra_info if isinstance(extra_info, Mapping) else {}
    num_tokens = quantity(
        row.get("response_tokens") if response_tokens is None else response_tokens
    )

    response = split_response(solution_str, reward.labels)
    values = _grade(reward, response, row, num_tokens)
    truth = reward.labels.read(str(ground_truth))
    right = truth is not None and response.verdict == truth
    values["answer"] = 1.0 if right and values["text_format"] == 1.0 else 0.0
    if reward.length == "correct_only":
        values["text_length"] *= values["answer"]

    cause = ""
    if truth is None:
        cause = f"ground truth {ground_truth!r} is none of {reward.labels.labels}"
        _log_once(
            logging.ERROR,
            "ground truth %r of %s is none of %s: the answer counts 0 and reward_error 1; "
            "see reward_kwargs.labels",
            ground_truth,
            data_source,
            reward.labels.labels,
        )
    if reward.plugins:
        full_row = {**row, "data_source": data_source, "ground_truth": ground_truth}
        full_row["response_tokens"] = None if num_tokens is None else int(num_tokens)
        for plugin in reward.plugins:
            value, failure = _plugin_value(plugin, solution_str, full_row)
            cause = cause or failure
            values[plugin.name] = value

    score = 0.0
    for name, weight in reward.weights.items():
        score += weight * values[name]
    return {
        "score": score,
        **values,
        "acc": 1.0 if right else 0.0,
        "pred": response.verdict or "",
        "parsed": 0.0 if response.verdict is None else 1.0,
        "response_tokens": -1 if num_tokens is None else int(num_tokens),
        "reward_error": 1.0 if cause else 0.0,
        "reward_error_cause": cause,
    }


def _grade(
    reward: Reward, response: Response, row: Mapping[str, Any], num_tokens: float | None
) -> dict[str, float]:
    """The built-in components in their fixed order; `answer` is left 0 for the caller."""
    unit, ratio = length_ratio(reward.length_unit, response.text, row, num_tokens)
    if unit != reward.length_unit:
        _log_once(
            logging.WARNING,
            "response_tokens or reference_tokens is missing: text_length is measured in words, "
            "not in tokens",
        )
    if ratio is None:
        _log_once(
            logging.WARNING,
            "row without a reference length in %s: it loses text_length, weight and all",
            unit,
        )
        ratio = 0.0
    audio_format, audio_length = _audio_terms(reward, row)
    values = {
        "text_format": 1.0 if response.well_formed else 0.0,
        "audio_format": audio_format,
        "answer": 0.0,
        "text_length": min(1.0, ratio),
        "audio_length": audio_length,
    }
    if reward.length == "capped":
        values["text_length"] *= guards.over_length_factor(ratio)
    if reward.guarded:
        if guards.is_loop(response.thinking):
            values["text_format"] = 0.0
        credit = min(1.0, ratio * guards.novelty_factor(guards.novelty(response.text)))
        values["text_length"] = credit * guards.over_length_factor(ratio)
        values["no_verdict"] = 1.0 if response.verdict is None else 0.0
    return values


def length_ratio(
    unit: LengthUnit, text: str, row: Mapping[str, Any], num_tokens: float | None
) -> tuple[LengthUnit, float | None]:
    """(unit used, L / L_ref without the cap); None where the row has no reference length.

    Tokens need the rollout's count and `reference_tokens`; where either is missing, words against
    `reference_words` stand in, since they need no tokenizer. [ours]
    """
    if unit == "tokens" and num_tokens is not None:
        reference = quantity(row.get("reference_tokens"))
        if reference:
            return "tokens", num_tokens / reference
    reference = quantity(row.get("reference_words"))
    return "words", len(text.split()) / reference if reference else None


def _audio_terms(reward: Reward, row: Mapping[str, Any]) -> tuple[float, float]:
    """(audio_format, audio_length) of the response's speech; 0.0 for what cannot be told.

    `speech_transcript` is what a recogniser heard; `speech_tokens` are codec tokens, the paper's
    unit, and `speech_seconds` the fallback. The paper does not say what well-formed audio is; here
    the transcript must end on a verdict. [ours]
    """
    transcript = row.get("speech_transcript")
    tokens, seconds = quantity(row.get("speech_tokens")), quantity(row.get("speech_seconds"))
    if transcript is None and tokens is None and seconds is None:
        _log_once(
            logging.WARNING,
            "response without speech: audio_format and audio_length drop out, weight and all "
            "(under the paper's weights the maximum is 4.0 instead of 5.25)",
        )
        return 0.0, 0.0

    audio_format = 0.0
    if isinstance(transcript, str):
        audio_format = float(parse_spoken_verdict(transcript, reward.labels) is not None)
    else:
        _log_once(
            logging.WARNING,
            "speech without speech_transcript: it loses audio_format, weight and all",
        )
    reference = quantity(row.get("reference_speech_tokens"))
    length = tokens
    if not reference or length is None:
        reference, length = quantity(row.get("reference_seconds")), seconds
    if not reference or length is None:
        _log_once(
            logging.WARNING,
            "speech without a length and its reference in one unit (speech_tokens with "
            "reference_speech_tokens, or speech_seconds with reference_seconds): it loses "
            "audio_length, weight and all",
        )
        return audio_format, 0.0
    return audio_format, min(1.0, length / reference)


def _plugin_value(plugin: Plugin, response: str, row: dict[str, Any]) -> tuple[float, str]:
    """The plug-in's value and "", or 0.0 and why (and one log entry) if it fails or leaves [0, 1]."""
    try:
        value = float(plugin.fn(response, row))
    except Exception as error:
        _log_once(
            logging.ERROR,
            "component %r raised: it counts 0 and reward_error 1 wherever it does",
            plugin.name,
            about=plugin.name,
            exc_info=True,
        )
        return 0.0, f"component {plugin.name!r} raised {type(error).__name__}: {error}"
    if not 0.0 <= value <= 1.0:
        _log_once(
            logging.ERROR,
            "component %r returned %r, outside [0, 1]: it counts 0 and reward_error 1 wherever "
            "it does",
            plugin.name,
            value,
            about=plugin.name,
        )
        return 0.0, f"component {plugin.name!r} returned {value!r}, outside [0, 1]"
    return value, ""


def quantity(value: Any) -> float | None:
    """A count or duration as a float, or None where it is missing, negative or not finite."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0.0 <= number < math.inf else None


_logged: set[tuple[str, str]] = set()


def _log_once(
    level: int, message: str, *args: object, about: str = "", exc_info: bool = False
) -> None:
    """Log a message once per process (and per `about`), never per response."""
    if (message, about) not in _logged:
        _logged.add((message, about))
        logger.log(level, message + " (said once per process)", *args, exc_info=exc_info)


_last: tuple[dict[str, Any], Reward] | None = None


def _resolve_cached(kwargs: dict[str, Any]) -> Reward:
    """`resolve`, at the cost of a comparison when the settings are those of the last response."""
    global _last
    if _last is None or kwargs != _last[0]:
        _last = (copy.deepcopy(kwargs), resolve(**kwargs))
    return _last[1]
