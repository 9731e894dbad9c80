"""vLLM's `vllm.general_plugins` entry point: loaded in the engine core and in every worker.

Acts only in a SoundMind run. Two things:

* without an accelerator, Linear weights stay unpacked, so that weight updates can reach them
  (`soundmind.plugin.patches`);
* the process ends when its parent does. A killed training takes Ray's processes with it, but
  vLLM's engine and workers are no children of Ray and would live on, with their memory.
"""

from __future__ import annotations

import os
import threading
import time

from soundmind.model.processor import quiet_published_ids
from soundmind.plugin.environment import is_cpu_platform, is_selected

PARENT_CHECK_SECONDS = 2.0


def register() -> None:
    """Entry point."""
    if not is_selected():
        return
    quiet_published_ids()
    if is_cpu_platform():
        from soundmind.plugin import patches

        patches.unpacked_cpu_linear()
        patches.rewindable_generators()
    if is_engine_process():
        end_with_parent()


def is_engine_process() -> bool:
    """True in processes that vLLM itself spawned, not in a program that imports it."""
    import multiprocessing

    return multiprocessing.parent_process() is not None


def end_with_parent() -> threading.Thread:
    """Watch the parent process from a daemon thread and leave at once when it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)  # the parent is gone: nobody is left to tell

    thread = threading.Thread(target=watch, name="soundmind-parent-watch", daemon=True)
    thread.start()
    return thread
