"""Supervised warm-up of the stand-in: first to hear, then into bad habits that RL has to mend.

`python -m soundmind.tiny` runs it. Two stages, both on the practice train split:

    hearing   clean targets that write down the four nouns, compare them in pairs, and conclude
              <think>wug, wug, same, dax, fep, different</think>
              Answer: not-entailed
    habits    the same with three faults mixed in: half of the targets skip the comparisons,
              a fifth breaks the format, and many not-entailed rows are called `entailed` in
              spite of what the thinking part says: 75 % of those that fail the first comparison,
              35 % of those that fail the second

The second stage plays the imperfect teacher every data set has. What is learned from sound is
learned here, with supervision; GRPO then repairs format, length and verdict from reward alone. It
brings the verdict back to about what the ears allow (the accuracy after `hearing`), and whoever
shows its curve has to say so.

Measured after each stage, on all test clips (half of them in voices never trained on)

    accuracy    share of responses whose verdict is the label
    format      share that is well formed (soundmind.task.labels.split_response)
    words       mean words inside the think tags
    heard       share whose thinking part names the four nouns of the clip correctly
    swapped     accuracy when every clip is exchanged by `controls.swapped_partners`; near 50 %
                unless something other than the sound gives the answer. With one constant prompt
                text these are the same responses, scored against other rows.

A stand-in that did not learn to hear is of no use to RL: under 80 % after `hearing` the warm-up
stops with an error instead of writing a checkpoint.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from soundmind.data.audio import load_waveform, num_audio_tokens
from soundmind.model.features import extract_at_true_length
from soundmind.standin.controls import swapped_partners
from soundmind.standin.practice import read_manifest
from soundmind.standin.syllogism import Syllogism, parse_syllogism
from soundmind.system.errors import UserError
from soundmind.task.labels import ENTAILED, answer_line, split_response, verdict_of
from soundmind.task.prompts import build_messages

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2TokenizerFast


WARMUP_VERSION = 1  # to be raised with every change of the procedure that its settings do not show
MAX_RESPONSE_TOKENS = 32  # a clean target has 25
GATE = 0.80  # greedy accuracy that `hearing` has to reach


class WarmupError(UserError, RuntimeError):
    """The warm-up cannot start, or did not teach the model to hear."""


@dataclass(frozen=True)
class Faults:
    """Shares of targets with each fault; see the module docstring."""

    shortcut: float = 0.0
    malformed: float = 0.0
    # `entailed` said of rows whose first, or second, comparison fails. With one rate near a half
    # for both, greedy decoding says `entailed` to all of them or to hardly any, as the seed has it;
    # two rates put the start in between.
    first_overlooked: float = 0.0
    second_overlooked: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage: AdamW, linear warm-up, then cosine decay to a twentieth of the peak rate."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int
    batch_size: int = 16
    faults: Faults = field(default_factory=Faults)


HEARING = Stage("hearing", steps=640, learning_rate=2e-3, warmup_steps=30)

HABITS = Stage(
    "habits",
    steps=100,
    learning_rate=5e-4,
    warmup_steps=10,
    faults=Faults(shortcut=0.5, malformed=0.2, first_overlooked=0.75, second_overlooked=0.35),
)

STAGES = (HEARING, HABITS)


@dataclass(frozen=True)
class Clip:
    """One row ready for training: log-mel features (128, mel_frames) float32, and its words."""

    syllogism: Syllogism
    features: npt.NDArray[np.float32]
    num_tokens: int  # audio placeholders in the prompt


def identity(data: Path) -> dict[str, Any]:
    """What a warm-up depends on besides the seed; part of the checkpoint's identity."""
    manifest = read_manifest(data)
    try:
        digests = {split: manifest["splits"][split]["digest"] for split in ("train", "test")}
    except KeyError:
        raise WarmupError(
            f"no complete practice set in {data}. Build it with: "
            f"python -m soundmind.practice --output {data}"
        ) from None
    return {
        "version": WARMUP_VERSION,
        "data": digests,
        "stages": [asdict(stage) for stage in STAGES],
    }


# --- data -----------------------------------------------------------------------------------------


def load_clips(data: Path, split: str, limit: int | None = None) -> list[Clip]:
    """Read rows and clips of a split, with features as the processor computes them."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, return_attention_mask=True
    )
    stock_call = WhisperFeatureExtractor.__call__
    clips: list[Clip] = []
    with open(data / f"{split}.jsonl", encoding="utf-8") as lines:
        for line in lines:
            if len(clips) == limit:
                break
            row = json.loads(line)
            waveform = load_waveform(data / split / row["id"] / "question.wav")
            features = extract_at_true_length(stock_call, extractor, waveform)
            clips.append(
                Clip(
                    parse_syllogism(row["user_content"]), features, num_audio_tokens(waveform.size)
                )
            )
    return clips


class WarmupPrompt:
    """Token ids of the audio prompt, whose text is the same for every clip."""

    def __init__(self, tokenizer: Qwen2TokenizerFast) -> None:
        messages = build_messages("audio", "", "clip", task="practice")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = str(text).split("<|AUDIO|>")
        self.before: list[int] = tokenizer(before).input_ids
        self.after: list[int] = tokenizer(after).input_ids
        self.placeholder = int(tokenizer.convert_tokens_to_ids("<|AUDIO|>"))

    def ids(self, num_tokens: int) -> list[int]:
        """The prompt for a clip of `num_tokens` audio tokens; what the processor returns."""
        return [*self.before, *[self.placeholder] * num_tokens, *self.after]


def target_text(syllogism: Syllogism, faults: Faults, draw: random.Random) -> str:
    """What the model is taught to answer, with faults drawn at the given rates."""
    thinking = syllogism.heard if draw.random() < faults.shortcut else syllogism.reasoning
    verdict = verdict_of(syllogism.label)
    first_fails = syllogism.first != syllogism.minor
    overlooked = faults.first_overlooked if first_fails else faults.second_overlooked
    if syllogism.label == 0 and draw.random() < overlooked:
        verdict = ENTAILED
    if draw.random() >= faults.malformed:
        return f"<think>{thinking}</think>\n{answer_line(verdict)}"
    return draw.choice(
        (
            f"<think>{thinking}\n{answer_line(verdict)}",  # the block is never closed
            answer_line(verdict),  # no thinking at all
            f"<think>{thinking}</think>\n{verdict}",  # a verdict without its marker
        )
    )


def batches(clips: Sequence[Clip], size: int, draw: random.Random) -> Iterator[list[Clip]]:
    """Endless batches of clips of similar length, so that little is padded."""
    while True:
        order = list(range(len(clips)))
        draw.shuffle(order)
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size], key=lambda i: clips[i].num_tokens)
            chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
            draw.shuffle(chunks)
            for chunk in chunks:
                if len(chunk) == size:
                    yield [clips[i] for i in chunk]


def audio_inputs(clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
    """`input_features` (num_clips, 128, frames) float32 and `feature_attention_mask` int64."""
    import torch

    frames = [clip.features.shape[1] for clip in clips]
    features = torch.zeros(len(clips), clips[0].features.shape[0], max(frames))
    mask = torch.zeros(len(clips), max(frames), dtype=torch.long)
    for index, clip in enumerate(clips):
        features[index, :, : frames[index]] = torch.from_numpy(clip.features)
        mask[index, : frames[index]] = 1
    return {"input_features": features, "feature_attention_mask": mask}


# --- training -------------------------------------------------------------------------------------


def token_losses(
    thinker: Any,
    prompt: WarmupPrompt,
    clips: Sequence[Clip],
    responses: Sequence[list[int]],
    pad: int,
) -> torch.Tensor:
    """Cross-entropy of every response token, shape (num_response_tokens,)."""
    import torch
    import torch.nn.functional as functional

    sequences = [
        prompt.ids(clip.num_tokens) + response
        for clip, response in zip(clips, responses, strict=True)
    ]
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    is_response = torch.zeros_like(ids, dtype=torch.bool)
    for row, (sequence, response) in enumerate(zip(sequences, responses, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        is_response[row, len(sequence) - len(response) : len(sequence)] = True
    # Audio and text share one plain position, so the three rotary axes are equal.
    positions = torch.arange(longest).expand(3, len(sequences), longest)
    logits = thinker(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        **audio_inputs(clips),
    ).logits
    predicts = is_response[:, 1:]
    return functional.cross_entropy(
        logits[:, :-1][predicts], ids[:, 1:][predicts], reduction="none"
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Rate of update `step`, counted from 0."""
    ramp = min(1.0, (step + 1) / stage.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.learning_rate * ramp * (0.05 + 0.95 * cosine)


def train_stage(
    thinker: Any, tokenizer: Qwen2TokenizerFast, clips: Sequence[Clip], stage: Stage, seed: int
) -> list[float]:
    """Run one stage and return the loss (nats a response token) of each step."""
    import torch

    draw = random.Random(f"{seed}/{stage.name}")
    prompt = WarmupPrompt(tokenizer)
    end, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    weights = [
        parameter
        for name, parameter in thinker.named_parameters()
        if not name.startswith("visual.")  # never used, so weight decay is all it would see
    ]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    started = time.monotonic()
    thinker.train()
    for step, batch in enumerate(batches(clips, stage.batch_size, draw)):
        if step == stage.steps:
            break
        texts = [target_text(clip.syllogism, stage.faults, draw) for clip in batch]
        responses = [[*tokenizer(text).input_ids, end] for text in texts]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        loss = token_losses(thinker, prompt, batch, responses, pad).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 40 == 0 or step + 1 == stage.steps:
            recent = sum(losses[-40:]) / len(losses[-40:])
            print(
                f"{stage.name}: step {step + 1} of {stage.steps}, loss {recent:.3f}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    thinker.eval()
    return losses


# --- measuring ------------------------------------------------------------------------------------


def respond(
    thinker: Any,
    tokenizer: Qwen2TokenizerFast,
    clips: Sequence[Clip],
    *,
    temperature: float = 0.0,
    batch_size: int = 100,
) -> list[str]:
    """The model's answer to every clip, in order; greedy at temperature 0."""
    import torch

    prompt = WarmupPrompt(tokenizer)
    end, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    banned = [token for token in tokenizer.all_special_ids if token != end]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(clips)), key=lambda i: clips[i].num_tokens)
    answers = [""] * len(clips)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [clips[i] for i in chosen]
        prompts = [prompt.ids(clip.num_tokens) for clip in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        thinker.rope_deltas = None  # of the last batch; generate would go on from it
        with torch.no_grad():
            output = thinker.generate(
                input_ids=ids,
                attention_mask=mask,
                **audio_inputs(batch),
                **sampling,
                max_new_tokens=MAX_RESPONSE_TOKENS,
                eos_token_id=end,
                pad_token_id=pad,
                suppress_tokens=banned,
            )
        for index, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            length = row.index(end) if end in row else len(row)
            answers[index] = str(tokenizer.decode(row[:length]))
    return answers


def score(answers: Sequence[str], clips: Sequence[Clip]) -> dict[str, float]:
    """The measures of the module docstring, as shares and means over the clips."""
    responses = [split_response(answer) for answer in answers]
    labels = [clip.syllogism.label for clip in clips]
    given = [response.verdict for response in responses]
    swapped = swapped_partners(labels)

    def share(hits: Sequence[bool]) -> float:
        return round(sum(hits) / len(hits), 4)

    return {
        "clips": len(clips),
        "accuracy": share([v == verdict_of(y) for v, y in zip(given, labels, strict=True)]),
        "format": share([response.well_formed for response in responses]),
        "words": round(sum(len(r.thinking.split()) for r in responses) / len(responses), 2),
        "heard": share(
            [
                response.thinking in (clip.syllogism.reasoning, clip.syllogism.heard)
                for response, clip in zip(responses, clips, strict=True)
            ]
        ),
        "swapped": share(
            [given[other] == verdict_of(y) for other, y in zip(swapped, labels, strict=True)]
        ),
    }


def describe_warmup(measures: dict[str, float]) -> str:
    """One line for the terminal."""
    return (
        f"accuracy {100 * measures['accuracy']:.1f} %, format {100 * measures['format']:.1f} %, "
        f"{measures['words']:.1f} words, clips swapped {100 * measures['swapped']:.1f} % "
        f"({measures['clips']:.0f} held-out clips)"
    )


# --- all of it ------------------------------------------------------------------------------------


def warm_up(thinker: Any, tokenizer: Qwen2TokenizerFast, data: Path, seed: int) -> dict[str, Any]:
    """Warm `thinker` up in place; returns what `warmup.json` records about it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(thinker, tokenizer, data, seed)
    finally:
        torch.set_num_threads(threads)


def _run(thinker: Any, tokenizer: Qwen2TokenizerFast, data: Path, seed: int) -> dict[str, Any]:
    import torch

    started = time.monotonic()
    clips, held_out = load_clips(data, "train"), load_clips(data, "test")
    print(
        f"warm-up: features of {len(clips) + len(held_out)} clips, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    stages: list[dict[str, Any]] = []
    for stage in STAGES:
        stage_started = time.monotonic()
        losses = train_stage(thinker, tokenizer, clips, stage, seed)
        greedy = score(respond(thinker, tokenizer, held_out), held_out)
        print(f"{stage.name}: greedy {describe_warmup(greedy)}", flush=True)
        stages.append(
            {
                **asdict(stage),
                "losses": [round(loss, 4) for loss in losses],
                "greedy": greedy,
                "seconds": round(time.monotonic() - stage_started, 1),
            }
        )
        if stage is HEARING and greedy["accuracy"] < GATE:
            raise WarmupError(
                f"after {stage.steps} steps the stand-in hears only {100 * greedy['accuracy']:.1f} "
                f"% of {len(held_out)} held-out clips ({100 * GATE:.0f} % needed, 50 % is "
                f"chance). Learning to hear comes as a jump whose step varies with the seed. Try "
                f"another --seed, or raise HEARING.steps in soundmind/standin/warmup.py; if that does not "
                f"help, check the clips with: python -m soundmind.practice --output {data} --verify"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = score(respond(thinker, tokenizer, held_out, temperature=1.0), held_out)
    print(f"{STAGES[-1].name}: sampled {describe_warmup(sampled)}", flush=True)
    stages[-1]["sampled"] = sampled
    return {"stages": stages}
