"""From an answer to a graded line, and from graded lines to metrics.json.

A line of `predictions.jsonl` holds what was answered, what is true, what the row measures and what
the answer earns. It has the keys that `python -m soundmind.rewards FILE` reads, so saved answers
can be scored again under any preset. Grading is training's own `compute_score`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundmind.data.audio import SAMPLE_RATE
from soundmind.data.clips import load_clip
from soundmind.evaluation import metrics
from soundmind.evaluation.examples import Example
from soundmind.evaluation.text import Answer
from soundmind.evaluation.transcripts import saved_normaliser
from soundmind.system.files import replacing
from soundmind.task.labels import label_of
from soundmind.task.lenient import read_leniently
from soundmind.task.reward import ROW_KEYS, compute_score
from soundmind.task.reward_settings import COMPONENTS
from soundmind.task.schema import DATA_SOURCES


def prediction(
    example: Example, answer: Answer, sample: int, output: Path, **speech: Any
) -> dict[str, Any]:
    """One line of predictions.jsonl: the answer beside the row's facts, graded.

    `speech` holds what a spoken answer adds (ROW_KEYS of the reward, file, verdict heard).
    """
    info = example.info
    references = {key: info[key] for key in ROW_KEYS if info.get(key) is not None}
    line = {
        "index": example.index,
        "id": info["id"],
        "split": info["split"],
        "mode": info["mode"],
        "data_source": example.data_source,
        "sample": sample,
        "label": label_of(example.ground_truth),
        "ground_truth": example.ground_truth,
        "prompt_tokens": answer.prompt_tokens,
        "response": answer.text,
        "response_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        **references,
        **speech,
    }
    line |= graded(line)
    line |= {
        "seconds": round(answer.seconds, 4),
        "error": answer.error,
        "question": example.question,
        "question_seconds": info["question_seconds"],
        "question_audio": question_audio(example, output),
        "teacher_verdict": info.get("teacher_verdict"),
    }
    return line


def graded(line: dict[str, Any]) -> dict[str, Any]:
    """Verdict, score and components of one line, by the reward of training."""
    result = compute_score(
        line["data_source"], line["response"], line["ground_truth"], line, preset="paper"
    )
    transcript = line.get("speech_transcript")
    heard = {} if transcript is None else {"transcript_verdict_lenient": read_leniently(transcript)}
    return {
        "verdict": result["pred"] or None,
        "lenient_verdict": read_leniently(line["response"]),
        **heard,
        "score": result["score"],
        "components": {name: result[name] for name in COMPONENTS},
    }


def question_audio(example: Example, output: Path) -> str | None:
    """The clip's file relative to the output folder; an embedded clip is written to `audio/`."""
    if example.clip is None:
        return None
    if path := example.clip_file():
        return os.path.relpath(path, output)
    import soundfile

    target = output / "audio" / f"{example.index:05d}.flac"
    if not target.is_file():
        try:
            waveform = load_clip(example.clip)
        except ValueError:
            return None  # the row's error says why
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as temporary:
            soundfile.write(temporary, waveform, SAMPLE_RATE, format="FLAC")
    return os.path.relpath(target, output)


# Accuracy and WER of the published tables 4 to 6, in percent; base is Qwen2.5-Omni-7B. [paper]
# No table has text to text.
PAPER_ROWS, PAPER_ENTAILED = 656, 296
PAPER_IDS = {f"{number:04d}" for number in range(1, PAPER_ROWS + 1)}  # names of the clip folders
PAPER: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("audio", "text"): [
        {"model": "Qwen2.5-Omni-7B", "accuracy": 77.59, "correct": 509},
        {"model": "SoundMind-RL", "accuracy": 81.40, "correct": 534},
    ],
    ("text", "speech"): [
        {"model": "Qwen2.5-Omni-7B", "accuracy": 80.79, "correct": 530, "wer": 2.18},
        {"model": "SoundMind-RL", "accuracy": 83.84, "correct": 550, "wer": 6.99},
    ],
    ("audio", "speech"): [
        {"model": "Qwen2.5-Omni-7B", "accuracy": 77.59, "correct": 509, "wer": 2.23},
        {"model": "SoundMind-RL", "accuracy": 81.40, "correct": 534, "wer": 8.95},
    ],
}


def paper_figures(
    config: dict[str, Any], predictions: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The published figures for this configuration; none but beside the rows of the ALR test split.

    Those are known by their ids and their labels. A stand-in gets none either: its numbers are no
    results and have nothing to stand beside.
    """
    labels = {line["id"]: line["label"] for line in predictions}
    published = (
        {(line["data_source"], line["split"]) for line in predictions}
        == {(DATA_SOURCES["alr"], "test")}
        and labels.keys() == PAPER_IDS
        and sum(labels.values()) == PAPER_ENTAILED
        and config["model"]["stand_in"] is None
    )
    key = (config["data"]["mode"], config["output_modality"])
    return [{**row, "n": PAPER_ROWS} for row in PAPER.get(key, [])] if published else []


def summarise_answers(
    predictions: Sequence[dict[str, Any]], config: dict[str, Any], output: Path
) -> dict[str, Any]:
    """The content of metrics.json."""
    summary: dict[str, Any] = {
        "stand_in": config["model"]["stand_in"],
        "model": config["model"]["given"],
        "data_source": config["data"]["data_source"],
        "split": config["data"]["split"],
        "configuration": f"{config['data']['mode']} to {config['output_modality']}",
        "settings": config["generation"],
        **metrics.summarise(predictions),
        "paper": paper_figures(config, predictions),
    }
    if config["output_modality"] == "speech":
        normalise, definition = saved_normaliser(output)
        summary["speech"] = {**metrics.summarise_speech(predictions, normalise), **definition}
    return summary
