"""Written answers through vLLM's offline engine, asked exactly as rollouts ask in training.

Same chat template, placeholder rules, banned ids, audio decoding and feature extraction, all by
import. What is particular to an evaluation:

* The engine runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): all prompts of a batch are
  there before the first step, so scheduling does not depend on timing, and a batch asked again
  after a kill gets the same answers. Caches are emptied between batches for the same reason.
* A row that cannot be asked (no clip, too long) becomes an `Answer` with an error, not an end.
* Out of memory raises `OutOfMemory`; the command then starts over with half the sequences.

Sampling: seeded per request on GPUs; vLLM's CPU sampler cannot do that, there the process's
generator is seeded before every batch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soundmind.data.audio import SAMPLE_RATE, ClipError, Waveform, num_audio_tokens
from soundmind.data.clips import load_clip
from soundmind.evaluation.examples import Example
from soundmind.evaluation.models import Model, clip_limit, render
from soundmind.model.folder import ModelError
from soundmind.model.tokens import BANNED_LOGIT_BIAS, response_banned_token_ids
from soundmind.system.machine import gpu_names

OTHER_MODEL_PROMPT = (
    8192  # tokens kept for the prompt of a model whose placeholders we cannot count
)
_OUT_OF_MEMORY = ("out of memory", "no available memory", "larger than the available kv cache")


class TextDone(Exception):
    """A spoken evaluation has its text. vLLM's memory comes free with the process: go on in another."""


class OutOfMemory(RuntimeError):
    """The engine did not fit. `max_num_seqs` is what it was tried with."""

    def __init__(self, max_num_seqs: int, cause: BaseException) -> None:
        super().__init__(f"out of memory with max_num_seqs={max_num_seqs} ({cause})")
        self.max_num_seqs = max_num_seqs


@dataclass(frozen=True)
class TextSettings:
    """Everything that decides an answer beside model and prompt."""

    max_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    samples: int
    seed: int
    dtype: str
    max_num_seqs: int
    batch_rows: int  # rows asked and saved together
    tensor_parallel: int = 1
    max_model_len: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answer:
    """One response of a model, or why there is none."""

    text: str
    num_tokens: int  # the end token included
    finish_reason: str  # "stop", "length" (cut at the limit) or "error"
    prompt_tokens: int  # clips expanded
    seconds: float  # of the batch, divided by its rows
    error: str | None = None
    token_ids: tuple[int, ...] = ()  # of the response, the end token included

    @classmethod
    def failed(cls, error: str) -> Answer:
        return cls("", 0, "error", 0, 0.0, error)


@dataclass(frozen=True)
class Prompt:
    """A prompt as vLLM takes it. `token_ids` is None where the model's own processor tokenises."""

    text: str
    token_ids: list[int] | None
    clip: Waveform | None  # (num_samples,) float32 mono, 16 kHz

    @property
    def num_tokens(self) -> int:
        """Length with the clip expanded; 0 where it is not known beforehand."""
        if self.token_ids is None:
            return 0
        sound = 0 if self.clip is None else num_audio_tokens(self.clip.size) - 1
        return len(self.token_ids) + sound

    def for_vllm(self) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": self.text}
        if self.token_ids is not None:
            prompt = {"prompt_token_ids": self.token_ids}
        if self.clip is not None and self.token_ids is not None:
            prompt["multi_modal_data"] = {"audio": [self.clip]}
            prompt["mm_processor_kwargs"] = {"sampling_rate": SAMPLE_RATE}  # as in rollouts
        elif self.clip is not None:
            prompt["multi_modal_data"] = {"audio": [(self.clip, SAMPLE_RATE)]}
        return prompt


def load_checked_clip(example: Example, limit_seconds: float) -> Waveform | None:
    """The row's sound, or ClipError where it has gone, is unreadable or longer than the limit."""
    if example.clip is None:
        if example.info["mode"] != "text":
            raise ClipError("missing-clip", f"row of mode {example.info['mode']} without a clip")
        return None
    waveform = load_clip(example.clip)
    seconds = waveform.size / SAMPLE_RATE
    if seconds > limit_seconds:
        raise ClipError("long-clip", f"clip of {seconds:.1f} s, over {limit_seconds:.0f} s")
    return waveform


class TextEngine:
    """vLLM around one model; `answer` takes a batch of rows."""

    def __init__(self, model: Model, examples: Sequence[Example], settings: TextSettings) -> None:
        self.model, self.settings = model, settings
        self.cpu = prepare_process()
        self._load_processor()
        longest = max(self._prompt_bound(example) for example in examples)
        self.max_model_len = settings.max_model_len or longest + settings.max_tokens
        self.llm = self._build(replace(settings, max_model_len=self.max_model_len))

    def _load_processor(self) -> None:
        if self.model.is_omni:
            from soundmind.model.processor import load_processor

            self.renderer = load_processor(str(self.model.folder))
            self.tokenizer = self.renderer.tokenizer
            banned = response_banned_token_ids(self.tokenizer, self.model.folder)
            self.logit_bias: dict[int, float] | None = dict.fromkeys(banned, BANNED_LOGIT_BIAS)
        else:
            from transformers import AutoTokenizer

            self.renderer = self.tokenizer = AutoTokenizer.from_pretrained(
                self.model.folder, trust_remote_code=self.settings.trust_remote_code
            )
            self.logit_bias = None

    def _build(self, settings: TextSettings) -> Any:
        from vllm import LLM

        try:
            return LLM(**engine_arguments(self.model, settings, cpu=self.cpu))
        except Exception as error:
            raise as_memory_error(error, settings.max_num_seqs) from error

    def _prompt_bound(self, example: Example) -> int:
        """Tokens of a row's prompt by its stored numbers; enough to size the context."""
        if not self.model.is_omni:
            return OTHER_MODEL_PROMPT
        text = render(self.model, self.renderer, example.messages)
        return len(self._token_ids(text)) + (example.info["audio_tokens"] or 0)

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, example: Example) -> Prompt:
        """Decode, render and tokenise one row; ValueError (ClipError) where it cannot be asked."""
        clip = load_checked_clip(example, clip_limit(self.model.adapter))
        text = render(self.model, self.renderer, example.messages)
        ids = self._token_ids(text) if self.model.is_omni else None
        prompt = Prompt(text, ids, clip)
        room = self.max_model_len - self.settings.max_tokens
        if prompt.num_tokens > room:
            raise ValueError(
                f"prompt of {prompt.num_tokens} tokens leaves no room for "
                f"{self.settings.max_tokens} more within max_model_len={self.max_model_len}"
            )
        return prompt

    def prepare(self, examples: Sequence[Example]) -> list[Prompt | Answer]:
        """Prompts of a batch; a failed Answer stands where a row cannot be asked."""
        prepared: list[Prompt | Answer] = []
        for example in examples:
            try:
                prepared.append(self.prompt(example))
            except (ValueError, OSError) as error:
                prepared.append(Answer.failed(str(error)))
        return prepared

    def answer(
        self,
        examples: Sequence[Example],
        prepared: Sequence[Prompt | Answer],
        on_done: Callable[[int], None] = lambda rows: None,
    ) -> list[list[Answer]]:
        """`samples` answers for every row of a batch, in order."""
        asked = [
            (example, prompt)
            for example, prompt in zip(examples, prepared, strict=True)
            if isinstance(prompt, Prompt)
        ]
        self._forget(examples[0].index)
        started = time.monotonic()
        outputs = self._generate(asked, on_done)
        share = (time.monotonic() - started) / max(1, len(asked))
        answered = iter(outputs)
        results: list[list[Answer]] = []
        for prompt in prepared:
            found = prompt if isinstance(prompt, Answer) else next(answered)
            if isinstance(found, Answer):
                results.append([found] * self.settings.samples)
                on_done(1)
            else:
                results.append([self._answer(found, sample, share) for sample in found.outputs])
        return results

    def _generate(
        self, asked: Sequence[tuple[Example, Prompt]], on_done: Callable[[int], None]
    ) -> list[Any]:
        """vLLM's outputs; where the batch as a whole is refused, each row on its own."""
        if not asked:
            return []
        prompts = [prompt.for_vllm() for _, prompt in asked]
        parameters = [self._sampling(example) for example, _ in asked]
        try:
            return list(
                self.llm.generate(
                    prompts,
                    parameters,
                    use_tqdm=_progress_class(on_done, self.settings.samples),
                )
            )
        except (ValueError, TypeError) as error:
            if len(asked) == 1:
                return [Answer.failed(f"vLLM refuses this row: {error}")]
        except Exception as error:
            raise as_memory_error(error, self.settings.max_num_seqs) from error
        return [output for row in asked for output in self._generate([row], on_done)]

    def _sampling(self, example: Example) -> Any:
        from vllm import SamplingParams

        settings = self.settings
        seeded = settings.temperature > 0 and not self.cpu
        return SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            repetition_penalty=1.0,
            logit_bias=self.logit_bias,
            seed=row_seed(settings.seed, example.index) if seeded else None,
        )

    def _forget(self, first: int) -> None:
        """Put the engine into the state in which an undisturbed run meets the batch of row `first`."""
        import torch

        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()
        if self.cpu:
            torch.manual_seed(row_seed(self.settings.seed, first))

    def _answer(self, output: Any, sample: Any, seconds: float) -> Answer:
        # As verl decodes for the reward; vLLM's own incremental text may differ in spaces.
        text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        return Answer(
            text=text,
            num_tokens=len(sample.token_ids),
            finish_reason=str(sample.finish_reason),
            prompt_tokens=len(output.prompt_token_ids),
            seconds=seconds,
            token_ids=tuple(sample.token_ids),
        )


SEEDS_A_ROW = 4096


def row_seed(seed: int, index: int) -> int:
    """First of a row's 4,096 seeds; vLLM adds the number of the sample.

    No two samples of an evaluation share one, also in 32 bits, which is all that a generator of a
    CPU takes; where the evaluation's seed lies among them is a hash of it.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return (start + index * SEEDS_A_ROW) % 2**32


def engine_arguments(model: Model, settings: TextSettings, *, cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`; benchmarks/evaluate.py passes the same ones."""
    return {
        "model": str(model.folder),
        "dtype": settings.dtype,
        "enforce_eager": cpu,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "limit_mm_per_prompt": {"audio": 1, "image": 0, "video": 0}
        if model.is_omni or model.model_type == "qwen3_omni_moe"
        else {"audio": 1},
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel,
        "trust_remote_code": settings.trust_remote_code,
        "disable_log_stats": True,
    }


def prepare_process() -> bool:
    """Environment and patches of a SoundMind process; returns whether it runs on the CPU.

    Called before anything imports torch: OpenMP reads its number of threads when it is loaded, and
    spinning threads on shared cores have been seen to cost a factor of twenty.
    """
    from soundmind.plugin import environment, patches

    cpu = not gpu_names()
    environment.select(os.environ, cpu=cpu)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns once per batch otherwise
    import torch
    import transformers

    if not cpu and not torch.cuda.is_available():
        raise ModelError(
            f"there is a GPU, but PyTorch {torch.__version__} cannot use it. Install the set for "
            "GPUs (scripts/setup.sh), or hide the GPU's driver to evaluate on the CPU"
        )
    # The talker's default configuration warns about its own ids at every load.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if cpu:
        patches.vllm_version_alias()
    patches.true_length_features()
    return cpu


def as_memory_error(error: BaseException, max_num_seqs: int) -> BaseException:
    """`OutOfMemory` if that is what `error` or what caused it says, else `error` itself."""
    cause: BaseException | None = error
    while cause is not None:
        text = f"{type(cause).__name__} {cause}".lower()
        if isinstance(cause, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY):
            return OutOfMemory(max_num_seqs, cause)
        cause = cause.__cause__ or cause.__context__
    return error


def _progress_class(on_done: Callable[[int], None], samples: int) -> Callable[..., Any]:
    """What vLLM takes for tqdm: tells `on_done` of finished rows and prints nothing."""

    class Progress:
        def __init__(self, iterable: Any = (), *, total: int = 0, **_: Any) -> None:
            self.n, self.total, self.postfix = 0, total, ""
            self._iterable = iterable
            self._started = time.monotonic()

        @property
        def format_dict(self) -> dict[str, float]:
            return {"elapsed": max(1e-9, time.monotonic() - self._started)}

        def __iter__(self) -> Any:
            return iter(self._iterable)  # vLLM also wraps the rendering of prompts in it

        def update(self, count: int = 1) -> None:
            self.n += count
            on_done(count // samples)

        def refresh(self) -> None:
            """Part of tqdm's interface."""

        def close(self) -> None:
            """Part of tqdm's interface."""

    return Progress
