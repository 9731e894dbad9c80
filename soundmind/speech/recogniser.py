"""Recognisers: sound to words.

    open_recogniser("openai/whisper-large-v3")   a Whisper model of transformers, folder or Hub id
    open_recogniser("checkpoints/tiny/listener") a folder with `grammar.json`: pocketsphinx, which
                                                 hears the sentences of that grammar and no others

Whisper is asked greedily, in English, in overlapping windows; the windows of all clips stand in one
queue. A window in which it runs to the limit of its length is a loop, not speech; it is counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from soundmind.data.audio import SAMPLE_RATE, Waveform
from soundmind.model.folder import ModelError, fetch_model
from soundmind.speech.windows import join_transcripts, windows
from soundmind.system.digests import folder_digest

WINDOWS_AT_ONCE = 8
GRAMMAR_FILE = "grammar.json"
# Fast speech has some six words a second, and a word some one and a half tokens.
TOKENS_PER_SECOND, TOKENS_BESIDE = 10, 20
HISS = 0.003  # of full scale; in digital silence pocketsphinx drops the last word
HISS_SECONDS = 1.0  # of that noise behind a clip


@dataclass(frozen=True)
class Transcript:
    """What was heard of one clip, in how many windows, and how many of them were loops."""

    text: str
    windows: int
    looped: int = 0


class Recogniser(Protocol):
    """Anything that listens."""

    def describe(self) -> dict[str, Any]:
        """Name, digest, and the table of spellings for the normaliser."""

    def transcribe(self, waveforms: Sequence[Waveform]) -> list[Transcript]:
        """Transcripts of clips, each (num_samples,) float32 at 16 kHz, in order."""

    def to(self, device: Any) -> None:
        """Move the weights, between host and card."""


def open_recogniser(name: str, device: Any = "cpu") -> Recogniser:
    """The recogniser `name`, a folder or a Hub id; ModelError where it cannot be loaded."""
    folder = fetch_model(name)
    if (folder / GRAMMAR_FILE).is_file():
        return GrammarRecogniser(name, folder)
    return Whisper(name, folder, device)


class Whisper:
    """A Whisper model of transformers; half precision on a GPU."""

    def __init__(self, name: str, folder: Path, device: Any = "cpu") -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self._name, self._digest = name, folder_digest(folder)
        self._device = torch.device(device)
        dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        try:
            self._processor: Any = WhisperProcessor.from_pretrained(folder)
            self._whisper: Any = WhisperForConditionalGeneration.from_pretrained(
                folder, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{name} is no Whisper model that transformers can load ({error}); name one, "
                "for instance openai/whisper-large-v3"
            ) from error
        self._whisper.eval().to(self._device)
        self._batch = WINDOWS_AT_ONCE

    def describe(self) -> dict[str, Any]:
        spellings = getattr(self._processor.tokenizer, "english_spelling_normalizer", None)
        return {"name": self._name, "digest": self._digest, "spellings": dict(spellings or {})}

    def to(self, device: Any) -> None:
        self._device = torch.device(device)
        self._whisper.to(self._device)

    def transcribe(self, waveforms: Sequence[Waveform]) -> list[Transcript]:
        ranges = [windows(waveform.size, SAMPLE_RATE) for waveform in waveforms]
        clips = [
            waveform[start:end]
            for waveform, own in zip(waveforms, ranges, strict=True)
            for start, end in own
        ]
        heard: list[tuple[str, bool]] = []
        while len(heard) < len(clips):
            batch = clips[len(heard) : len(heard) + self._batch]
            try:
                heard += self._transcribe_windows(batch)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if self._batch == 1:
                    raise
                self._batch //= 2
                print(f"out of memory; transcribing {self._batch} windows at once", flush=True)
        rest = iter(heard)
        transcripts = []
        for own in ranges:
            texts, looped = zip(*(next(rest) for _ in own), strict=True)
            transcripts.append(Transcript(join_transcripts(texts), len(own), sum(looped)))
        return transcripts

    @torch.no_grad()
    def _transcribe_windows(self, clips: Sequence[Waveform]) -> list[tuple[str, bool]]:
        """Text of every window, and whether it ran to its limit."""
        features = self._processor.feature_extractor(
            list(clips),
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,
            return_tensors="pt",
        )
        options: dict[str, Any] = {}
        if getattr(self._whisper.generation_config, "is_multilingual", False):
            options = {"language": "en", "task": "transcribe"}
        limits = [
            int(TOKENS_PER_SECOND * clip.size / SAMPLE_RATE) + TOKENS_BESIDE for clip in clips
        ]
        room = self._whisper.config.max_target_positions - TOKENS_BESIDE
        ids = self._whisper.generate(
            features["input_features"].to(self._device, self._whisper.dtype),
            attention_mask=features["attention_mask"].to(self._device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(max(limits), room),
            **options,
        )
        special = set(self._processor.tokenizer.all_special_ids)
        said = [[token for token in row if token not in special] for row in ids.tolist()]
        texts: list[str] = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [
            # Some marks stand among the tokens of the limit.
            (text.strip(), len(tokens) >= min(limit, room) - 4)
            for text, tokens, limit in zip(texts, said, limits, strict=True)
        ]


class GrammarRecogniser:
    """pocketsphinx with a grammar; its acoustic model is in the package, nothing is downloaded.

    `grammar.json` holds `grammar` (JSGF), `phonemes` (word to phonemes, for words that the
    package's dictionary lacks) and `beam`, the beam's width as a likelihood.
    """

    def __init__(self, name: str, folder: Path) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise ModelError(
                f"{name} asks for pocketsphinx: pip install 'soundmind[listen]'"
            ) from error
        self._name, self._digest = name, folder_digest(folder)
        try:
            settings = json.loads((folder / GRAMMAR_FILE).read_text(encoding="utf-8"))
            grammar, phonemes = str(settings["grammar"]), dict(settings["phonemes"])
            beam = float(settings["beam"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{folder / GRAMMAR_FILE}: expected grammar, phonemes and beam ({error!r})"
            ) from error
        model = pocketsphinx.get_model_path()
        self._decoder = pocketsphinx.Decoder(
            hmm=f"{model}/en-us/en-us",
            dict=f"{model}/en-us/cmudict-en-us.dict",
            lm=None,
            samprate=SAMPLE_RATE,
            loglevel="FATAL",
            beam=beam,
            pbeam=beam,
            wbeam=beam**0.75,
        )
        for word, sounds in phonemes.items():
            if self._decoder.lookup_word(word) is None:
                self._decoder.add_word(word, sounds, True)
        self._decoder.add_jsgf_string("grammar", grammar)
        self._decoder.activate_search("grammar")

    def describe(self) -> dict[str, Any]:
        return {"name": self._name, "digest": self._digest, "spellings": {}}

    def to(self, device: Any) -> None:
        """Nothing to move."""

    def transcribe(self, waveforms: Sequence[Waveform]) -> list[Transcript]:
        return [Transcript(self._hear(waveform), 1) for waveform in waveforms]

    def _hear(self, waveform: Waveform) -> str:
        padded = np.pad(waveform, (0, int(HISS_SECONDS * SAMPLE_RATE)))
        noise = np.random.default_rng(0).normal(0.0, HISS, padded.size)
        sound = (np.clip(padded + noise, -1.0, 1.0) * 32767).astype("<i2")
        self._decoder.start_utt()
        self._decoder.process_raw(sound.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return str(found.hypstr) if found else ""
