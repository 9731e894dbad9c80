"""Installed but not selected, SoundMind changes nothing; selected, every patch is in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, clean_environment

pytest.importorskip("verl")

# The entry points and what they look at: nothing of `training`.
IMPORTED_WITHOUT_A_RUN = [
    f"soundmind.plugin.{name}"
    for name in ("environment", "patches", "torch_entry", "verl_entry", "vllm_entry")
]

# What another verl user could notice, printed as JSON by a fresh interpreter.
PROBE = """
import json, sys
import importlib.metadata
before = importlib.metadata.version
import verl
import verl.utils.torch_functional, verl.utils.distributed
import verl.utils.tokenizer.continuous_token_wiring as wiring
from verl.plugin.platform.platform_manager import PlatformRegistry
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
import vllm.model_executor.layers.utils as layers
from vllm.plugins import load_general_plugins
load_general_plugins()
ours = lambda function: function.__module__.startswith("soundmind")
from soundmind.plugin import patches
print("PROBE " + json.dumps({
    "patches": patches.APPLIED,
    "platforms": sorted(PlatformRegistry.registered_names()),
    "version": ours(importlib.metadata.version),
    "logprobs": ours(verl.utils.torch_functional.logprobs_from_logits_v2),
    "process_group": ours(verl.utils.distributed.initialize_global_process_group_ray),
    "extractor": ours(WhisperFeatureExtractor.__call__),
    "linear": ours(layers.dispatch_cpu_unquantized_gemm),
    "token_builder": "qwen2_5_omni_thinker" in wiring._MODEL_TYPE_TO_FAMILY,
    "imported": sorted(
        n for n in sys.modules if n.startswith(("soundmind.plugin.", "soundmind.training."))
    ),
}))
"""


def probe(**environment: str) -> dict[str, object]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        cwd=REPOSITORY,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("PROBE "))


def test_installed_but_not_selected_the_plugin_changes_nothing() -> None:
    found = probe(VLLM_TARGET_DEVICE="cpu")
    assert found["patches"] == []
    assert "cpu" not in found["platforms"]
    for name in ("version", "logprobs", "process_group", "extractor", "linear", "token_builder"):
        assert found[name] is False, name
    assert found["imported"] == IMPORTED_WITHOUT_A_RUN


def test_selected_on_a_cpu_every_patch_is_in_place() -> None:
    found = probe(SOUNDMIND_SELECTED="1", VERL_PLATFORM="cpu")
    assert "cpu" in found["platforms"]
    for name in ("version", "logprobs", "process_group", "extractor", "linear", "token_builder"):
        assert found[name] is True, name


def test_selected_for_gpus_the_cpu_patches_stay_out() -> None:
    code = (
        "import verl; from soundmind.plugin import patches; "
        "print('PROBE', ','.join(sorted(patches.APPLIED)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env=clean_environment(SOUNDMIND_SELECTED="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "PROBE omni_token_builder,true_length_features" in result.stdout, result.stderr[-2000:]


# verl internals that the plugin relies on, as (module, attribute). An upgrade breaks here, loudly.
INTERNALS = [
    ("verl.workers.config.model", "HFModelConfig.__post_init__"),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead._build_module"),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead._build_fsdp_module"),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead.get_per_tensor_param"),
    ("verl.workers.engine.fsdp.transformer_impl", "CPUOffloadPolicy"),
    ("verl.utils.distributed", "initialize_global_process_group_ray"),
    ("verl.utils.torch_functional", "logprobs_from_logits_v2"),
    ("verl.utils.tokenizer.continuous_token_wiring", "_MODEL_TYPE_TO_FAMILY"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync._compute_metrics"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync._log_rollout_data"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync._build_replay_buffer"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync._validate"),
    ("verl.trainer.ppo.v1.agent_loop_tq", "AgentLoopWorkerTQ.__ray_actor_class__"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopWorker._compute_multi_modal_inputs"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopWorker._run_agent_loop"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopBase.ct_build_initial_tokens"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync._balance_batch"),
    ("verl.trainer.ppo.v1.trainer_base", "uuid.uuid4"),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner._sample"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner._bookkeeping_sync"),
    ("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_native"),
]


def test_every_internal_that_is_relied_on_exists() -> None:
    code = "import importlib, functools\nmissing = []\n"
    code += f"for module, path in {INTERNALS!r}:\n"
    code += "    target = importlib.import_module(module)\n"
    code += "    try: functools.reduce(getattr, path.split('.'), target)\n"
    code += "    except AttributeError: missing.append(f'{module}:{path}')\n"
    code += "print('PROBE', missing)"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env=clean_environment(SOUNDMIND_SELECTED="1", VERL_PLATFORM="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "PROBE []" in result.stdout, result.stdout[-500:] + result.stderr[-2000:]


def test_an_engine_process_ends_when_its_parent_is_killed() -> None:
    child = (
        "import time, os; from soundmind.plugin import vllm_entry; "
        "vllm_entry.PARENT_CHECK_SECONDS = 0.05; vllm_entry.end_with_parent(); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=-1, text=True); "
        "print(p.stdout.readline().strip(), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert _ends(orphan, seconds=20)


def _ends(process_id: int, seconds: float) -> bool:
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
