"""verl's `verl.plugins` entry point: runs at `import verl`, in every process of a run.

verl logs plugin failures at DEBUG and goes on without the plugin, so `LOADED` is asserted on by the
launcher, the engine and the agent loop. Keep this module light: no model code, no vLLM.

verl imports the entry point's object and never calls it, hence the work at import time.
"""

from __future__ import annotations

from soundmind.model.processor import quiet_published_ids
from soundmind.plugin import patches
from soundmind.plugin.environment import is_cpu_platform, is_selected

LOADED = False


def load() -> None:
    """Register the CPU platform and apply the patches this process needs. Safe to call twice."""
    global LOADED
    if LOADED or not is_selected():
        return
    if is_cpu_platform():
        patches.vllm_version_alias()
        from soundmind.plugin import platform_cpu  # noqa: F401 - registers itself

        patches.gloo_process_group()
        patches.vectorised_logprobs()
    quiet_published_ids()
    patches.true_length_features()
    patches.omni_token_builder()
    LOADED = True


def require_loaded() -> None:
    """Raise unless the plugin is active here. verl itself would not say so."""
    if not LOADED:
        load()  # raises with the real reason where verl swallowed it
    if not LOADED:
        raise RuntimeError(
            "SoundMind's verl plugin is not active in this process. Start training with "
            "`python -m soundmind.train --config-name NAME`, which selects it "
            "(SOUNDMIND_SELECTED=1), and check VERL_USE_EXTERNAL_PLUGINS is not `none`."
        )


load()
