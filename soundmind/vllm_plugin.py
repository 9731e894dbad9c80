"""vLLM's `vllm.general_plugins` entry point: loaded in the engine core and in every worker.

Acts only in a SoundMind run without an accelerator, where vLLM's packed Linear weights would make
the first weight update fail. See `soundmind.patches`.
"""

from __future__ import annotations

from soundmind.selection import is_cpu_platform, is_selected


def register() -> None:
    """Entry point."""
    if is_selected() and is_cpu_platform():
        from soundmind import patches

        patches.unpacked_cpu_linear()
