"""Spoken answers in stages, each continued by row where it was interrupted.

    text         vLLM, as the text evaluation asks it              text.jsonl
    codes        one forward pass of the thinker a row, then the talker, many rows at once
                                                                   codes/<row>.json
    sound        the vocoder in windows                            speech/<row>_<id>.wav, 24 kHz
    transcript   the recogniser, and the row's line                predictions.jsonl

Talker, vocoder and recogniser are those of `soundmind.speech`, shared with training. The talker
samples, as published (a greedy one drones), every row from a seed of its own. The wav file is what
is transcribed, not the tensor before it.

`--speech-engine reference` makes text and codes with transformers' own `generate`, one row at a
time: the oracle of the batched engine, which equals it in float32 with a greedy talker.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from soundmind.data.audio import MAX_CLIP_SECONDS, SAMPLE_RATE, load_waveform
from soundmind.evaluation.examples import Example
from soundmind.evaluation.grade import prediction
from soundmind.evaluation.models import Model, render
from soundmind.evaluation.store import Store, StoreError, read_predictions
from soundmind.evaluation.text import (
    Answer,
    TextDone,
    TextEngine,
    TextSettings,
    load_checked_clip,
    row_seed,
)
from soundmind.evaluation.transcripts import save_recogniser
from soundmind.model.folder import ModelError
from soundmind.model.processor import load_processor
from soundmind.model.tokens import response_banned_token_ids, response_end_token_ids
from soundmind.speech.decoding import CODES_PER_SECOND, Codes, SpeechSettings
from soundmind.speech.recogniser import Recogniser, open_recogniser
from soundmind.speech.states import TalkerInputs, mark_embeddings, thinker_states
from soundmind.speech.talker import Talker, Unspeakable
from soundmind.speech.vocoder import SPEECH_RATE, Vocoder
from soundmind.speech.weights import load_part, load_voice
from soundmind.system.files import replacing, write_atomically
from soundmind.task.labels import parse_spoken_verdict

TEXT, CODES, SOUND = "text.jsonl", "codes", "speech"
ROUNDS = 4  # times the rows at once that go through the talker between two savings
TRANSCRIBED = 16  # rows transcribed and saved together


class SpokenEvaluation:
    """The stages of one evaluation."""

    def __init__(
        self,
        store: Store,
        examples: Sequence[Example],
        model: Model,
        settings: TextSettings,
        *,
        engine: str,
        recogniser: str,
        voice: str,
        speech: SpeechSettings,
        rows: int | None,
    ) -> None:
        self._store, self._examples, self._model = store, examples, model
        self._settings, self._speech, self._rows = settings, speech, rows
        self._engine, self._voice_name = engine, voice
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # First what can be wrong: it should not cost hours of text.
        self._voice = load_voice(model.folder, voice)
        self._recogniser: Recogniser = open_recogniser(recogniser, "cpu")
        save_recogniser(store.path, self._recogniser.describe())
        positions = speech.max_codes
        if positions >= 32_768:
            raise ModelError(
                f"--max-speech-seconds {speech.max_seconds:g} is {positions} codec tokens, more than "
                "the talker's 32,768 positions; 600 leaves room for the longest prompt"
            )

    def run(self, stage: Callable[[str, int, int], Any]) -> int:
        """All stages; returns how many rows got their line. `stage` opens a progress display."""
        total = len(self._examples)
        kept = self._store.resume(TRANSCRIBED, total)
        if kept == total:
            return 0
        for folder in (CODES, SOUND):
            (self._store.path / folder).mkdir(exist_ok=True)
        if self._engine == "reference":
            self._reference(stage)
        else:
            self._text(stage)
        answers = [Answer(**line) for line in read_predictions(self._store.path, TEXT)]
        if self._engine != "reference":
            self._codes(answers, stage)
        problems = self._sound(answers, stage)
        self._transcripts(answers, problems, kept, stage)
        return total - kept

    # --- text and codes -------------------------------------------------------------------------

    def _text(self, stage: Any) -> None:
        batch, total = self._settings.batch_rows, len(self._examples)
        kept = self._store.resume(batch, total, TEXT)
        if kept == total:
            return
        engine = TextEngine(self._model, self._examples, self._settings)
        with stage("text", total, kept) as bar:
            for first in range(kept, total, batch):
                rows = self._examples[first : first + batch]
                answers = engine.answer(rows, engine.prepare(rows), bar.advance)
                self._store.append([asdict(samples[0]) for samples in answers], TEXT)
                bar.saved(first + len(rows))
        raise TextDone

    def _codes(self, answers: Sequence[Answer], stage: Any) -> None:
        waiting = [
            (example, answer)
            for example, answer in zip(self._examples, answers, strict=True)
            if answer.error is None and not self._codes_file(example).is_file()
        ]
        if not waiting:
            return
        thinker = Thinker(self._model, self._settings, self._device)
        talker = Talker(self._model.folder, self._device, getattr(torch, self._settings.dtype))
        longest = max(answer.prompt_tokens for answer in answers) + self._speech.max_codes
        at_once = self._rows or talker.rows_that_fit(longest)
        marks = mark_embeddings(thinker.model, self._voice.start_token, talker.mark_ids)
        with stage("codes", len(self._examples), len(self._examples) - len(waiting)) as bar:
            for first in range(0, len(waiting), ROUNDS * at_once):
                chunk = waiting[first : first + ROUNDS * at_once]
                inputs: list[TalkerInputs | None] = []
                spoken: list[Example] = []
                for example, answer in chunk:
                    try:
                        states = thinker.states(example, answer.token_ids)
                        inputs.append(talker.inputs(states, answer.prompt_tokens, marks))
                        spoken.append(example)
                    except Unspeakable as error:
                        self._save_codes(example, None, str(error))
                seeds = [row_seed(self._settings.seed, example.index) for example in spoken]
                codes = talker.speak(inputs, seeds, self._speech, at_once)
                for example, found in zip(spoken, codes, strict=True):
                    self._save_codes(example, found)
                bar.advance(len(chunk))
                bar.saved(len(self._examples) - len(waiting) + first + len(chunk))

    def _reference(self, stage: Any) -> None:
        total = len(self._examples)
        kept = self._store.resume(1, total, TEXT)
        if kept == total:
            return
        speaker = ReferenceSpeaker(self._model, self._settings, self._voice_name, self._speech)
        with stage("text and codes", total, kept) as bar:
            for example in self._examples[kept:]:
                answer, codes, problem = speaker.speak(example)
                if answer.error is None:
                    self._save_codes(example, codes, problem)
                self._store.append([asdict(answer)], TEXT)
                bar.advance(1)
                bar.saved(example.index + 1)

    def _codes_file(self, example: Example) -> Path:
        return self._store.path / CODES / f"{example.index:05d}.json"

    def _save_codes(
        self, example: Example, codes: Codes | None, problem: str | None = None
    ) -> None:
        found = {} if codes is None else asdict(codes)
        text = json.dumps({**found, "problem": problem}, separators=(",", ":"))
        with saving(self._codes_file(example)):
            write_atomically(self._codes_file(example), text.encode())

    def _read_codes(self, example: Example) -> tuple[Codes | None, str | None]:
        record = json.loads(self._codes_file(example).read_text(encoding="utf-8"))
        problem = record.pop("problem")
        record["tokens"] = tuple(record.get("tokens", ()))
        return (None if "ended" not in record else Codes(**record)), problem

    # --- sound and transcripts ------------------------------------------------------------------

    def _sound(self, answers: Sequence[Answer], stage: Any) -> dict[int, str]:
        """Vocode every row without a file; returns what kept a row from sounding."""
        problems: dict[int, str] = {}
        vocoder = None
        total = len(self._examples)
        with stage("sound", total, 0) as bar:
            for example, answer in zip(self._examples, answers, strict=True):
                path = self._sound_file(example)
                if answer.error is None and not path.is_file():
                    codes, problem = self._read_codes(example)
                    if codes is not None and codes.tokens:
                        if vocoder is None:
                            vocoder = Vocoder(self._model.folder, self._voice_name, self._device)
                        try:
                            seed = row_seed(self._settings.seed, example.index)
                            write_speech(path, vocoder.sound(codes.tokens, seed))
                        except (RuntimeError, ValueError) as error:
                            problem = f"no speech: {type(error).__name__}: {error}"
                    elif problem is None:
                        problem = "no speech: the talker gave no codec token"
                    if problem is not None:
                        problems[example.index] = problem
                bar.advance(1)
            bar.saved(total)
        return problems

    def _sound_file(self, example: Example) -> Path:
        name = re.sub(r"[^\w.-]", "_", str(example.info["id"]))
        return self._store.path / SOUND / f"{example.index:05d}_{name}.wav"

    def _transcripts(
        self, answers: Sequence[Answer], problems: dict[int, str], kept: int, stage: Any
    ) -> None:
        self._recogniser.to(self._device)
        total = len(self._examples)
        with stage("transcripts", total, kept) as bar:
            for first in range(kept, total, TRANSCRIBED):
                rows = range(first, min(first + TRANSCRIBED, total))
                self._store.append(self._lines(rows, answers, problems))
                bar.advance(len(rows))
                bar.saved(rows.stop)

    def _lines(
        self, rows: range, answers: Sequence[Answer], problems: dict[int, str]
    ) -> list[dict[str, Any]]:
        files = {row: self._sound_file(self._examples[row]) for row in rows}
        sounding = [row for row in rows if answers[row].error is None and files[row].is_file()]
        clips = [load_waveform(files[row], check_sound=False) for row in sounding]
        heard: dict[int, Any] = {}
        failed: dict[int, str] = {}
        try:
            heard = dict(zip(sounding, self._recogniser.transcribe(clips), strict=True))
        except RuntimeError:  # of which row, each by itself will tell
            for row, clip in zip(sounding, clips, strict=True):
                try:
                    heard[row] = self._recogniser.transcribe([clip])[0]
                except RuntimeError as error:
                    failed[row] = f"speech was not transcribed: {error}"
        lines = []
        for row in rows:
            example, answer = self._examples[row], answers[row]
            speech: dict[str, Any] = dict.fromkeys(
                ("speech_audio", "speech_transcript", "speech_seconds", "speech_tokens")
            )
            speech |= {"speech_truncated": False, "transcript_verdict": None}
            if answer.error is None:
                codes, problem = self._read_codes(example)
                if codes is not None:
                    speech |= {
                        "speech_tokens": len(codes.tokens),
                        "speech_seconds": len(codes.tokens) / CODES_PER_SECOND,
                        "speech_truncated": not codes.ended,
                        "speech_short_of_positions": codes.short_of_positions,
                    }
                answer = replace(answer, error=failed.get(row) or problems.get(row) or problem)
            if files[row].is_file():
                speech["speech_audio"] = os.path.relpath(files[row], self._store.path)
            if row in heard:
                speech |= {
                    "speech_transcript": heard[row].text,
                    "transcript_verdict": parse_spoken_verdict(heard[row].text),
                    "speech_windows": heard[row].windows,
                    "speech_windows_looped": heard[row].looped,
                }
            lines.append(prediction(example, answer, 0, self._store.path, **speech))
        return lines


class Prompts:
    """Rows as the processor's tensors, on a device."""

    def __init__(self, model: Model, settings: TextSettings, device: str) -> None:
        self._model, self._device = model, device
        self._dtype = getattr(torch, settings.dtype)
        self.processor = load_processor(str(model.folder))

    def encode(self, example: Example) -> dict[str, torch.Tensor]:
        """`input_ids` (1, tokens), attention mask, and features of the row's clip if it has one."""
        clip = load_checked_clip(example, MAX_CLIP_SECONDS)
        encoded = self.processor(
            text=[render(self._model, self.processor, example.messages)],
            audio=None if clip is None else [clip],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )
        return {
            name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)
            for name, tensor in encoded.items()
        }


class Thinker:
    """The thinker of a complete folder, for its states."""

    def __init__(self, model: Model, settings: TextSettings, device: str) -> None:
        from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration
        from transformers.initialization import no_init_weights

        self._prompts = Prompts(model, settings, device)
        self._device = device
        config = AutoConfig.from_pretrained(model.folder).thinker_config
        with no_init_weights():
            self.model: Any = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
                config, dtype=getattr(torch, settings.dtype)
            )
        load_part(self.model, model.folder, "thinker.")
        self.model.eval().requires_grad_(False).to(device)

    def states(self, example: Example, response: Sequence[int]) -> torch.Tensor:
        """States (prompt + response - 1, H) of a row that was answered with `response`."""
        inputs = self._prompts.encode(example)
        prompt = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)
        said = torch.tensor([list(response[:-1])], dtype=torch.long, device=self._device)
        return thinker_states(self.model, torch.cat([prompt, said], 1), **inputs)


class ReferenceSpeaker:
    """transformers' complete model, one row at a time; its vocoder only keeps the codes."""

    def __init__(
        self, model: Model, settings: TextSettings, voice: str, speech: SpeechSettings
    ) -> None:
        from transformers import Qwen2_5OmniForConditionalGeneration

        self._settings, self._voice, self._speech = settings, voice, speech
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._prompts = Prompts(model, settings, device)
        self._omni: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(
            model.folder, dtype=getattr(torch, settings.dtype)
        )
        self._omni.eval().to(device)
        self._omni.token2wav = _KeptCodes()
        self._limit = speech.max_codes
        tokenizer = self._prompts.processor.tokenizer
        self._banned = response_banned_token_ids(tokenizer, model.folder)
        self._ends = sorted(response_end_token_ids(tokenizer, model.folder))

    def speak(self, example: Example) -> tuple[Answer, Codes | None, str | None]:
        """Answer and codes of a row, or what kept it from being spoken."""
        started = time.monotonic()
        try:
            inputs = self._prompts.encode(example)
        except (ValueError, OSError) as error:
            return Answer.failed(str(error)), None, None
        torch.manual_seed(row_seed(self._settings.seed, example.index))
        codes, problem = None, None
        try:
            ids, _ = self._omni.generate(**inputs, **self._options("audio"))
            kept = self._omni.token2wav.codes
            codes = Codes(tuple(kept), len(kept) < self._limit - 1)
        except (RuntimeError, ValueError, IndexError) as error:
            # The text is worth having without the sound; greedy, it is the same text.
            ids = self._omni.generate(**inputs, **self._options("text"))
            problem = f"no speech: {type(error).__name__}: {error}"
        tokenizer = self._prompts.processor.tokenizer
        prompt = inputs["input_ids"].shape[1]
        response = ids[0, prompt:].tolist()
        ended = bool(response) and response[-1] in self._ends
        answer = Answer(
            text=tokenizer.decode(response, skip_special_tokens=True),
            num_tokens=len(response),
            finish_reason="stop" if ended else "length",
            prompt_tokens=prompt,
            seconds=time.monotonic() - started,
            token_ids=tuple(response),
        )
        return answer, codes, problem

    def _options(self, mode: str) -> dict[str, Any]:
        settings, speech = self._settings, self._speech
        tokenizer = self._prompts.processor.tokenizer
        options: dict[str, Any] = {
            "generation_mode": mode,
            "speaker": self._voice,
            "use_audio_in_video": False,
            "thinker_max_new_tokens": settings.max_tokens,
            "thinker_do_sample": settings.temperature > 0,
            "thinker_suppress_tokens": self._banned,
            "thinker_eos_token_id": self._ends,
            "thinker_pad_token_id": tokenizer.pad_token_id,
            "thinker_repetition_penalty": 1.0,
        }
        if settings.temperature > 0:
            options |= {
                "thinker_temperature": settings.temperature,
                "thinker_top_p": settings.top_p,
                "thinker_top_k": 0,
            }
        options["talker_max_new_tokens"] = self._limit
        options["talker_do_sample"] = speech.temperature > 0
        if speech.temperature > 0:
            options["talker_temperature"] = speech.temperature
        return options


class _KeptCodes(torch.nn.Module):
    dtype = torch.float32  # asked for by the model's `generate`

    def forward(self, codes: torch.Tensor, **_: Any) -> torch.Tensor:
        """`codes` (1, num_codes) int64."""
        self.codes: list[int] = codes[0].tolist()
        return torch.zeros(1)


def write_speech(path: Path, waveform: npt.NDArray[np.float32]) -> None:
    """Write an answer's sound as 16-bit wav, whole or not at all."""
    with saving(path), replacing(path) as temporary:
        soundfile.write(temporary, waveform, SPEECH_RATE, subtype="PCM_16", format="WAV")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """StoreError for a file that could not be written."""
    try:
        yield
    except (OSError, soundfile.LibsndfileError) as error:
        raise StoreError(
            f"{path}: {error}. What was finished before is valid; make room and run the same "
            "command again to continue"
        ) from error
