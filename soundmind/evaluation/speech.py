"""Spoken answers: transformers' complete Qwen2.5-Omni speaks, Whisper listens.

    thinker (greedy text) -> talker (codec tokens, 50 a second) -> vocoder (24 kHz) -> wav
    wav -> 16 kHz -> windows -> Whisper -> transcript -> verdict, word errors

One row at a time: transformers does not batch generation with sound. The talker samples, as
published (a greedy talker drones), from a generator seeded per row, so that a run continued after a
kill says the same. The wav file is what is transcribed, not the tensor before it.

Two things differ from a plain `model.generate`:

* The vocoder works in windows of 30 s with a second of context on both sides. In one piece it
  refuses anything beyond 327 s (its 32,768 mel frames), and a published reasoning takes some 600.
  Answers up to one window are vocoded exactly as published. [ours]
* Banned ids are suppressed as in training.

Writes speech/<row>_<id>.wav (24 kHz, 16 bit) below the output folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from soundmind.data.audio import MAX_CLIP_SECONDS, SAMPLE_RATE, ClipError, Waveform, load_waveform
from soundmind.evaluation.examples import Example
from soundmind.evaluation.grade import prediction
from soundmind.evaluation.models import Model, render
from soundmind.evaluation.store import StoreError
from soundmind.evaluation.text import Answer, TextSettings, load_checked_clip, row_seed
from soundmind.evaluation.transcripts import join_transcripts, save_recogniser, windows
from soundmind.model.folder import ModelError, fetch_model, folder_digest
from soundmind.model.processor import load_processor
from soundmind.model.tokens import response_banned_token_ids
from soundmind.task.labels import parse_spoken_verdict

SPEECH_RATE = 24_000  # Hz, of the vocoder


CODES_PER_SECOND = 50  # two mel frames of 10 ms each


WINDOW_CODES = 30 * CODES_PER_SECOND


CONTEXT_CODES = CODES_PER_SECOND


MIN_WINDOW_CODES = 4 * CODES_PER_SECOND  # below, running out of memory is an error of the row


RECOGNISER_BATCH = 8  # windows transcribed at once


@dataclass(frozen=True)
class Spoken:
    """An answer with its sound; `waveform` is None where speaking failed (`answer.error`)."""

    answer: Answer
    waveform: npt.NDArray[np.float32] | None  # (num_samples,) at 24 kHz
    num_codes: int
    truncated: bool


class WindowedVocoder(torch.nn.Module):
    """The model's own vocoder, applied to windows of codec tokens."""

    def __init__(self, vocoder: torch.nn.Module, window: int = WINDOW_CODES) -> None:
        super().__init__()
        self.vocoder = vocoder
        self.window = window
        self.num_codes = 0  # of the last call

    @property
    def dtype(self) -> torch.dtype:
        """Asked for by the model's `generate`."""
        return next(self.vocoder.parameters()).dtype

    def forward(self, codes: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """`codes` (1, num_codes) int64 -> waveform (num_samples,) float32."""
        total = self.num_codes = codes.shape[1]
        if total == 0:
            raise ValueError("the talker gave no codec token")
        pieces = []
        for start in range(0, total, self.window):
            end = min(start + self.window, total)
            low, high = max(0, start - CONTEXT_CODES), min(total, end + CONTEXT_CODES)
            if total <= self.window + CONTEXT_CODES:
                low, end, high = 0, total, total
            sound = self.vocoder(codes[:, low:high], **conditions).reshape(-1)
            per_code = sound.numel() // (high - low)
            pieces.append(sound[(start - low) * per_code : (end - low) * per_code])
            if end == total:
                break
        return torch.cat(pieces)


class Speaker:
    """The complete model; `speak` answers one row in text and sound."""

    def __init__(
        self, model: Model, settings: TextSettings, voice: str, max_seconds: float
    ) -> None:
        from transformers import Qwen2_5OmniForConditionalGeneration

        self._model, self._settings, self._voice = model, settings, voice
        self._max_codes = int(max_seconds * CODES_PER_SECOND)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._processor = load_processor(str(model.folder))
        self._omni: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(
            model.folder, dtype=getattr(torch, settings.dtype)
        )
        self._omni.eval().to(self._device)
        voices = sorted(self._omni.speaker_map)
        if voice not in voices:
            raise ModelError(f"{model.folder}: no voice {voice!r} in spk_dict.pt; it has {voices}")
        self._omni.token2wav = WindowedVocoder(self._omni.token2wav.float())
        self._banned = response_banned_token_ids(self._processor.tokenizer)

    def speak(self, example: Example) -> Spoken:
        """Answer one row; a row that cannot be asked or spoken says so in `answer.error`."""
        started = time.monotonic()
        try:
            clip = load_checked_clip(example, MAX_CLIP_SECONDS)
        except (ValueError, OSError) as error:
            return Spoken(Answer.failed(str(error)), None, 0, False)
        inputs = self._inputs(example, clip)
        torch.manual_seed(row_seed(self._settings.seed, example.index))
        problem: str | None = None
        try:
            ids, sound = self._generate(inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            # The text is worth having without the sound; greedy, it is the same text.
            ids, sound = self._omni.generate(**inputs, **self._text_options("text")), None
            problem = f"no speech: {type(error).__name__}: {error}"
        answer = replace(
            self._answer(ids[0, inputs["input_ids"].shape[1] :].tolist(), inputs),
            seconds=time.monotonic() - started,
            error=problem,
        )
        codes = self._omni.token2wav.num_codes if sound is not None else 0
        return Spoken(answer, sound, codes, codes >= self._max_codes - 1)

    def _inputs(self, example: Example, clip: Waveform | None) -> dict[str, Any]:
        text = render(self._model, self._processor, example.messages)
        encoded = self._processor(
            text=[text],
            audio=None if clip is None else [clip],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )
        dtype = getattr(torch, self._settings.dtype)
        return {
            name: tensor.to(self._device, dtype if tensor.is_floating_point() else None)
            for name, tensor in encoded.items()
        }

    def _text_options(self, mode: str) -> dict[str, Any]:
        settings, tokenizer = self._settings, self._processor.tokenizer
        options: dict[str, Any] = {
            "generation_mode": mode,
            "speaker": self._voice,
            "use_audio_in_video": False,
            "thinker_max_new_tokens": settings.max_tokens,
            "thinker_do_sample": settings.temperature > 0,
            "thinker_suppress_tokens": self._banned,
            "thinker_eos_token_id": tokenizer.eos_token_id,
            "thinker_pad_token_id": tokenizer.pad_token_id,
            "thinker_repetition_penalty": 1.0,
        }
        if settings.temperature > 0:
            options |= {
                "thinker_temperature": settings.temperature,
                "thinker_top_p": settings.top_p,
                "thinker_top_k": 0,
            }
        return options

    def _generate(
        self, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, npt.NDArray[np.float32] | None]:
        """Token ids (1, length) and sound (num_samples,); halves the window on lack of memory."""
        vocoder = self._omni.token2wav
        generator_state = torch.get_rng_state()
        try:
            ids, sound = self._omni.generate(
                **inputs, **self._text_options("audio"), talker_max_new_tokens=self._max_codes
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if vocoder.window // 2 < MIN_WINDOW_CODES:
                raise
            vocoder.window //= 2
            print(
                f"out of memory; speaking in windows of {vocoder.window // CODES_PER_SECOND} s",
                flush=True,
            )
            torch.set_rng_state(generator_state)
            return self._generate(inputs)
        return ids, sound.reshape(-1).float().cpu().numpy()

    def _answer(self, ids: list[int], inputs: dict[str, Any]) -> Answer:
        tokenizer = self._processor.tokenizer
        ended = ids[-1:] == [tokenizer.eos_token_id]
        return Answer(
            text=tokenizer.decode(ids, skip_special_tokens=True),
            num_tokens=len(ids),
            finish_reason="stop" if ended else "length",
            prompt_tokens=int(inputs["input_ids"].shape[1]),
            seconds=0.0,
        )


class Recogniser:
    """A Whisper model of transformers; greedy, English, long clips in overlapping windows."""

    def __init__(self, name: str) -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        folder = fetch_model(name)
        self._name, self._digest = name, folder_digest(folder)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self._device == "cuda" else torch.float32
        try:
            self._processor: Any = WhisperProcessor.from_pretrained(folder)
            self._whisper: Any = WhisperForConditionalGeneration.from_pretrained(
                folder, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{name} is no Whisper model that transformers can load ({error}); name one with "
                "--recogniser, for instance openai/whisper-large-v3"
            ) from error
        self._whisper.eval().to(self._device)
        self._batch = RECOGNISER_BATCH

    def describe(self) -> dict[str, Any]:
        """Name, digest, and the tokenizer's table of spellings for the normaliser."""
        spellings = getattr(self._processor.tokenizer, "english_spelling_normalizer", None)
        return {"name": self._name, "digest": self._digest, "spellings": dict(spellings or {})}

    def transcribe(self, waveform: Waveform) -> str:
        """Transcript of (num_samples,) float32 at 16 kHz."""
        clips = [waveform[start:end] for start, end in windows(waveform.size, SAMPLE_RATE)]
        texts: list[str] = []
        while len(texts) < len(clips):
            batch = clips[len(texts) : len(texts) + self._batch]
            try:
                texts += self._transcribe_windows(batch)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if self._batch == 1:
                    raise
                self._batch //= 2
                print(f"out of memory; transcribing {self._batch} windows at once", flush=True)
        return join_transcripts(texts)

    @torch.no_grad()
    def _transcribe_windows(self, clips: Sequence[Waveform]) -> list[str]:
        features = self._processor.feature_extractor(
            list(clips),
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,
            return_tensors="pt",
        )
        options: dict[str, Any] = {}
        if getattr(self._whisper.generation_config, "is_multilingual", False):
            options = {"language": "en", "task": "transcribe"}
        ids = self._whisper.generate(
            features["input_features"].to(self._device, self._whisper.dtype),
            attention_mask=features["attention_mask"].to(self._device),
            do_sample=False,
            num_beams=1,
            **options,
        )
        texts: list[str] = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


class SpeechBackend:
    """Speaker and recogniser: rows to lines of predictions with their wav files."""

    def __init__(
        self,
        model: Model,
        settings: TextSettings,
        output: Path,
        *,
        recogniser: str,
        speaker: str,
        max_speech_seconds: float,
    ) -> None:
        self._output = output
        self._recogniser = Recogniser(recogniser)  # first: a wrong name should not cost minutes
        save_recogniser(output, self._recogniser.describe())
        self._speaker = Speaker(model, settings, speaker, max_speech_seconds)

    def predict(
        self, batch: Sequence[Example], on_done: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """One line per row; `on_done(1)` after each."""
        lines = []
        for example in batch:
            lines.append(self._predict_row(example))
            on_done(1)
        return lines

    def _predict_row(self, example: Example) -> dict[str, Any]:
        spoken = self._speaker.speak(example)
        speech: dict[str, Any] = {
            "speech_audio": None,
            "speech_transcript": None,
            "speech_seconds": None,
            "speech_tokens": None,
            "speech_truncated": spoken.truncated,
            "transcript_verdict": None,
        }
        answer = spoken.answer
        if spoken.waveform is not None:
            path = write_speech(self._output / "speech", example, spoken.waveform)
            try:
                transcript = self._recogniser.transcribe(load_waveform(path, check_sound=False))
            except (ClipError, RuntimeError) as error:
                answer = replace(answer, error=f"speech was not transcribed: {error}")
            else:
                speech["speech_transcript"] = transcript
                speech["transcript_verdict"] = parse_spoken_verdict(transcript)
            speech["speech_audio"] = os.path.relpath(path, self._output)
            speech["speech_seconds"] = spoken.waveform.size / SPEECH_RATE
            speech["speech_tokens"] = spoken.num_codes
        return prediction(example, answer, 0, self._output, **speech)


def write_speech(folder: Path, example: Example, waveform: npt.NDArray[np.float32]) -> Path:
    """Write an answer's sound as 16-bit wav under a name that holds row and id."""
    name = re.sub(r"[^\w.-]", "_", str(example.info["id"]))
    path = folder / f"{example.index:05d}_{name}.wav"
    temporary = path.with_name(path.name + ".tmp")
    try:
        folder.mkdir(exist_ok=True)
        soundfile.write(temporary, waveform, SPEECH_RATE, subtype="PCM_16", format="WAV")
        os.replace(temporary, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise StoreError(
            f"{path}: {error}. What was finished before is valid; make room and run the same "
            "command again to continue"
        ) from error
    return path
