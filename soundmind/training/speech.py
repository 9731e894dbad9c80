"""Answers spoken in the actor's process, between old log-probabilities and advantages.

At that moment vLLM sleeps, the current thinker is loaded here anyway, and no reward has been used
yet. One forward pass of the policy gives the talker's inputs (`soundmind.speech`); talker, vocoder
and recogniser are frozen, belong to the reward, and wait in the host's memory between the steps.
What a row's speech was comes back as one column of JSON; the trainer grades it (`spoken`).

Every rank runs as many forwards as the others, verl's own micro-batches; the talker has no
collective, so ranks may speak for different times.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine_workers import ActorRolloutRefWorker

from soundmind.data.audio import SAMPLE_RATE, Waveform, resample
from soundmind.speech.decoding import CODES_PER_SECOND, SpeechSettings
from soundmind.speech.recogniser import Transcript, open_recogniser
from soundmind.speech.states import TalkerInputs
from soundmind.speech.talker import Talker, Unspeakable
from soundmind.speech.vocoder import SPEECH_RATE, Vocoder
from soundmind.speech.weights import load_voice
from soundmind.training.talker_states import TALKER_MARKS, TALKER_STATES

SEED, AUDIT = "speech_seed", "speech_audit"  # columns the trainer sends
SPEECH = "speech"  # the column that comes back
SETTINGS = "speech_settings"  # JSON of the configuration, beside the rows


class Speaker:
    """Talker, vocoder and recogniser of one process."""

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        folder = Path(settings["model"])
        self.device, self._settings = device, settings
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.talker = Talker(folder, "cpu", dtype)
        self.voice = load_voice(folder, settings["speaker"])
        sampling = ("temperature", "top_k", "top_p", "repetition_penalty", "max_seconds")
        self._sampling = SpeechSettings(
            **{name: settings[name] for name in (*sampling, "cuda_graphs")}
        )
        listens = settings["stage"] == "transcript" or settings["audit"]["every"]
        self._vocoder = Vocoder(folder, settings["speaker"]) if listens else None
        self._recogniser = (
            open_recogniser(settings["transcript"]["recogniser"]) if listens else None
        )

    @property
    def marks(self) -> tuple[int, int, int]:
        """Voice start, text end and text pad, as tokens of the thinker."""
        return (self.voice.start_token, *self.talker.mark_ids)

    def speak(
        self,
        states: Sequence[torch.Tensor],
        prompt_lengths: Sequence[int],
        marks: torch.Tensor,
        seeds: Sequence[int],
        audited: Sequence[bool],
    ) -> list[dict[str, Any]]:
        """What was said of every row, as the trainer reads it; `speech_error` where nothing was."""
        rows: list[dict[str, Any]] = [{} for _ in states]
        spent = dict.fromkeys(("talker", "vocoder", "recogniser"), 0.0)
        inputs: list[TalkerInputs | None] = []
        speaking: list[int] = []
        for row, (own, length) in enumerate(zip(states, prompt_lengths, strict=True)):
            try:
                inputs.append(self.talker.inputs(own, length, marks))
                speaking.append(row)
            except Unspeakable as error:
                rows[row]["speech_error"] = str(error)
        started = time.monotonic()
        self.talker.to(self.device)
        longest = max(prompt_lengths, default=0) + self._sampling.max_codes
        asked = self._settings["rows"]
        at_once = self.talker.rows_that_fit(longest) if asked == "auto" else int(asked)
        try:
            codes = self.talker.speak(
                inputs, [seeds[row] for row in speaking], self._sampling, at_once
            )
        except torch.OutOfMemoryError as error:
            for row in speaking:
                rows[row]["speech_error"] = f"talker: {error}"
            codes, speaking = [], []
        self.talker.to("cpu")
        spent["talker"] = time.monotonic() - started
        for row, found in zip(speaking, codes, strict=True):
            rows[row] |= {
                "speech_tokens": len(found.tokens),
                "speech_seconds": len(found.tokens) / CODES_PER_SECOND,
                "speech_ended": found.ended,
                "codes_digest": codes_digest(found.tokens),
            }
        if self._settings["stage"] == "transcript":
            # An answer that was cut has no end that could be a verdict.
            heard = [
                (row, found.tokens)
                for row, found in zip(speaking, codes, strict=True)
                if found.ended and found.tokens
            ]
            for row in speaking:
                rows[row]["speech_transcript"] = ""
            seconds = float(self._settings["transcript"]["seconds"])
            self._listen(rows, heard, seeds, seconds, "speech_transcript", spent)
        whole = [
            (row, found.tokens)
            for row, found in zip(speaking, codes, strict=True)
            if audited[row] and found.tokens
        ]
        self._listen(rows, whole, seeds, None, "audit_transcript", spent)
        if rows:
            rows[0]["timing"] = spent
            rows[0]["rows_at_once"] = self.talker.rows_at_once
        return rows

    def _listen(
        self,
        rows: list[dict[str, Any]],
        answers: Sequence[tuple[int, Sequence[int]]],
        seeds: Sequence[int],
        seconds: float | None,
        column: str,
        spent: dict[str, float],
    ) -> None:
        """Vocode and transcribe `answers`, (row, codes): their last `seconds`, or all of it."""
        if not answers:
            return
        assert self._vocoder is not None and self._recogniser is not None
        clips: list[tuple[int, Waveform]] = []
        started = time.monotonic()
        self._vocoder.to(self.device)
        for row, codes in answers:
            noise = seeds[row] % 2**31
            try:
                if seconds is None:
                    sound = self._vocoder.sound(codes, noise)
                else:
                    sound = self._vocoder.tail(codes, seconds, noise)
                clips.append((row, resample(sound, SPEECH_RATE, SAMPLE_RATE)))
            except (RuntimeError, ValueError) as error:
                rows[row]["speech_error"] = f"vocoder: {error}"
        self._vocoder.to("cpu")
        spent["vocoder"] += time.monotonic() - started
        started = time.monotonic()
        self._recogniser.to(self.device)
        for (row, _), heard in zip(
            clips, self._transcribe([clip for _, clip in clips]), strict=True
        ):
            if isinstance(heard, Transcript):
                rows[row][column] = heard.text
            else:
                rows[row]["speech_error"] = f"recogniser: {heard}"
        self._recogniser.to("cpu")
        spent["recogniser"] += time.monotonic() - started

    def _transcribe(self, clips: Sequence[Waveform]) -> list[Transcript | Exception]:
        """All clips at once; where that fails each by itself, so that one costs only itself."""
        assert self._recogniser is not None
        listen: Callable[[Sequence[Waveform]], list[Transcript]] = self._recogniser.transcribe
        try:
            return list(listen(clips))
        except (RuntimeError, ValueError) as error:
            if len(clips) == 1:
                return [error]
        return [found for clip in clips for found in self._transcribe([clip])]


def codes_digest(tokens: Sequence[int]) -> str:
    """A name for a sequence of codec tokens: what a dump shows of them, so that speech that is made
    again can be compared."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]


def column(values: Any) -> list[Any]:
    """A column of TransferQueue as a list; its container depends on the back-end."""
    items = values.unbind() if isinstance(values, torch.Tensor) else values
    return [
        item if isinstance(item, torch.Tensor) else getattr(item, "data", item) for item in items
    ]


class SpeakingWorker(ActorRolloutRefWorker):
    """verl's worker of actor and rollout, which can also speak the rollouts."""

    _speaker: Speaker | None = None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def speak(self, data: Any) -> Any:
        """Speak this rank's rows; returns the column `SPEECH`, JSON by row, empty for one that has
        no seed (padding, or a group that is not spoken in this step)."""
        settings = json.loads(tu.pop(data, SETTINGS))
        if self._speaker is None:
            self._speaker = Speaker(settings, get_device_name())
        speaker = self._speaker
        seeds, audited = ([int(item) for item in column(data[name])] for name in (SEED, AUDIT))
        lengths = data["prompts"].offsets().diff().tolist()
        started = time.monotonic()
        marks = " ".join(map(str, speaker.marks))
        # verl asks for a temperature; states do not depend on it.
        tu.assign_non_tensor(data, compute_loss=False, temperature=1.0, **{TALKER_MARKS: marks})
        output = self.actor.infer_batch(data)
        seconds = time.monotonic() - started
        states = output[TALKER_STATES].unbind()
        rows = [row for row, seed in enumerate(seeds) if seed >= 0]
        spoken = speaker.speak(
            # The last token of a response is never fed to the thinker while it generates.
            [states[row][:-1] for row in rows],
            [lengths[row] for row in rows],
            self.actor.engine.talker_marks.cpu(),
            [seeds[row] for row in rows],
            [bool(audited[row]) for row in rows],
        )
        if spoken:
            spoken[0]["timing"]["states"] = seconds
        said = [""] * len(seeds)
        for row, found in zip(rows, spoken, strict=True):
            said[row] = json.dumps(found)
        return tu.get_tensordict({SPEECH: said})
